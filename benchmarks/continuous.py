"""Benchmark continuous batching on a GPU: requests for many adapters, against the base model and one at a time.

    python benchmarks/continuous.py                    # results/continuous.csv and .png beside this script
    python benchmarks/continuous.py --tiny --layers 2      # a tiny model on a CPU, to see it run

The model has the shape of Llama 8B with 8 of its 32 layers, random weights in bfloat16, and adapters of rank 16 on all
seven projections; prompts have 16 to 256 tokens, answers 64. transformers' own continuous batching runs the base
model, and the model with one adapter at a time. All methods have the same settings, including a cache of the size they
need, and run the same requests until a round captures no CUDA graph; that round and later ones are timed. With
``--attention flash_attention_3`` the base model is as fast as users get it.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import matplotlib
import torch
import typer
from end_to_end import DEVICE, TINY, build, enabled, versions, write
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from peft_multibatch.layers.fusion import Fuse


matplotlib.use("Agg")
import matplotlib.pyplot as plt


RESULTS = Path(__file__).parent / "results"
BASE, OURS, ALONE = "base", "peft_multibatch", "one adapter at a time"
console = Console(width=130)


def finish(manager: Any, names: list[str]) -> list[list[int]]:
    """Wait for all requests and return their tokens."""
    found: dict[str, list[int]] = {}
    while len(found) < len(names):
        output = manager.get_result(timeout=5)
        if output is None and not manager.is_running():
            raise SystemExit("the loop ended before all requests had finished")
        if output is not None and output.is_finished():
            if output.error:
                raise SystemExit(output.error)
            found[output.request_id] = output.generated_tokens
    return [found[name] for name in names]


captured: list[bool] = []  # one entry per CUDA graph


def count_captures() -> None:
    """Add an entry to ``captured`` for every graph from now on."""
    if not torch.cuda.is_available():
        return
    begin = torch.cuda.CUDAGraph.capture_begin

    def counted(graph: torch.cuda.CUDAGraph, *args: Any, **kwargs: Any) -> None:
        captured.append(True)
        begin(graph, *args, **kwargs)

    torch.cuda.CUDAGraph.capture_begin = counted  # type: ignore[method-assign, assignment]


def set_attention(model: Any, name: str) -> None:
    if name:
        model.set_attn_implementation(name)


def without_block_table(attention: str) -> dict[str, int]:
    """Turn off the block table for builds of flash attention without a paged cache."""
    return {"max_blocks_per_request": 0} if attention.startswith("flash") else {}


def timed(session: AbstractContextManager, prompts: list, rounds: int, **ids: Any) -> tuple[dict[str, Any], list]:
    """Return the times of the first and the timed rounds in seconds, the number of graphs captured, and tokens."""
    first, late = 0.0, 0
    times: list[float] = []
    tokens: list[list[int]] = []
    with session as manager:
        while len(times) < rounds:
            before, begin = len(captured), time.perf_counter()
            tokens = finish(manager, manager.add_requests(prompts, **ids))
            took, new = time.perf_counter() - begin, len(captured) - before
            if times or (first and not new):
                times.append(took)
                late += new
            first = first or took
    return {"seconds": statistics.median(times), "times": times, "first": first, "captured": late}, tokens


def one_at_a_time(model: Any, prompts: list, names: list[str], options: Any) -> tuple[dict[str, Any], list]:
    """Run every adapter's requests in a separate session; starting sessions isn't timed."""
    sums: Counter[str] = Counter()
    tokens: dict[int, list[int]] = {}
    for name in track(list(dict.fromkeys(names)), description="one at a time", console=console):
        model.set_adapter(name)
        own = [index for index, each in enumerate(names) if each == name]
        session = model.get_base_model().continuous_batching_context_manager(**options())
        result, found = timed(session, [prompts[index] for index in own], 1)
        sums.update({key: result[key] for key in ("seconds", "first", "captured")})
        tokens |= dict(zip(own, found))
    return {**sums, "times": [sums["seconds"]]}, [tokens[index] for index in range(len(names))]


def plot(records: list[dict], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4))
    for way in (BASE, OURS, ALONE):
        rows = [record for record in records if record["way"] == way]
        axis.plot([row["adapters"] for row in rows], [row["tokens_per_s"] for row in rows], marker="o", label=way)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("adapters among the requests")
    axis.set_ylabel("new tokens per second")
    axis.set_title(
        f"{records[0]['requests']} requests, {records[0]['gpu']}, commit {records[0]['commit']}", fontsize=9
    )
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    layers: int = 8,
    rank: int = 16,
    requests: int = 256,
    new_tokens: int = 64,
    adapters: str = "1,8,32",
    alone: str = "1,8,32",
    rounds: int = 5,
    blocks: int = 128,
    graphs: bool = True,
    asynchronous: bool = True,
    attention: str = "",
    fuse: str = "",
    stored: bool = False,
    tiny: bool = False,
    out: Path = RESULTS / "continuous.csv",
    commit: str = "",
) -> None:
    """Measure throughput for every number of adapters; FUSE="weights" is passed to ``enable``, and STORED registers
    the adapters in a store instead of reading them from PEFT's modules."""
    if DEVICE.type == "cpu":
        graphs = asynchronous = False  # both need a GPU
    count_captures()
    counts = [int(each) for each in adapters.split(",")]
    base, model = build(max(counts), rank, layers, DEVICE, "", **(TINY if tiny else {}))
    for each in (base, model.get_base_model()):
        set_attention(each, attention)
    generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def options() -> dict[str, Any]:
        config = ContinuousBatchingConfig(
            use_cuda_graph=graphs,
            use_async_batching=asynchronous,
            allow_block_sharing=False,
            num_blocks=blocks,
            max_requests_per_batch=64,
            max_batch_tokens=1024,
            **without_block_table(attention),
        )
        return {"generation_config": generation, "continuous_batching_config": config}

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 257, (requests,), generator=generator).tolist()
    prompts = [torch.randint(1, base.config.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    known = versions(commit)
    records: list[dict[str, Any]] = []
    for count in track(counts, description="adapters", console=console):
        # measured again for every number of adapters, because a host's speed varies
        baseline, _ = timed(base.continuous_batching_context_manager(**options()), prompts, rounds)
        names = [f"adapter{index % count}" for index in range(requests)]
        with enabled(model, names, cast(Fuse, fuse or True), stored) as (mb, ids):
            ours, tokens = timed(mb.continuous_batching(**options()), prompts, rounds, adapter_ids=ids)
        ways = {BASE: baseline, OURS: ours}
        if str(count) in alone.split(","):
            ways[ALONE], found = one_at_a_time(model, prompts, names, options)
            same, first = (
                sum(mine[:length] == theirs[:length] for mine, theirs in zip(tokens, found)) / requests
                for length in (new_tokens, 1)
            )
            console.print(f"{count} adapters: {same:.0%} of requests, {first:.0%} of first tokens as one at a time")
            if first < 0.9:  # only ties may differ, which bfloat16 breaks differently in batches of other sizes
                raise SystemExit("too many tokens differ from one adapter at a time, so nothing is reported")
        for way, result in ways.items():
            records.append(
                {"requests": requests, "new_tokens": new_tokens, "blocks": blocks, "adapters": count, "way": way}
                | {"seconds": round(result["seconds"], 3), "first_s": round(result["first"], 3)}
                | {"tokens_per_s": round(requests * new_tokens / result["seconds"])}
                | {"× base": round(baseline["seconds"] / result["seconds"], 3), "captured": result["captured"]}
                | {"graphs": graphs, "async": asynchronous, "attention": attention or "sdpa", "fuse": fuse or "True"}
                | {"stored": stored}
                | known
            )
            times = ", ".join(f"{each:.2f}" for each in result["times"])
            late = f", with {result['captured']} graphs captured" if result["captured"] else ""
            console.print(f"{count} adapters, {way}: {times} s{late}; the first round {result['first']:.2f} s")
        write(records, out, plot)
    table = Table("adapters", "way", "new tokens / s", "of the base model")
    for record in records:
        table.add_row(str(record["adapters"]), record["way"], str(record["tokens_per_s"]), str(record["× base"]))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
