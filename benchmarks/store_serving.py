"""Benchmark an adapter store in continuous batching on a GPU: 10,000 adapters registered, 64 on the device.

It takes some minutes.

    python benchmarks/store_serving.py               # results/store_serving.csv and .png beside this script
    python benchmarks/store_serving.py --tiny        # the same on a CPU in a minute, to see it run

The model has the shape of Llama 8B with 8 of its 32 layers and random weights in bfloat16; adapters have rank 16 on
all seven projections, 21 MB in bfloat16, which the store keeps as they are (``dtype="file"``). Of the 10,000 folders,
1,000 have different weights and the others are hard links to them; every folder is an adapter with its own memory.
Host memory has room for 512 of them, device memory for 16, 64 or 128.

- ``throughput``: streams of requests whose adapters follow Zipf's law with exponent 1 over 10,000, or are uniform over
  1,000 or 10,000; all requests are queued at the start, with prompts of 16 to 128 tokens and answers of 64. Every
  round has different requests, and begins with those adapters in memory that earlier requests of its stream would
  have left there. ``of resident`` compares with the same requests in the same session, with device memory for all
  adapters of the round, loaded before it starts, and is the median over rounds. ``64 in use`` is another baseline:
  the same requests for 64 adapters (the name's number modulo 64), all resident. ``captured`` counts CUDA graphs for
  sizes of batches that hadn't occurred yet, and ``discarded`` how often graphs had to be captured again.
- ``first token``: time to the first token of one request at a time, next to 16 running ones, with its adapter on the
  device, in host memory, in a file in the page cache, or in a file that isn't (written out and dropped with
  ``posix_fadvise``).
- ``step``: time between tokens of 16 requests for pinned adapters, while nothing is loaded, while adapters are copied
  from host memory to the device, and while they are read from files, first into new host memory and then into memory
  that others have used; no request uses these. Loads follow each other as fast as possible, four at a time, or one by
  one at a fixed rate.

Throughput is timed after rounds that capture no CUDA graph. Before anything is timed, rows of a
mixed batch must match those of PEFT's ``load_adapter`` to the precision of bfloat16, and first tokens of continuous
batching must be among PEFT's most likely ones.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from continuous import captured, count_captures, finish, set_attention, without_block_table
from end_to_end import PROJECTIONS, TINY, versions, write
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import ContinuousBatchingConfig

import peft_multibatch
from peft_multibatch.adapters.store.arena import size_class


matplotlib.use("Agg")
import matplotlib.pyplot as plt


RESULTS = Path(__file__).parent / "results"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BIG = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
RESIDENT, IN_USE, QUIET = "all resident", "64 in use, resident", "nothing is loaded"
console = Console(width=130)


class Sizes:
    """The workload described at the top of this file, or a tiny version of it."""

    def __init__(self, is_tiny: bool, attention: str) -> None:
        self.is_tiny = is_tiny
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = TINY if is_tiny else BIG
        self.layers, self.rank = (2, 4) if is_tiny else (8, 16)
        self.different, self.registered, self.even = (60, 120, 24) if is_tiny else (1000, 10_000, 1000)
        self.host = 30 if is_tiny else 512
        self.requests, self.new_tokens, self.longest = (24, 4, 20) if is_tiny else (384, 64, 128)
        self.places, self.in_use, self.running, self.probes = (8, 8, 4, 3) if is_tiny else (64, 64, 16, 24)
        self.running_tokens = 150 if is_tiny else 1500
        self.step_seconds = 0.4 if is_tiny else 1.5
        self.attention = attention
        self.bytes = 0  # size of an adapter in memory


# Adapters.


def build(sizes: Sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=sizes.layers, eos_token_id=None, pad_token_id=0, **sizes.model)
    with torch.device(sizes.device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def write_adapters(sizes: Sizes, root: Path) -> None:
    """Write files with the same header and configuration and different random weights, and links to them."""
    config = LoraConfig(r=sizes.rank, target_modules=PROJECTIONS, init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig(num_hidden_layers=sizes.layers, **sizes.model))
    skeleton = get_peft_model(skeleton.to(torch.bfloat16), config, autocast_adapter_dtype=False).to_empty(device="cpu")
    skeleton.save_pretrained(str(root / "0"))
    raw = (root / "0" / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:end])
    entries.pop("__metadata__", None)
    factors = torch.empty((len(raw) - end) // 2, device=sizes.device)
    for key, entry in entries.items():
        start, stop = (each // 2 for each in entry["data_offsets"])
        # keeps logits in a range in which bfloat16 can distinguish adapters
        factors[start:stop] = 0.02 if ".lora_B." in key else entry["shape"][1] ** -0.5
    text = (root / "0" / CONFIG).read_bytes()
    lock = threading.Lock()

    def make(number: int) -> None:
        with lock:
            generator = torch.Generator(sizes.device).manual_seed(number)
            numbers = torch.randn(len(factors), generator=generator, device=sizes.device).mul_(factors)
            data = numbers.bfloat16().view(torch.uint8).cpu().numpy().data
        folder = root / str(number)
        folder.mkdir(exist_ok=True)
        with (folder / WEIGHTS).open("wb") as file:
            file.write(raw[:end])
            file.write(data)
        (folder / CONFIG).write_bytes(text)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(make, range(sizes.different)))
    for number in range(sizes.different, sizes.registered):
        (root / str(number)).mkdir()
        for file in (CONFIG, WEIGHTS):
            os.link(root / str(number % sizes.different) / file, root / str(number) / file)
    sizes.bytes = sum(each.nbytes for each in load_file(root / "0" / WEIGHTS).values())


@torch.no_grad()
def check(sizes: Sizes, model: Any, root: Path) -> None:
    """Compare a mixed batch, and first tokens of continuous batching, with PEFT."""
    prompts = torch.randint(1, sizes.model["vocab_size"] - 1, (8, 24), generator=torch.Generator().manual_seed(3))
    prompts = prompts.to(sizes.device)
    plain = model(prompts).logits[:, -1].float()
    theirs = []
    for number in range(8):
        peft = PeftModel.from_pretrained(model, str(root / str(number)), autocast_adapter_dtype=False).eval()
        theirs.append(peft(prompts[number : number + 1]).logits[:, -1].float())
        peft.unload()
    wanted = torch.cat(theirs)
    names = [str(number) for number in range(8)]
    mb = peft_multibatch.enable(model)  # older versions of transformers can't call a model during continuous batching
    stored(sizes, mb, root, 8)
    ours = model(prompts, adapter_ids=names).logits[:, -1].float()
    mb.disable()
    with serving(sizes, model, root, 8) as (store, manager):
        tokens = finish(manager, manager.add_requests(prompts.tolist(), adapter_ids=names))
        assert len(store) == sizes.registered
    error, effect = (float((each - wanted).norm() / wanted.norm()) for each in (ours, plain))
    # bfloat16 may swap the most likely tokens; with wrong weights, tokens would be far less likely
    behind, others = (
        float(((wanted.max(-1).values - wanted[range(8), first]) / wanted.std(-1)).max())
        for first in ([each[0] for each in tokens], plain.argmax(-1).tolist())
    )
    console.print(f"error against PEFT {error:.4f}, effect of the adapters {effect:.2f}")
    console.print(
        f"first tokens are up to {behind:.3f} deviations behind PEFT's, those of the base model {others:.3f}"
    )
    if not (error < 0.03 < 0.1 < effect and behind < 0.1 < others):  # two roundings of bfloat16 are this far apart
        raise SystemExit("results differ from PEFT, so nothing is timed")


# Sessions.


def stored(sizes: Sizes, mb: Any, root: Path, room: int) -> Any:
    """Create a store with device memory for ``room`` adapters."""
    block = sizes.bytes * 9 // 8 + 4096  # size classes are at most an eighth larger
    host = room if sizes.device == "cpu" else sizes.host
    # requests that end and requests that start in the same step need separate slots
    store = mb.adapter_store(host * block, room * block, dtype="file", slots=4 * sizes.places, timeout=300)
    begin = time.perf_counter()
    registered = store.register_folder(root)
    console.print(f"room for {room}: {len(registered.names)} registered in {time.perf_counter() - begin:.2f} s")
    return store


@contextmanager
def serving(sizes: Sizes, model: Any, root: Path, room: int) -> Iterator[tuple[Any, Any]]:
    """Create a store with device memory for ``room`` adapters, and a manager."""
    mb = peft_multibatch.enable(model)
    store = stored(sizes, mb, root, room)
    config = ContinuousBatchingConfig(
        use_cuda_graph=sizes.device == "cuda", allow_block_sharing=False, num_blocks=128,
        max_requests_per_batch=sizes.places, max_batch_tokens=1024, **without_block_table(sizes.attention),
    )  # fmt: skip
    generation = GenerationConfig(max_new_tokens=sizes.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    options = {"generation_config": generation, "continuous_batching_config": config}
    try:
        with mb.continuous_batching(**options) as manager:
            yield store, manager
    finally:
        mb.disable()
        del store, mb
        gc.collect()
        if sizes.device == "cuda":
            torch.cuda.empty_cache()


def streams(sizes: Sizes) -> dict[str, Callable[[int], list[int]]]:
    """Return the streams, which draw the adapters of a round's requests."""
    cumulative = list(itertools.accumulate(1 / rank for rank in range(1, sizes.registered + 1)))
    order = list(range(sizes.registered))
    random.Random(7).shuffle(order)

    def zipf(seed: int) -> list[int]:
        return random.Random(seed).choices(order, cum_weights=cumulative, k=sizes.requests)

    def even(over: int) -> Callable[[int], list[int]]:
        return lambda seed: (
            [random.Random(f"{seed} {over}").choice(order[:over]) for _ in range(1)]
            + [order[each] for each in random.Random(seed).choices(range(over), k=sizes.requests - 1)]
        )

    return {
        f"Zipf(1.0) over {sizes.registered}": zipf,
        f"evenly over {sizes.even}": even(sizes.even),
        f"evenly over {sizes.registered}": even(sizes.registered),
    }


def prompts_of(sizes: Sizes, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(16, sizes.longest + 1, (sizes.requests,), generator=generator).tolist()
    return [torch.randint(1, sizes.model["vocab_size"] - 1, (each,), generator=generator).tolist() for each in lengths]


def play(sizes: Sizes, manager: Any, numbers: list[int], seed: int) -> float:
    """Run a round and return its time in seconds."""
    prompts = prompts_of(sizes, seed)
    begin = time.perf_counter()
    finish(manager, manager.add_requests(prompts, adapter_ids=[str(number) for number in numbers]))
    return time.perf_counter() - begin


def make_resident(store: Any, numbers: list[int]) -> None:
    """Load adapters and wait for them."""
    ids = [store._names.ids[str(number)] for number in dict.fromkeys(numbers)]
    while not all(map(store.is_loaded, ids)):
        store.prefetch(*(str(number) for number in numbers))
        time.sleep(0.01)


def block_size(store: Any) -> int:
    """Return the bytes of memory that each adapter of a store takes; all have the same size."""
    return size_class(next(iter(store._versions.values())).layout.size)


def resize(store: Any, room: int) -> None:
    """Give a store device memory for ``room`` adapters."""
    loader = store._loader
    with loader.lock:
        loader.final.arena.limit = block_size(store) * room
        while not loader.final.make_room((), set(), loader._let_go):
            loader.lock.wait(0.01)
        loader.final.arena.trim()


def settle(sizes: Sizes, store: Any, draw: Callable[[int], list[int]], seed: int, room: int) -> None:
    """Bring a store into the state in which earlier requests of the same stream would leave it."""
    loader = store._loader
    with loader.lock:
        for tier in (loader.host, loader.final):
            tier._kept.clear()
    resize(store, room)
    last: dict[int, None] = {}
    for number in (each for before in range(4) for each in draw(1000 * (before + 1) + seed)):
        last.pop(number, None)
        last[number] = None
    numbers = list(last)[-sizes.host :]
    for start in range(0, len(numbers), room // 2):
        make_resident(store, numbers[start : start + room // 2])


def throughput(sizes: Sizes, model: Any, root: Path, rooms: list[int], rounds: int, only: str) -> list[dict]:
    """Measure all ways in turn, in one session whose store changes its size, so that a host's speed cancels out."""
    kinds = {name: draw for name, draw in streams(sizes).items() if name.startswith(only)}
    most = sizes.in_use + max(len({*draw(seed)}) for draw in kinds.values() for seed in range(rounds))
    ways = {RESIDENT: most, IN_USE: most} | {f"room for {room}": room for room in rooms}
    found: dict[tuple[str, str], list[dict[str, float]]] = {(name, way): [] for name in kinds for way in ways}
    with serving(sizes, model, root, most) as (store, manager):
        graphs, quiet = manager._router.graph.captures, 0
        for number in range(12):  # until three rounds capture nothing
            before = len(captured)
            resize(store, [most, *rooms][number % (1 + len(rooms))])
            play(sizes, manager, list(kinds.values())[number % len(kinds)](100 + number), 100 + number)
            quiet = quiet + 1 if len(captured) == before else 0
            if quiet == 3:
                break
        console.print(f"{len(captured)} graphs captured before timing")
        for seed, (name, draw) in itertools.product(range(rounds), kinds.items()):
            order = list(ways.items())
            for way, room in order if seed % 2 else reversed(order):
                numbers = [each % sizes.in_use if way == IN_USE else each for each in draw(seed)]
                if room == most:
                    resize(store, room)
                    make_resident(store, numbers)
                else:
                    settle(sizes, store, draw, seed, room)
                before, late, discards = store.stats(), len(captured), graphs.discards
                seconds = play(sizes, manager, numbers, seed)
                after = store.stats()
                found[name, way].append({
                    "seconds": seconds, "hits": after.hits - before.hits, "misses": after.misses - before.misses,
                    "loads": after.loads - before.loads, "GB_read": (after.bytes_read - before.bytes_read) / 1e9,
                    "captured": len(captured) - late, "discarded": graphs.discards - discards,
                })  # fmt: skip
    records = []
    for (name, way), turns in found.items():
        times = [turn["seconds"] for turn in turns]
        seconds = statistics.median(times)
        ratio = statistics.median(
            theirs["seconds"] / mine["seconds"] for mine, theirs in zip(turns, found[name, RESIDENT])
        )
        sums = {key: sum(turn[key] for turn in turns) for key in turns[0]}
        records.append({
            "what": "throughput", "stream": name, "way": way, "room": ways[way], "requests": sizes.requests,
            "adapters": len({*kinds[name](0)}) if way != IN_USE else sizes.in_use,
            "seconds": round(seconds, 3), "fastest_s": round(min(times), 3), "slowest_s": round(max(times), 3),
            "tokens_per_s": round(sizes.requests * sizes.new_tokens / seconds),
            "hit_rate": round(sums["hits"] / max(sums["hits"] + sums["misses"], 1), 3),
            "loads": sums["loads"], "GB_read": round(sums["GB_read"], 2),
            "captured": sums["captured"], "discarded": sums["discarded"], "of resident": round(ratio, 3),
        })  # fmt: skip
        console.print(records[-1])
    return records


# Latency.


class Running:
    """Requests for pinned adapters that run as long as needed, with the times of their tokens."""

    def __init__(self, sizes: Sizes, store: Any, manager: Any) -> None:
        self.sizes, self.manager = sizes, manager
        self.numbers = list(range(sizes.running))
        for number in self.numbers:
            store.pin(str(number))
        make_resident(store, self.numbers)
        self.times: list[float] = []
        self.done: dict[str, Any] = {}
        self._names: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Running:
        prompts = prompts_of(self.sizes, 5)[: self.sizes.running]
        for number, prompt in zip(self.numbers, prompts):
            self._names.append(
                self.manager.add_request(
                    prompt[:16], f"running {number}", self.sizes.running_tokens, streaming=True, adapter_id=str(number)
                )
            )
        self._thread.start()
        while len(self.times) < 5:
            time.sleep(0.01)
        return self

    def _read(self) -> None:
        while not self._stop.is_set():
            output = self.manager.get_result(timeout=0.1)
            if output is None:
                continue
            if output.request_id == "running 0":
                self.times.append(time.perf_counter())
            if output.is_finished():
                self.done[output.request_id] = output

    def wait_for(self, name: str) -> Any:
        while name not in self.done:
            time.sleep(0.0002)
        return self.done.pop(name)

    @property
    def has_ended(self) -> bool:
        return "running 0" in self.done

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            self.manager.cancel_request(name)
        while not all(name in self.done for name in self._names):
            time.sleep(0.01)
        self._stop.set()
        self._thread.join()


def drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[round(part * (len(values) - 1))]


def latency(sizes: Sizes, model: Any, root: Path, room: int) -> list[dict]:
    records = []
    fresh = iter(range(sizes.running, sizes.different))  # files that haven't been read yet

    def some(count: int) -> list[int]:
        return list(itertools.islice(fresh, count))

    with serving(sizes, model, root, room) as (store, manager):
        play(sizes, manager, [each % sizes.running for each in range(sizes.requests)], 0)  # captures graphs
        places = {"device": some(sizes.probes), "host": some(sizes.probes), "file": [], "file, dropped": []}
        places["file"], places["file, dropped"] = some(sizes.probes), some(sizes.probes)
        if sizes.device == "cpu":
            del places["host"]
        fillers = some(room - sizes.running) or [sizes.registered - 1]
        prompt = prompts_of(sizes, 9)[0]
        found: dict[str, list[float]] = {place: [] for place in places}
        for each in places.get("host", []):
            make_resident(store, [each])
        make_resident(store, fillers[: room - sizes.running])  # evicts the others from device memory
        for each in places["file"]:
            (root / str(each) / WEIGHTS).read_bytes()
        for each in places["file, dropped"]:
            drop_from_cache(root / str(each) / WEIGHTS)
        warm_up = 0
        with Running(sizes, store, manager) as running:
            for index in track(range(-2, sizes.probes), description="first token", console=console):
                if index == 0:
                    warm_up = len(captured)
                for place, numbers in places.items():
                    number = numbers[index]  # the first two are warmup
                    if index < 0:
                        number = sizes.registered - 1 - index
                    if place == "device" or index < 0:
                        make_resident(store, [number % sizes.registered])
                    name = f"probe {place} {index}"
                    manager.add_request(
                        prompt, name, 1, adapter_id=str(number % sizes.registered), record_timestamps=True
                    )
                    output = running.wait_for(name)
                    if output.error:
                        raise SystemExit(output.error)
                    if index >= 0:
                        found[place].append(output.timestamps[0] - output.created_time)
                if running.has_ended:
                    raise SystemExit("the background requests ended before all first tokens were timed")
        for place, values in found.items():
            records.append({
                "what": "first token", "way": place, "room": room, "requests": len(values),
                "ms_p50": round(statistics.median(values) * 1e3, 2), "ms_p90": round(percentile(values, 0.9) * 1e3, 2),
                "of resident": round(statistics.median(values) / statistics.median(found["device"]), 3),
                "captured": len(captured) - warm_up,
            })  # fmt: skip
        records += steps(sizes, store, manager, room)
    for record in records:
        console.print(record)
    return records


def steps(sizes: Sizes, store: Any, manager: Any, room: int) -> list[dict]:
    """Measure the time between tokens of running requests while unrelated adapters are loaded."""
    in_host = list(range(sizes.running, sizes.running + min(sizes.host - sizes.running, 3 * room)))
    fresh = itertools.cycle(range(sizes.different, sizes.registered))
    gaps: dict[str, list[float]] = {}
    loaded: dict[str, list[float]] = {}

    def turn(what: str, numbers: Iterator[int] | None, most: int = 10**6, rate: float = 0) -> None:
        wanted: list[int] = []
        count = 0
        with Running(sizes, store, manager) as running:
            first, begin, known = len(running.times), time.perf_counter(), store.stats().loads
            while time.perf_counter() - begin < sizes.step_seconds and not running.has_ended and most > 0:
                is_due = count <= rate * (time.perf_counter() - begin) if rate else all(map(store.is_loaded, wanted))
                if numbers is not None and is_due:
                    some = [str(next(numbers)) for _ in range(1 if rate else 4)]
                    wanted = [store._names.ids[name] for name in some]
                    store.prefetch(*some)
                    count += len(some)
                    most -= len(some)
                time.sleep(0.005)  # few wakeups, because a step waits for any thread that runs Python
            loaded.setdefault(what, []).append((store.stats().loads - known) / (time.perf_counter() - begin))
            gaps.setdefault(what, []).extend(
                after - before for before, after in itertools.pairwise(running.times[first:])
            )

    def read_in(numbers: list[int]) -> None:
        for start in range(0, len(numbers), 8):
            make_resident(store, numbers[start : start + 8])

    turn(QUIET, None)  # captures the graph of these steps
    del gaps[QUIET], loaded[QUIET]
    before = len(captured)
    if sizes.device == "cuda":
        stats = store.stats()
        left = (stats.max_host_bytes - stats.host_bytes) // block_size(store)
        turn("from files into new memory", fresh, left)  # which has to be pinned
        read_in([next(fresh) for _ in range(left)])
    numbers = itertools.cycle(in_host)
    for _ in range(2):
        turn(QUIET, None)
        if sizes.device == "cuda":
            read_in(in_host)
            turn("from host memory", numbers)
            turn("from host memory, 100 per second", numbers, rate=100)
        turn("from files", fresh)
        turn("from files, 100 per second", fresh, rate=100)
    return [
        {
            "what": "step", "way": what, "room": room, "requests": sizes.running,
            "ms_p50": round(statistics.median(values) * 1e3, 3), "ms_p90": round(percentile(values, 0.9) * 1e3, 3),
            "of resident": round(statistics.median(values) / statistics.median(gaps[QUIET]), 3),
            "p90 of resident": round(percentile(values, 0.9) / percentile(gaps[QUIET], 0.9), 3),
            "loads_per_s": round(statistics.mean(loaded[what]), 1), "captured": len(captured) - before,
        }
        for what, values in gaps.items()
    ]  # fmt: skip


def plot(records: list[dict], path: Path) -> None:
    figure, (rates, firsts, gaps) = plt.subplots(1, 3, figsize=(14, 4))
    found = [each for each in records if each["what"] == "throughput"]
    for stream in dict.fromkeys(each["stream"] for each in found):
        mine = [each for each in found if each["stream"] == stream and each["way"].startswith("room")]
        rates.plot([each["room"] for each in mine], [each["of resident"] for each in mine], "o-", label=stream)
    rates.axhline(1, color="gray", linestyle=":")
    rates.set(
        xlabel="adapters that fit on the device", ylabel="tokens per second, relative to all resident", ylim=(0, None)
    )
    rates.legend(fontsize=8)
    for axis, what, label in ((firsts, "first token", "ms to the first token"), (gaps, "step", "ms between tokens")):
        mine = [each for each in records if each["what"] == what]
        names = [each["way"] for each in mine]
        axis.barh(names, [each["ms_p90"] for each in mine], color="tab:gray", label="90 %")
        axis.barh(names, [each["ms_p50"] for each in mine], color="tab:orange", label="median", height=0.5)
        axis.invert_yaxis()
        axis.set_xlabel(label)
        axis.legend(fontsize=8)
    commits = ", ".join(dict.fromkeys(each["commit"] for each in records))
    figure.suptitle(f"10,000 adapters, Llama-8B-shaped, 8 layers, {records[0]['gpu']}, commit {commits}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    rooms: str = "",
    rounds: int = 3,
    tiny: bool = typer.Option(False, "--tiny"),
    attention: str = "",
    only: Annotated[str, typer.Option(help="measure only streams whose names start with this")] = "",
    folder: Annotated[Path | None, typer.Option(help="folder for the adapters; by default a temporary one")] = None,
    out: Path = RESULTS / "store_serving.csv",
    commit: str = typer.Option("", help="the measured commit; by default the checkout's"),
) -> None:
    """Measure times to the first token and of steps with room for 64, then throughput for each of ROOMS."""
    count_captures()
    sizes = Sizes(tiny, attention)
    counts = [int(each) for each in (rooms or ("4,8,16" if tiny else "16,64,128")).split(",")]
    begin = time.perf_counter()
    root = Path(tempfile.mkdtemp(dir=folder))
    try:
        write_adapters(sizes, root)
        console.print(f"{sizes.registered} adapters written in {time.perf_counter() - begin:.0f} s")
        model = build(sizes)
        set_attention(model, attention)
        check(sizes, model, root)
        known = {"attention": attention or "sdpa"} | versions(commit)
        records = latency(sizes, model, root, 16 if tiny else 64)
        write([record | known for record in records], out)
        if rounds:
            records = throughput(sizes, model, root, counts, rounds, only) + records
            write([record | known for record in records], out, plot)
    finally:
        shutil.rmtree(root)
    console.print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    typer.run(main)
