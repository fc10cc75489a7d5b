"""Benchmark an adapter store on a CPU: registering thousands, entering a call, the first use of an adapter, memory.

It takes some minutes.

    python benchmarks/store.py                                  # results/store.csv and .png beside this script
    python benchmarks/store.py --count 1000 --present 1,10      # in about a minute

The model is a Llama with four layers and a hidden size of 192, in float32; adapters have rank 8 on all seven
projections (0.6 MB). Their folders are hard links to 50 different ones, with one configuration. Measurements:

- ``register``: ``store.register_folder`` of all of them, per adapter, and Python's memory for them afterwards
  (``tracemalloc``, in a separate run).
- ``register_different``: the same for as many adapters with ``--configurations`` different configurations: ranks from
  1 to 20, each with many alphas. Their weights are hard links to one file for each rank.
- ``enter``: entering and leaving ``mb.batch(ids)`` with eight adapters in memory, with 10 and with all registered,
  alternately; the ratio is the median over rounds.
- ``cold``: the first use of an adapter that isn't in memory, until its weights are loaded, into memory that was used
  before.
- ``load_adapter``: the same for PEFT's ``load_adapter``, with the same files, in a model with ``--present`` other
  adapters; these are added in the quick way of registry.py, because PEFT would take an hour. Both are timed
  alternately, by wall-clock and by CPU time of all threads, and ratios are medians over rounds.
- ``memory``: four threads run batches with four of these different adapters, and prefetch others, in a store with
  16 MB, so that adapters are loaded and evicted all the time. ``largest_of_limit`` is the largest number of bytes in
  ``store.stats()``, free blocks included, over the limit, in as many samples as the column says.
  ``allocated_of_limit`` is the peak of all that Python and NumPy allocated meanwhile (``tracemalloc``), over the same
  limit. It depends neither on the store's counters nor on samples, but Python's objects count as well.

Before anything is timed, rows of a mixed batch must equal those of PEFT's ``load_adapter``, one adapter at a time.
benchmarks/store_serving.py does the same for requests on a GPU.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import matplotlib
import torch
import typer
from end_to_end import PROJECTIONS, versions, write
from peft import LoraConfig, PeftModel, get_peft_model
from registry import register as register_quickly
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import peft_multibatch
from peft_multibatch import AdapterStore, Multibatch


matplotlib.use("Agg")
import matplotlib.pyplot as plt


RESULTS = Path(__file__).parent / "results"
SIZES = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
}
DIFFERENT = 50
RANKS = 20
THREADS, ROWS, ROOM = 4, 4, 16_000_000
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def make_folder(root: Path, count: int) -> None:
    """Write the folders of adapters, most of them as hard links."""
    config = LoraConfig(r=8, target_modules=PROJECTIONS, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base_model(), config).save_pretrained(str(root / "0"))
    tensors = load_file(root / "0" / WEIGHTS)
    for number in range(1, count):
        folder = root / str(number)
        folder.mkdir()
        if number < DIFFERENT:
            shutil.copy(root / "0" / CONFIG, folder / CONFIG)
            save_file({key: torch.randn_like(each) * 0.1 for key, each in tensors.items()}, folder / WEIGHTS)
        else:
            for file in (CONFIG, WEIGHTS):
                os.link(root / str(number % DIFFERENT) / file, folder / file)


def make_different_folder(root: Path, count: int, configurations: int) -> None:
    """Write the folders of adapters with different ranks and alphas, with hard links to one weights file per rank."""
    for number in range(count):
        folder, kind = root / str(number), number % configurations
        alpha, same_rank = 1 + kind // RANKS, root / str(kind % RANKS)
        if folder == same_rank:
            config = LoraConfig(r=1 + number, lora_alpha=alpha, target_modules=PROJECTIONS, init_lora_weights=False)
            get_peft_model(base_model(), config).save_pretrained(str(folder))
            continue
        folder.mkdir()
        os.link(same_rank / WEIGHTS, folder / WEIGHTS)
        if number < configurations:
            values = json.loads((same_rank / CONFIG).read_text()) | {"lora_alpha": alpha}
            (folder / CONFIG).write_text(json.dumps(values))
        else:
            os.link(root / str(kind) / CONFIG, folder / CONFIG)


def make_store(max_host_memory: int | str = "1GB") -> tuple[LlamaForCausalLM, Multibatch, AdapterStore]:
    model = base_model()
    mb = peft_multibatch.enable(model)
    return model, mb, mb.adapter_store(max_host_memory=max_host_memory)


@torch.no_grad()
def check(root: Path) -> None:
    """Compare rows of a mixed batch with PEFT's."""
    model, _, store = make_store()
    store.register_folder(root)
    names = ["3", "__base__", "7", "3"]
    inputs = torch.randint(160, (4, 12))
    actual = model(inputs, adapter_ids=names).logits
    for row, name in enumerate(names):
        reference = base_model()
        if name != "__base__":
            reference = PeftModel.from_pretrained(reference, str(root / name)).eval()
        expected = reference(inputs[row : row + 1]).logits[0]
        error = float((actual[row] - expected).norm() / expected.norm())
        if error > 1e-5:
            raise SystemExit(f"row {row} under {name} differs from PEFT's by {error:.1e}")


def register(what: str, root: Path, count: int, rounds: int) -> dict:
    times = []
    for _ in range(rounds):
        _, _, store = make_store()
        begin = time.perf_counter()
        found = store.register_folder(root)
        times.append(time.perf_counter() - begin)
        assert len(found.names) == count
    _, _, store = make_store()
    tracemalloc.start()
    found = store.register_folder(root)
    del found
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return {
        "what": what, "registered": count, "seconds": round(min(times), 3),
        "us_p50": round(statistics.median(times) / count * 1e6, 1), "python_mb": round(memory / 1e6, 2),
    }  # fmt: skip


def enter(root: Path, count: int, rounds: int, samples: int) -> list[dict]:
    few, many = make_store(), make_store()
    for number in range(10):
        few[2].register(str(number), root / str(number))
    many[2].register_folder(root)
    names = [str(number) for number in range(8)]
    times: dict[int, list[float]] = {10: [], count: []}
    with torch.no_grad():
        for _ in range(rounds):
            for registered, (_, mb, _) in ((10, few), (count, many)):
                taken = []
                for _ in range(samples):
                    begin = time.perf_counter()
                    with mb.batch(names):
                        pass
                    taken.append(time.perf_counter() - begin)
                times[registered].append(statistics.median(taken))
    ratios = [after / before for before, after in zip(times[10], times[count])]
    return [
        {"what": "enter", "registered": registered, "us_p50": round(statistics.median(found) * 1e6, 1),
         "ratio": round(statistics.median(ratios), 3) if registered != 10 else 1.0}
        for registered, found in times.items()
    ]  # fmt: skip


def cold(root: Path, count: int, present: list[int], samples: int, rounds: int) -> list[dict]:
    _, mb, store = make_store("10MB")  # room for a few adapters
    store.register_folder(root)
    ids = iter(random.Random(0).sample(range(count), min(count, samples + 20 + rounds * len(present) * 20)))

    def timed(run: Callable[[], object]) -> tuple[float, float]:
        """Measure wall-clock time and CPU time of all threads, in seconds."""
        begin, cpu = time.perf_counter(), time.process_time()
        run()
        return time.perf_counter() - begin, time.process_time() - cpu

    def ours(number: int) -> list[tuple[float, float]]:
        return [timed(partial(store.adapters, [each])) for each in itertools.islice(ids, number)]

    def medians(taken: list[tuple[float, float]]) -> tuple[float, float]:
        return statistics.median(each[0] for each in taken), statistics.median(each[1] for each in taken)

    def record(what: str, registered: int, taken: list[tuple[float, float]]) -> dict:
        clock, cpu = (round(each * 1e6, 1) for each in medians(taken))
        return {"what": what, "registered": registered, "us_p50": clock, "cpu_us_p50": cpu}

    ours(20)
    taken = ours(samples)
    records = [record("cold", count, taken)]
    model = PeftModel.from_pretrained(base_model(), str(root / "0"), adapter_name="first")
    for number in present:
        known = len(model.peft_config)
        register_quickly(model, [f"a{each}" for each in range(known, number)], model.peft_config["first"])
        found, ratios = [], []
        for each in range(rounds):
            path = str(root / str(each % (DIFFERENT - 1) + 1))
            found.append(timed(partial(model.load_adapter, path, "new")))
            model.delete_adapter("new")
            near = medians(ours(20) or taken)
            ratios.append([theirs / mine for theirs, mine in zip(found[-1], near)])
        clock, cpu = (round(statistics.median(each), 1) for each in zip(*ratios))
        records.append(record("load_adapter", number, found) | {"ratio": clock, "cpu_ratio": cpu})
    mb.disable()
    return records


def under_pressure(root: Path, count: int, batches: int) -> dict:
    """Measure a store's memory while threads need more of it than there is."""
    model, _, store = make_store(ROOM)
    store.register_folder(root)
    inputs = torch.randint(160, (ROWS, 4))

    @torch.no_grad()
    def work(seed: int) -> None:
        numbers = random.Random(seed)
        for _ in range(batches):
            first, *names = [str(numbers.randrange(count)) for _ in range(1 + ROWS)]
            store.prefetch(first)
            model(inputs, adapter_ids=names)

    largest = samples = 0
    tracemalloc.start()
    with ThreadPoolExecutor(THREADS) as threads:
        running = [threads.submit(work, seed) for seed in range(THREADS)]
        while wait(running, timeout=1e-4).not_done:
            stats = store.stats()
            largest = max(largest, stats.host_bytes + stats.host_bytes_kept)
            samples += 1
    allocated = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for each in running:
        each.result()
    stats = store.stats()
    return {
        "what": "memory", "registered": count, "loads": stats.loads, "evictions": stats.evictions, "samples": samples,
        "largest_of_limit": round(largest / ROOM, 5), "allocated_of_limit": round(allocated / ROOM, 5),
    }  # fmt: skip


def plot(records: list[dict], path: Path) -> None:
    """Plot times by number of adapters."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for what, label in (
        ("load_adapter", "PEFT's load_adapter, by adapters present"),
        ("cold", "store: first use of an adapter, by adapters registered"),
        ("register", "store: registering an adapter"),
        ("enter", "store: entering a batch of 8 adapters in memory"),
    ):
        found = [record for record in records if record["what"] == what]
        times = [each.get("cpu_us_p50") or each["us_p50"] for each in found]
        axis.plot([each["registered"] for each in found], [each / 1e3 for each in times], "o-", label=label)
    axis.set(xscale="log", yscale="log", xlabel="adapters", ylabel="ms (median), of the CPU where it was counted")
    axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(alpha=0.3)
    axis.set_title(f"Adapters of 0.6 MB, one CPU thread, commit {records[0]['commit']}", fontsize=9)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    count: int = 10_000,
    configurations: int = typer.Option(1000, help="number of different ones for register_different"),
    rounds: int = 5,
    samples: int = 200,
    present: str = typer.Option("1,100,1000", help="numbers of adapters in the model when PEFT loads another one"),
    loads: int = typer.Option(5, help="how often PEFT loads one"),
    commit: str = typer.Option("", help="the measured commit; by default the checkout's"),
    out: Path = RESULTS / "store.csv",
) -> None:
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp())
    same, different = root / "same", root / "different"
    try:
        make_folder(same, count)
        make_different_folder(different, count, configurations)
        check(same)
        check(different)
        records = [register("register", same, count, rounds), *enter(same, count, rounds, samples)]
        records += cold(same, count, [int(each) for each in present.split(",")], samples, loads)
        records.append(register("register_different", different, count, rounds) | {"configurations": configurations})
        records.append(under_pressure(different, count, samples))
    finally:
        shutil.rmtree(root)
    shared = {"threads": torch.get_num_threads(), **versions(commit)}
    write([record | shared for record in records], out, plot)
    for record in records:
        Console().print(record)


if __name__ == "__main__":
    typer.run(main)
