"""Benchmark mixed `generate` on several GPUs: data-parallel efficiency, and the gain of grouping rows by adapter.

    python benchmarks/scaling_out.py                   # results/scaling_out.csv and .png beside this script
    python benchmarks/scaling_out.py --processes 1 --tiny    # the same on a CPU in seconds, to see it run

For every number of processes, it starts itself with `accelerate launch`. Every process has a copy of the model of
end_to_end.py and the same number of rows. Mixed batches contain all adapters; grouped, rows are sorted by adapter
before they are batched, as in `accelerate_generate.py --group-by-adapter`. Eager runs are bound by the host; with a
static cache, transformers compiles the decode step, and the GPU is the bottleneck. Before anything is timed, tokens of
a mixed batch must equal PEFT's, one adapter at a time, in float32. A round starts when all processes are ready and
ends with the slowest one.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
import typer
from accelerate import PartialState
from accelerate.utils import gather_object
from end_to_end import build, versions, write
from rich.console import Console
from rich.table import Table

import peft_multibatch


matplotlib.use("Agg")
import matplotlib.pyplot as plt


RESULTS = Path(__file__).parent / "results"
MIXED, GROUPED, BASE = "mixed", "grouped by adapter", "base model"
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 999,
}
console = Console(width=130)


def check(model: Any, prompts: torch.Tensor, names: list[str], new_tokens: int = 8) -> None:
    """Compare tokens of a mixed batch with PEFT's, one adapter at a time, in float32."""
    dtype = model.dtype
    model.float()
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    peft_multibatch.enable(model)
    mixed = model.generate(input_ids=prompts, adapter_ids=names, **options)
    peft_multibatch.disable(model)
    for row, name in enumerate(names):
        model.set_adapter(name)
        if not torch.equal(model.generate(input_ids=prompts[row : row + 1], **options)[0], mixed[row]):
            raise SystemExit(f"row {row}, {name}: tokens differ from PEFT's. Nothing is timed.")
    if len({tuple(row) for row in mixed[:, prompts.shape[1] :].tolist()}) == 1:
        raise SystemExit("all rows have the same tokens, so the comparison proves nothing. Nothing is timed.")
    model.to(dtype)


def seconds(state: PartialState, model: Any, batches: list[tuple[torch.Tensor, Any]], **options: Any) -> float:
    """Measure the time from when all processes are ready to when the slowest has finished."""
    state.wait_for_everyone()
    begin = time.perf_counter()
    for prompts, ids in batches:
        model.generate(input_ids=prompts, adapter_ids=ids, do_sample=False, **options)
    if state.device.type == "cuda":
        torch.cuda.synchronize()
    return max(gather_object([time.perf_counter() - begin]))


@torch.inference_mode()
def measure(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the measurements of one process; all return the same records."""
    state = PartialState(cpu=not torch.cuda.is_available())
    sizes = TINY if job["tiny"] else {}
    counts = job["adapters"]
    model = build(max(counts), job["rank"], job["layers"], state.device, **sizes)[1]
    torch.manual_seed(state.process_index)
    prompts = torch.randint(1, model.config.vocab_size, (job["rows"], job["prompt_tokens"]), device=state.device)
    few = min(8, *counts)
    check(model, prompts[:few], [f"adapter{row}" for row in range(few)])
    peft_multibatch.enable(model)

    records = []
    for cache, count in itertools.product(job["caches"], counts):
        options = CACHES[cache] | {"max_new_tokens": job["new_tokens"]}
        names = [f"adapter{row % count}" for row in range(job["rows"])]
        orders = {MIXED: names, GROUPED: sorted(names), BASE: ["__base__"] * len(names)}
        ways = {}
        for way, ids in orders.items():
            starts = range(0, len(ids), job["batch"])
            parts = [slice(start, start + job["batch"]) for start in starts]
            ways[way] = [(prompts[part], ids[part]) for part in parts]
            seconds(state, model, ways[way][:1], **options)  # warm-up
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(job["rounds"]):
            for way, batches in ways.items():
                times[way].append(seconds(state, model, batches, **options))
        tokens = state.num_processes * job["rows"] * job["new_tokens"]
        for way, batches in ways.items():
            records.append(
                {
                    "processes": state.num_processes,
                    "cache": cache,
                    "adapters": count,
                    "way": way,
                    "adapters_per_batch": round(statistics.mean(len(set(ids)) for _, ids in batches), 1),
                    "tokens_per_s": round(tokens / statistics.median(times[way]), 1),
                    "× mixed": round(statistics.median(m / t for m, t in zip(times[MIXED], times[way])), 3),
                }
            )
    state.destroy_process_group()
    return records


def launch(processes: int, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of a separate run with a number of processes."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "records.json"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        command += [
            "--num_machines",
            "1",
            "--main_process_port",
            "0",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
        ]
        command += ["--multi_gpu"] if processes > 1 else []
        environment = os.environ | {"SCALING_OUT_JOB": json.dumps(job | {"found": str(found)})}
        subprocess.run([*command, __file__], check=True, env=environment)
        return json.loads(found.read_text())


def plot(records: list[dict], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4))
    labels = [f"{each['processes']} × {each['way']}, {each['cache']} cache" for each in records]
    axis.barh(labels, [each["tokens_per_s"] for each in records])
    axis.set_xlabel("new tokens per second, all processes")
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    processes: str = "1,2",
    adapters: str = "32",
    caches: str = "dynamic,static",
    rows: int = 512,
    batch: int = 32,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    rounds: int = 3,
    rank: int = 16,
    layers: int = 8,
    tiny: bool = False,
    out: Path = RESULTS / "scaling_out.csv",
    commit: str = "",
) -> None:
    """Measure every number of PROCESSES and compare them with the first one."""
    job = {
        "adapters": [int(count) for count in adapters.split(",")],
        "caches": caches.split(","),
        "rows": rows,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "rank": rank,
        "layers": layers,
        "tiny": tiny,
    }
    records: list[dict[str, Any]] = []
    alone: dict[tuple[str, int, str], float] = {}
    for number in map(int, processes.split(",")):
        for record in launch(number, job):
            each = record["tokens_per_s"] / number
            first = alone.setdefault((record["cache"], record["adapters"], record["way"]), each)
            records.append(record | {"efficiency": round(each / first, 3)})
        write([record | versions(commit) for record in records], out, plot)
    table = Table(*records[0])
    for record in records:
        table.add_row(*map(str, record.values()))
    console.print(table)


if __name__ == "__main__":
    if "SCALING_OUT_JOB" in os.environ:  # started by `launch`
        job = json.loads(os.environ["SCALING_OUT_JOB"])
        found = measure(job)
        if int(os.environ.get("RANK", 0)) == 0:
            Path(job["found"]).write_text(json.dumps(found))
    else:
        typer.run(main)
