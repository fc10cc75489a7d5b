"""Benchmark mixed `generate` and training on several GPUs: data-parallel efficiency, and the gain of grouping rows.

    python benchmarks/scaling_out.py                   # results/scaling_out.csv and .png beside this script
    python benchmarks/scaling_out.py --processes 1 --tiny    # the same on a CPU in seconds, to see it run

For every number of processes, it starts itself with `accelerate launch`. Every process has a copy of the model of
end_to_end.py and the same number of rows. Mixed batches contain all adapters; grouped, rows are sorted by adapter
before they are batched, as in `accelerate_generate.py --group-by-adapter`. Eager runs are bound by the host; with a
static cache, transformers compiles the decode step, and the GPU is the bottleneck. A training step is that of
`AdapterOptimizer` with AdamW, which sums gradients over all processes, with adapters in float32.

Before anything is timed, tokens of a mixed batch must equal PEFT's, one adapter at a time, in float32; before
training, losses and norms of gradients must match PEFT's over the rows of all processes, to the precision of bfloat16.
A round starts when all processes are ready and ends with the slowest one. The CSV is written after every workload, so
a run that is stopped leaves what it has measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
import typer
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from end_to_end import TINY, llama, versions, with_adapters, write
from rich.console import Console
from rich.table import Table

import peft_multibatch
from peft_multibatch.training import AdapterOptimizer, Run, sample_losses


matplotlib.use("Agg")
import matplotlib.pyplot as plt


RESULTS = Path(__file__).parent / "results"
MIXED, GROUPED, BASE = "mixed", "grouped by adapter", "base model"
CACHES = {"generate, dynamic cache": {}, "generate, static cache": {"cache_implementation": "static"}}
TRAINING = "training step"
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


def say(job: dict[str, Any], state: PartialState, what: str) -> None:
    """Print what begins or has ended, and the time since the benchmark started; only once for all processes."""
    if state.is_main_process:
        console.print(f"{time.time() - job['begin']:5.0f} s, {state.num_processes} × {what}", highlight=False)


def seconds(state: PartialState, run: Callable[[], object]) -> float:
    """Measure the time from when all processes are ready to when the slowest has finished."""
    state.wait_for_everyone()
    begin = time.perf_counter()
    run()
    if state.device.type == "cuda":
        torch.cuda.synchronize()
    return max(gather_object([time.perf_counter() - begin]))


def measure(job: dict[str, Any]) -> None:
    """Run the measurements of one process; the first one writes the records of all."""
    state = PartialState(cpu=not torch.cuda.is_available())
    say(job, state, "model")
    base = llama(job["layers"], state.device, **(TINY if job["tiny"] else {}))
    model = with_adapters(base, max(job["adapters"]), job["rank"])
    torch.manual_seed(state.process_index)
    if any(workload in CACHES for workload in job["workloads"]):
        few = min(8, max(job["adapters"]))
        say(job, state, f"tokens of {few} adapters against PEFT's")
        prompts = torch.randint(1, base.config.vocab_size, (few, job["prompt_tokens"]), device=state.device)
        with torch.no_grad():
            check(model, prompts, [f"adapter{row}" for row in range(few)])
    records = list(job["records"])
    for workload in job["workloads"]:
        for count in job["adapters"]:
            say(job, state, f"{workload}, adapters: {count}")
            if workload == TRAINING:
                records.append(train(job, state, model, count))
            else:
                records += generate(job, state, model, workload, count)
            if state.is_main_process:
                save(records, job)
    state.destroy_process_group()
    say(job, state, "done")


def save(records: list[dict[str, Any]], job: dict[str, Any]) -> None:
    """Write everything measured so far: the CSV, the plot, and what `launch` returns."""
    known = versions(job["commit"])
    write([record | known for record in compared(records)], Path(job["out"]), plot)
    Path(job["found"]).write_text(json.dumps(records))


def compared(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the tokens per second of a process relative to those with the first number of processes."""
    first: dict[tuple[str, int, str], float] = {}
    found = []
    for record in records:
        each = record["tokens_per_s"] / record["processes"]
        reference = first.setdefault((record["workload"], record["adapters"], record["way"]), each)
        found.append(record | {"efficiency": round(each / reference, 3)})
    return found


@torch.no_grad()
def generate(job: dict[str, Any], state: PartialState, model: Any, workload: str, count: int) -> list[dict[str, Any]]:
    """Measure `generate` with mixed and grouped rows, and with the base model."""
    prompts = torch.randint(1, model.config.vocab_size, (job["rows"], job["prompt_tokens"]), device=state.device)
    peft_multibatch.enable(model)
    options = CACHES[workload] | {"max_new_tokens": job["new_tokens"], "do_sample": False}
    names = [f"adapter{row % count}" for row in range(job["rows"])]
    ways = {MIXED: names, GROUPED: sorted(names), BASE: ["__base__"] * len(names)}
    parts = [slice(start, start + job["batch"]) for start in range(0, len(names), job["batch"])]

    def run(ids: list[str], some: list[slice]) -> None:
        for part in some:
            model.generate(input_ids=prompts[part], adapter_ids=ids[part], **options)

    for way, ids in ways.items():
        took = seconds(state, partial(run, ids, parts[:1]))
        say(job, state, f"warm-up, {way}: {took:.2f} s for a batch")
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(job["rounds"]):
        for way, ids in ways.items():
            times[way].append(seconds(state, partial(run, ids, parts)))
        found = ", ".join(f"{way} {each[-1]:.2f} s" for way, each in times.items())
        say(job, state, f"round {number + 1} of {job['rounds']}: {found}")
    peft_multibatch.disable(model)
    tokens = state.num_processes * job["rows"] * job["new_tokens"]
    return [
        {
            "processes": state.num_processes,
            "workload": workload,
            "adapters": count,
            "way": way,
            "adapters_per_batch": round(statistics.mean(len(set(ids[part])) for part in parts), 1),
            "tokens_per_s": round(tokens / statistics.median(times[way]), 1),
            "× mixed": round(statistics.median(m / t for m, t in zip(times[MIXED], times[way])), 3),
        }
        for way, ids in ways.items()
    ]


def train(job: dict[str, Any], state: PartialState, model: Any, count: int) -> dict[str, Any]:
    """Measure steps of an optimizer for all adapters, each of which has rows in every process."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    ids = torch.randint(1, model.config.vocab_size, (job["batch"], job["training_tokens"]), device=state.device)
    names = [f"adapter{row % count}" for row in range(job["batch"])]
    adapters = list(dict.fromkeys(names))
    expected = {name: alone(model, ids[[each == name for each in names]], name) for name in adapters}
    say(job, state, "losses and gradients of PEFT, one adapter at a time, computed")
    peft_multibatch.enable(model)
    with AdapterOptimizer(model, {name: Run(lr=1e-4) for name in adapters}) as optimizer:

        def step() -> dict[str, dict[str, float]]:
            losses, items = sample_losses(model(ids, adapter_ids=names, use_cache=False).logits, ids)
            optimizer.loss(losses, items, names).backward()
            return optimizer.step()

        for name, found in step().items():
            ours, theirs = (found["loss"], found["grad_norm"]), expected[name]
            if not all(abs(mine - peft) < 0.05 * peft for mine, peft in zip(ours, theirs)):
                raise SystemExit(f"{name}: loss and norm {ours} differ from PEFT's {theirs}. Nothing is timed.")
        times = [seconds(state, step) for _ in range(5 * job["rounds"])]
        say(job, state, f"{len(times)} steps: {sum(times):.2f} s")
    weights = [each.detach() for key, each in model.named_parameters() if "lora_" in key]
    sums = torch.stack([each.double().sum() for each in weights]).tolist()
    if any(each != sums for each in gather_object([sums])):
        raise SystemExit("processes ended with different weights.")
    say(job, state, "the weights are the same in all processes")
    peft_multibatch.disable(model)
    return {
        "processes": state.num_processes,
        "workload": TRAINING,
        "adapters": count,
        "way": MIXED,
        "adapters_per_batch": len(adapters),
        "tokens_per_s": round(state.num_processes * ids.numel() / statistics.median(times), 1),
        "× mixed": 1.0,
    }


def alone(model: Any, ids: torch.Tensor, name: str) -> tuple[float, float]:
    """PEFT's loss per token and norm of the gradient for one adapter, over its rows in all processes."""
    model.set_adapter(name)
    losses, items = sample_losses(model(ids, use_cache=False).logits, ids)
    losses.sum().backward()
    loss, number = (reduce(each.detach().float().sum()) for each in (losses, items))
    gradients = [reduce(each.grad) for each in model.parameters() if each.grad is not None]
    model.zero_grad()
    return float(loss / number), float(torch.nn.utils.get_total_norm(gradients) / number)


def launch(processes: int, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the measurements with a number of processes, and return all records so far."""
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
    labels = [f"{each['processes']} × {each['way']}, {each['workload']}" for each in records]
    axis.barh(labels, [each["tokens_per_s"] for each in records])
    axis.set_xlabel("new tokens per second, all processes")
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    processes: str = "1,2",
    adapters: str = "32",
    workloads: str = ";".join([*CACHES, TRAINING]),
    rows: int = 512,
    batch: int = 32,
    prompt_tokens: int = 128,
    training_tokens: int = 256,
    new_tokens: int = 32,
    rounds: int = 3,
    rank: int = 16,
    layers: int = 8,
    tiny: bool = False,
    out: Path = RESULTS / "scaling_out.csv",
    commit: str = "",
) -> None:
    """Measure every number of PROCESSES and compare them with the first one."""
    job: dict[str, Any] = {
        "begin": time.time(),
        "out": str(out),
        "commit": commit,
        "adapters": [int(count) for count in adapters.split(",")],
        "workloads": workloads.split(";"),
        "rows": rows,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "training_tokens": training_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "rank": rank,
        "layers": layers,
        "tiny": tiny,
    }
    records: list[dict[str, Any]] = []
    for number in map(int, processes.split(",")):
        records = launch(number, job | {"records": records})
    table = Table(*compared(records)[0])
    for record in compared(records):
        table.add_row(*map(str, record.values()))
    console.print(table)


if __name__ == "__main__":
    if "SCALING_OUT_JOB" in os.environ:  # started by `launch`
        measure(json.loads(os.environ["SCALING_OUT_JOB"]))
    else:
        typer.run(main)
