"""Benchmark the server over HTTP on loopback, against its manager without HTTP, and its memory over time.

    python benchmarks/serving.py                     # on a GPU; results/serving.csv and .png beside this script
    python benchmarks/serving.py --tiny              # a tiny model on a CPU in a minute, to see it run
    python benchmarks/serving.py --soak 10           # minutes; results/serving_soak.csv and .png

The model has the shape of Llama 8B with 8 of its 32 layers, random weights in bfloat16, and 32 adapters of rank 16 on
all seven projections. 64 concurrent requests are greedy and streamed, with prompts of 16 to 256 tokens and answers of
64, for 1, 8 and 32 adapters. Plain continuous batching (`mb.continuous_batching`) and the server's own manager run in
this process; the server's model runs in a second process and the clients in a third, as they would elsewhere. Nothing
is downloaded; the tokenizer is synthetic.
"""

from __future__ import annotations

import asyncio
import json
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
import uvicorn
from continuous import set_attention, without_block_table
from end_to_end import versions, write
from store_serving import Sizes, write_adapters
from store_serving import build as build_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

import peft_multibatch
from peft_multibatch.serve import core as cores
from peft_multibatch.serve.app import build_app
from peft_multibatch.serve.engine import Engine
from peft_multibatch.serve.messages import Order, Output, Target
from peft_multibatch.serve.process import CoreProcess
from peft_multibatch.serve.server import configuration
from peft_multibatch.serve.settings import Settings


matplotlib.use("Agg")
import matplotlib.pyplot as plt


HERE = Path(__file__).parent
MEMORY = ("http_mb", "model_mb", "gpu_mb")
"""Resident memory of both processes, and memory in use on the GPU."""
PLAIN, MANAGER, SERVER = "continuous batching", "manager", "server"


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer of bytes and meaningless words."""
    known = {each: number for number, each in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    known |= {f"Ġw{number}": number for number in range(len(known), vocabulary)}
    tokenizer = Tokenizer(models.BPE(known, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Run:
    """The workload.

    Args:
        is_tiny: whether to use a tiny version for a CPU.
        clients: number of concurrent requests.
        requests: total number of requests.
        attention: as in transformers.
        batching: further options of transformers' ``ContinuousBatchingConfig``.
    """

    def __init__(self, is_tiny: bool, clients: int, requests: int, attention: str, batching: dict[str, Any]) -> None:
        self.sizes = sizes = Sizes(is_tiny, attention)
        batching = without_block_table(attention) | batching
        self.clients, self.requests = clients or (8 if is_tiny else 64), requests or (48 if is_tiny else 256)
        self.tokens, self.longest = (16, 40) if is_tiny else (64, 256)
        sizes.different = sizes.registered = 32
        self.tokenizer = tokenizer_of(sizes.model["vocab_size"])
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(16, self.longest + 1, (self.requests,), generator=generator).tolist()
        most = sizes.model["vocab_size"]
        self.prompts = [torch.randint(0, most, (length,), generator=generator).tolist() for length in lengths]
        self.attention, self.batching = attention, batching

    def load(self) -> tuple[Any, PreTrainedTokenizerFast]:
        """Build the model; in the process that runs it."""
        own, more = cores._batching, self.batching

        def with_more(settings: Settings, device: torch.device) -> Any:
            config = own(settings, device)
            for name, value in more.items():
                setattr(config, name, value)
            return config

        cores._batching = with_more
        model = build_model(self.sizes)
        if self.sizes.is_tiny:
            model = model.float()
        set_attention(model, self.attention)
        return model, self.tokenizer

    def settings(self, root: Path) -> Settings:
        cache = self.clients * (self.longest + self.tokens + 256)
        step = 64 if self.sizes.is_tiny else 1024
        return Settings(adapters_dir=root, max_batch=self.clients, max_queue=self.requests, max_cache_tokens=cache,
                        max_batch_tokens=step, adapter_memory="4GB")  # fmt: skip

    def names(self, count: int) -> list[str]:
        return [str(number % count) for number in range(self.requests)]

    def body(self, number: int, name: str, **options: Any) -> dict[str, Any]:
        plain = {"temperature": 0, "stream": True, "ignore_eos": True, "max_tokens": self.tokens}
        return {"model": name, "prompt": self.prompts[number], **plain, **options}


Result = tuple[list[list[int]], list[float], float]
"""Tokens, times to the first token, and the total time in seconds."""


def timed(run: Run, add: Callable[[int], Any], take: Callable[[], Iterable[tuple[Any, list[int], float]]]) -> Result:
    """Run the requests without HTTP, as many at a time as there are clients.

    Args:
        run: the workload.
        add: adds a request, by number.
        take: waits for answers; returns the number, the tokens and the time of the first token of each.
    """
    left = iter(range(run.requests))
    added: dict[int, float] = {}
    found: dict[int, list[int]] = {}
    firsts: dict[int, float] = {}

    def add_next() -> None:
        for number in left:
            added[number] = time.perf_counter()
            add(number)
            return

    begin = time.perf_counter()
    for _ in range(run.clients):
        add_next()
    while len(found) < run.requests:
        for name, tokens, first in take():
            found[int(name)], firsts[int(name)] = tokens, first - added[int(name)]
            add_next()
    took = time.perf_counter() - begin
    numbers = range(run.requests)
    return [found[number] for number in numbers], [firsts[number] for number in numbers], took


def by_plain(run: Run, manager: Any, names: list[str]) -> Result:
    """Run the requests with plain continuous batching."""

    def add(number: int) -> None:
        manager.add_request(run.prompts[number], number, run.tokens, record_timestamps=True, eos_token_id=-1,
                            adapter_id=names[number])  # fmt: skip

    def take() -> Iterable[tuple[Any, list[int], float]]:
        output = manager.get_result(timeout=60)
        if output is None or output.error:
            raise SystemExit(f"the manager stopped: {output and output.error}")
        return [(output.request_id, output.generated_tokens, output.timestamps[0])]

    return timed(run, add, take)


def by_manager(run: Run, core: cores.Core, names: list[str]) -> Result:
    """Run the requests with the server's manager."""
    outputs: queue.SimpleQueue[list[Output]] = queue.SimpleQueue()
    core.listen(outputs.put)
    targets: dict[str, Target] = {name: asyncio.run(core.find(name)) for name in set(names)}

    def add(number: int) -> None:
        target, prompt = targets[names[number]], run.prompts[number]
        core.add(Order(str(number), "", target, prompt, run.tokens, True, False, False, {}))

    def take() -> Iterable[tuple[Any, list[int], float]]:
        found = outputs.get(timeout=60)
        if errors := [each.error for each in found if each.error]:
            raise SystemExit(f"the manager stopped: {errors[0]}")
        return [(each.name, each.tokens, each.time) for each in found]

    return timed(run, add, take)


@contextmanager
def served(engine: Engine) -> Iterator[int]:
    """Run a server and yield its port."""
    server = uvicorn.Server(configuration(build_app(engine), 0, "127.0.0.1", 0))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def clients(port: int, requests: list[dict], count: int, seconds: float = 0) -> subprocess.Popen:
    """Start clients in a separate process."""
    job = {"host": "127.0.0.1", "port": port, "requests": requests, "clients": count, "seconds": seconds}
    process = subprocess.Popen([sys.executable, HERE / "serving_load.py"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps(job))
    process.stdin.close()
    return process


def by_server(run: Run, port: int, names: list[str]) -> tuple[list[str], list[float], float]:
    """Run the requests over HTTP; returns texts, times to the first chunk and the total time in seconds."""
    requests = [{"body": run.body(number, name)} for number, name in enumerate(names)]
    lines = [json.loads(line) for line in clients(port, requests, run.clients).stdout or ()]
    found = {line["request"]: line for line in lines[:-1]}
    bad = [line for line in found.values() if line["status"] != 200 or not line["whole"]]
    if bad or len(found) != run.requests:
        raise SystemExit(f"{len(found)} of {run.requests} answers came; not successful: {bad[:2]}")
    ordered = [found[number] for number in range(run.requests)]
    return [line["text"] for line in ordered], [line["first"] for line in ordered], lines[-1]["took"]


def throughput(run: Run, root: Path, rounds: int) -> list[dict[str, Any]]:
    """Return a row per method and number of adapters, with the median over rounds."""
    counts, records = (1, 8, 32), []
    expected: dict[tuple[int, str], list[str]] = {}

    def note(way: str, count: int, results: list[tuple]) -> None:
        results = results[1:]  # the first one warms up
        tokens = [each if isinstance(each, str) else run.tokenizer.decode(each) for each in results[-1][0]]
        expected[count, way] = tokens
        first = sorted(each for _, firsts, _ in results for each in firsts)
        seconds = statistics.median(each for *_, each in results)
        same = sum(one == other for one, other in zip(tokens, expected[count, PLAIN])) / run.requests
        record = {"way": way, "adapters": count, "requests": run.requests, "clients": run.clients,
                  "new_tokens": run.tokens, "requests_per_s": run.requests / seconds,
                  "tokens_per_s": run.requests * run.tokens / seconds, "texts_as_plain": same}  # fmt: skip
        quantiles = statistics.quantiles(first, n=100)
        records.append(record | {f"first_token_p{part}": quantiles[part - 1] for part in (50, 95, 99)})
        print({name: round(each, 4) if isinstance(each, float) else each for name, each in records[-1].items()},
              flush=True)  # fmt: skip
        if not run.sizes.is_tiny and model.dtype != torch.float32:
            return  # sums in other batches round differently, and random models have many near-ties
        if same < 1:
            raise SystemExit(f"texts of {way} differ from those of continuous batching for {count} adapters")

    settings = run.settings(root)
    model, tokenizer = run.load()
    mb = peft_multibatch.enable(model)
    mb.adapter_store(max_host_memory="4GB", max_device_memory="4GB", roots=[root]).register_folder(root)
    options = {"generation_config": GenerationConfig(do_sample=False, eos_token_id=-1),
               "continuous_batching_config": cores._batching(settings, model.device)}  # fmt: skip
    with mb.continuous_batching(**options) as manager:
        for count in counts:
            note(PLAIN, count, [by_plain(run, manager, run.names(count)) for _ in range(rounds + 1)])
    mb.disable()
    core, engine = cores.Core(model, tokenizer, settings), Engine(CoreProcess(run.load, settings))
    core.start()
    engine.start()
    with served(engine) as port:
        ways = {MANAGER: lambda names: by_manager(run, core, names),
                SERVER: lambda names: by_server(run, port, names)}  # fmt: skip
        for count in counts:  # registers adapters and captures graphs
            for ask in ways.values():
                ask(run.names(count))
        for count in counts:
            results = [{way: ask(run.names(count)) for way, ask in ways.items()} for _ in range(rounds + 1)]
            for way in ways:
                note(way, count, [each[way] for each in results])
    core.stop()
    return records


def resident(process: int | str) -> float:
    """Return the resident memory of a process in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1000


def soak(run: Run, root: Path, minutes: float) -> list[dict[str, Any]]:
    """Run streams, plain calls and clients that disconnect for some minutes; returns a row every few seconds."""
    core = CoreProcess(run.load, run.settings(root))
    engine = Engine(core)
    engine.start()
    requests = []
    for number, name in enumerate(run.names(32)):
        kind = ("stream", "plain", "leaves", "sampled")[number % 4]
        options = {"temperature": 1, "seed": number, "top_p": 0.9} if kind == "sampled" else {}
        body = run.body(number, name, stream=kind != "plain", **options)
        requests.append({"body": body, "leave_after": 3 if kind == "leaves" else None, "kind": kind})
    records: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()

    def note(seconds: float) -> None:
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        memory = dict(zip(MEMORY, (resident("self"), resident(core.pid or "self"), (total - free) / 1e6)))
        records.append({"seconds": seconds, **memory, **{name: counts[name] for name in names}})

    names = ("sent", "answered", "left", "lost")
    with served(engine) as port:
        process, begin, due = clients(port, requests, run.clients, minutes * 60), time.monotonic(), 0.0
        for line in process.stdout or ():
            found = json.loads(line)
            if "took" in found:
                break
            counts["sent"] += 1
            is_right = found["status"] == 200 and (found["whole"] or found["left"])
            counts[("left" if found["left"] else "answered") if is_right else "lost"] += 1
            if not is_right:
                print(found, flush=True)
            seconds = time.monotonic() - begin
            if seconds >= due:
                due += max(minutes * 60 / 200, 1)
                note(seconds)
        note(time.monotonic() - begin)
        if process.wait():
            raise SystemExit("the clients ended early, see above")
        end = time.monotonic() + 5
        while engine.running and time.monotonic() < end:
            time.sleep(0.05)
        active = asyncio.run(core.state()).active
        held: list[Any] = [engine.running, engine._jobs, engine._places, core._orders, core._calls, range(active)]
    half = records[len(records) // 2 :]  # caches fill during the first half
    growth = {name: half[-1][name] / half[0][name] - 1 for name in MEMORY if half[0][name]}
    print(dict(counts), {name: f"{each:+.2%}" for name, each in growth.items()}, "in the second half", flush=True)
    if counts["lost"] or any(held):
        raise SystemExit(f"requests were lost, or state is left over: {counts}, {[len(each) for each in held]}")
    if any(each > 0.05 for each in growth.values()):
        raise SystemExit(f"memory grows: {growth}")
    return records


def plot(records: list[dict], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for way in (PLAIN, MANAGER, SERVER):
        rows = [record for record in records if record["way"] == way]
        left.plot([row["adapters"] for row in rows], [row["requests_per_s"] for row in rows], marker="o", label=way)
        right.plot([row["adapters"] for row in rows], [row["first_token_p95"] for row in rows], marker="o", label=way)
    left.set_ylabel("requests per second")
    right.set_ylabel("seconds to the first token, 95th percentile")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("adapters among the requests")
    left.legend()
    figure.suptitle(f"{records[0]['clients']} requests at a time, {records[0]['gpu']}, commit {records[0]['commit']}",
                    fontsize=9)  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def plot_soak(records: list[dict], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 4))
    for name in MEMORY:
        if records[-1][name]:
            axis.plot([row["seconds"] / 60 for row in records], [row[name] for row in records], label=name)
    axis.set_ylim(0, 1.2 * max(row[name] for row in records for name in MEMORY))
    axis.set_xlabel("minutes")
    axis.set_ylabel("MB")
    last = records[-1]
    axis.set_title(f"{last['sent']} requests: {last['answered']} answered, {last['left']} left by clients, "
                   f"{last['lost']} lost; GPU: {last['gpu']}, commit {last['commit']}", fontsize=9)  # fmt: skip
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    tiny: Annotated[bool, typer.Option("--tiny")] = False,
    soak_minutes: Annotated[float, typer.Option("--soak", help="minutes of load, instead of throughput")] = 0,
    at_a_time: Annotated[int, typer.Option("--clients", help="number of concurrent requests")] = 0,
    requests: int = 0,
    rounds: int = 3,
    attention: Annotated[str, typer.Option(help="as in transformers, such as flash_attention_3")] = "",
    batching: Annotated[str, typer.Option(help="JSON for transformers' ContinuousBatchingConfig")] = "{}",
    out: Annotated[
        Path | None,
        typer.Option(
            help="the CSV; the plot is written next to it", show_default="results/serving.csv, or serving_soak.csv"
        ),
    ] = None,
    commit: str = "",
) -> None:
    """Measure requests per second and time to the first token, or memory over time."""
    run = Run(tiny, at_a_time, requests, attention, json.loads(batching))
    root = Path(tempfile.mkdtemp())
    try:
        write_adapters(run.sizes, root)
        known = {"attention": attention or "sdpa", "tiny": tiny} | versions(commit)
        if soak_minutes:
            records = soak(run, root, soak_minutes)
            name, draw = "serving_soak.csv", plot_soak
        else:
            records, name, draw = throughput(run, root, rounds), "serving.csv", plot
    finally:
        shutil.rmtree(root)
    write([record | known for record in records], out or HERE / "results" / name, draw)


if __name__ == "__main__":
    typer.run(main)
