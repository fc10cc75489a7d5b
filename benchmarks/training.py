"""Benchmark a training step of many adapters against PEFT, with one adapter for the whole batch and one at a time.

    python benchmarks/training.py                      # on a GPU: results/training.csv and .png beside this script
    python benchmarks/training.py --device cpu         # results/training_cpu.csv; with OMP_NUM_THREADS=1 by CPU time
    python benchmarks/training.py --dropout 0.1 --out benchmarks/results/training_dropout.csv

The model has the shape of Llama 8B with 8 of its 32 layers and random weights in bfloat16 (on a CPU: hidden size 512,
float32). Adapters have rank 16 on all seven projections, in float32, PEFT's default, or in the base model's dtype. A
step is forward, loss and backward; the optimizer's work is the same for all methods, and so is the loss, which
``sample_losses`` computes. The base model alone, with gradients of its inputs, shows what any method has to spend on
the batch: relative to one adapter at a time, this is the time that adapters without any cost would take. Before
anything is timed, the gradients of the mixed step must match PEFT's, one adapter at a time; with dropout, in eval
mode.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from end_to_end import PROJECTIONS, RESULTS, console, versions, write
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import peft_multibatch
from peft_multibatch.training import sample_losses


matplotlib.use("Agg")
import matplotlib.pyplot as plt


OURS, ONE, ALONE = "peft_multibatch, mixed", "PEFT, one adapter", "PEFT, one at a time"
BASE = "base model"
SIZES = {
    "cuda": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
             "vocab_size": 128256},
    "cpu": {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 8,
            "vocab_size": 32000},
}  # fmt: skip
POINTS = {"cuda": "8:1:512,32:1:256,8:4:512", "cpu": "8:1:64,8:2:32,16:1:32,4:4:64,2:1:128,8:1:16"}


class Steps:
    """The methods of training a batch with several adapters.

    Args:
        model: a model with at least this many adapters, ``adapter0`` and so on.
        adapters: number of adapters in the batch.
        rows: number of samples per adapter.
        tokens: number of tokens per sample.
    """

    def __init__(self, model: PeftModel, adapters: int, rows: int, tokens: int) -> None:
        self.model, self.device = model, model.device
        self.adapters = [f"adapter{index}" for index in range(adapters)]
        self.names = [name for name in self.adapters for _ in range(rows)]
        self.ids = torch.randint(1, model.config.vocab_size, (adapters * rows, tokens), device=self.device)
        self._rows = rows

    def loss(self, ids: Tensor, **inputs: Any) -> Tensor:
        """Compute the loss, summed over tokens so that an adapter's gradients don't depend on the others."""
        inputs = inputs if "inputs_embeds" in inputs else {"input_ids": ids, **inputs}
        losses, _ = sample_losses(self.model(use_cache=False, **inputs).logits, ids)
        return losses.sum() / (len(ids[0]) * self._rows)

    def mixed(self, names: list[str] | None = None) -> None:
        self.loss(self.ids, adapter_ids=names or self.names).backward()

    def one(self) -> None:
        self.loss(self.ids).backward()

    def alone(self, index: int) -> None:
        self.loss(self.ids[index * self._rows : (index + 1) * self._rows]).backward()

    def base(self) -> None:
        embeddings = self.model.get_input_embeddings()(self.ids).detach().requires_grad_()
        self.loss(self.ids, inputs_embeds=embeddings).backward()

    def ready(self, way: str) -> list[Callable[[], None]]:
        """Prepare the model for a method, and return the method's steps.

        With one adapter at a time there is a step per adapter; ``seconds`` activates it before and doesn't time that,
        because separate runs wouldn't have to.
        """
        peft_multibatch.disable(self.model)
        self.model.base_model.enable_adapter_layers()
        if way == BASE:
            self.model.base_model.disable_adapter_layers()
            return [self.base]
        if way == OURS:
            peft_multibatch.enable(self.model)
            self.model.set_requires_grad(self.adapters)
            return [self.mixed]
        self.model.set_adapter("adapter0")
        return [self.one] if way == ONE else [partial(self.alone, index) for index in range(len(self.adapters))]

    def clear(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def gradients(self, way: str) -> Tensor:
        steps = self.ready(way)
        self.clear()
        self.seconds(steps)
        found = [p.grad.float().cpu().flatten() for p in self.model.parameters() if p.grad is not None]
        self.clear()
        return torch.cat(found)

    def seconds(self, steps: list[Callable[[], None]]) -> float:
        """Run steps and return their time in seconds; gradients stay until the next call."""
        self.clear()
        is_alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if is_alone else time.perf_counter
        total = 0.0
        for step, name in zip(steps, self.adapters):
            if len(steps) > 1:
                self.model.set_adapter(name)
            self._wait()
            begin = clock()
            step()
            self._wait()
            total += clock() - begin
        return total

    def peak(self, steps: list[Callable[[], None]]) -> float:
        """Measure the memory that a step adds, in GB."""
        self.clear()
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.seconds(steps)
        found = (torch.cuda.max_memory_allocated() - before) / 1e9
        self.clear()
        return found

    def launches(self, names: list[str]) -> int:
        """Count kernels and copies of a mixed step, which starts without gradients, like timed steps."""
        self.mixed(names)
        self.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.mixed(names)
            torch.cuda.synchronize()
        self.clear()
        return sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def build(
    num_adapters: int, rank: int, layers: int, device: str, dtype: torch.dtype, is_float32: bool, dropout: float
) -> PeftModel:
    """Build a model with adapters at the scale of trained ones, in float32 or in the base model's dtype."""
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, eos_token_id=None, pad_token_id=0, **SIZES[device])
    with torch.device(device):
        torch.set_default_dtype(dtype)
        base = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        lora = LoraConfig(
            r=rank, lora_dropout=dropout, target_modules=PROJECTIONS, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = get_peft_model(base, lora, adapter_name="adapter0", autocast_adapter_dtype=is_float32)
        for index in track(range(1, num_adapters), description="adding adapters", console=console):
            model.add_adapter(f"adapter{index}", lora, autocast_adapter_dtype=is_float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.1)
    return model.train()


def measure(steps: Steps, rounds: int, repeats: int) -> dict[str, float | str]:
    """Return times in milliseconds and median ratios within rounds; every round runs each method once."""
    times: dict[str, list[float]] = {way: [] for way in (OURS, ONE, ALONE, BASE)}
    found: dict[str, float | str] = {}
    for number in track(range(rounds + 1), description="rounds", console=console):
        for way in list(times):
            try:
                parts = steps.ready(way)
                steps.seconds(parts)
                took = statistics.median(steps.seconds(parts) for _ in range(repeats))
                if not number and steps.device.type == "cuda":
                    found[f"{way}, GB"] = round(steps.peak(parts), 3)
            except torch.cuda.OutOfMemoryError:
                found[f"{way}, ms"] = "out of memory"
                del times[way]
                steps.clear()
                continue
            if number:
                times[way].append(1e3 * took)
    found |= {f"{way}, ms": round(statistics.median(took), 2) for way, took in times.items()}
    ratios = [(OURS, ONE, "× one adapter"), (OURS, ALONE, "× one at a time"), (BASE, ALONE, "base × one at a time")]
    for way, other, column in ratios:
        if way in times and other in times:
            ratio = statistics.median(mine / theirs for mine, theirs in zip(times[way], times[other]))
            found[column] = round(ratio, 3)
    return found


def plot(records: list[dict], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(9, 1 + 0.9 * len(records)), layout="constrained")
    for offset, way in enumerate((OURS, ONE, ALONE)):
        values = [record.get(f"{way}, ms") for record in records]
        heights = [index + 0.27 * (offset - 1) for index in range(len(records))]
        axis.barh(heights, [value if isinstance(value, float) else 0 for value in values], 0.25, label=way)
    axis.set_yticks(range(len(records)), [f"{record['point']}, {record['adapter dtype']}" for record in records])
    axis.set(xscale="log", xlabel="ms for forward and backward", ylabel="adapters:rows:tokens, adapters in")
    axis.invert_yaxis()
    axis.legend()
    figure.savefig(path, dpi=120)


def main(
    device: str = "cuda",
    layers: int = 8,
    rank: int = 16,
    points: str = "",
    dtypes: str = "",
    rounds: int = 5,
    repeats: int = 3,
    dropout: float = 0.0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="the CSV; the plot is written next to it", show_default="results/training.csv, or training_cpu.csv"
        ),
    ] = None,
    commit: str = "",
) -> None:
    """Measure every point ADAPTERS:ROWS:TOKENS, with adapters in float32 and in the base model's dtype."""
    out = out or RESULTS / ("training.csv" if device == "cuda" else "training_cpu.csv")
    sizes = [tuple(map(int, point.split(":"))) for point in (points or POINTS[device]).split(",")]
    base_dtype = torch.bfloat16 if device == "cuda" else torch.float32
    known, records = versions(commit), []
    for dtype in (dtypes or ("float32,bfloat16" if device == "cuda" else "float32")).split(","):
        model = build(max(size[0] for size in sizes), rank, layers, device, base_dtype, dtype == "float32", dropout)
        for adapters, rows, tokens in sizes:
            torch.manual_seed(1)
            steps = Steps(model, adapters, rows, tokens)
            model.eval()
            theirs, ours = steps.gradients(ALONE), steps.gradients(OURS)
            model.train()
            error = float((ours - theirs).norm() / theirs.norm())
            point = f"{adapters}:{rows}:{tokens}"
            console.print(f"{point}, adapters in {dtype}: error of the gradients against PEFT {error:.2e}")
            if not error < (0.05 if device == "cuda" else 1e-4):
                raise SystemExit("results differ from PEFT, so nothing is timed")
            record = {"point": point, "adapter dtype": dtype} | measure(steps, rounds, repeats)
            if device == "cuda":
                steps.ready(OURS)
                single = steps.launches(["adapter0"] * len(steps.names))
                launches = steps.launches(steps.names)
                record |= {"launches": launches, "launches × one adapter": round(launches / single, 3)}
            records.append(record | {"error": f"{error:.1e}"})
            console.print(record)
            setting = {"layers": layers, "rank": rank, "dropout": dropout, "threads": torch.get_num_threads()}
            write([each | setting | known for each in records], out, plot)
        del model, steps
        gc.collect()
    columns = list(dict.fromkeys(key for record in records for key in record))
    table = Table(*columns)
    for record in records:
        table.add_row(*(str(record.get(column, "")) for column in columns))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
