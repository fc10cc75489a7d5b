"""Benchmark mixed ``generate`` on a CPU against the base model and PEFT's own mixed batch.

    python benchmarks/generate_cpu.py                      # results/generate_cpu.csv and .png beside this script
    python benchmarks/generate_cpu.py --grouped            # ids 0, 0, 1, 1, 2, 2 instead of 0, 1, 2, 0, 1, 2
    OMP_NUM_THREADS=1 python benchmarks/generate_cpu.py    # on one thread, by the CPU time of the process

Before anything is timed, every row's tokens must equal those that PEFT generates for it, one adapter at a time.
Enabling takes ``enable_s``, once, and isn't part of the other times.
"""

from __future__ import annotations

import copy
import csv
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import peft_multibatch


RESULTS = Path(__file__).parent / "results"
TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
console = Console()


def build(num_adapters: int, rank: int, targets: list[str]) -> tuple[LlamaForCausalLM, peft.PeftModel]:
    """Build the base model, without PEFT, and a model of the same weights with adapters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=1376,
        vocab_size=32000,
        eos_token_id=None,
        pad_token_id=0,
    )
    lora = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    base = LlamaForCausalLM(config).eval()
    model = get_peft_model(copy.deepcopy(base), lora, adapter_name="adapter0")
    for index in range(1, num_adapters):
        model.add_adapter(f"adapter{index}", lora)
    return base, model.eval()


def main(
    batch: int = 16,
    prompt: int = 32,
    new_tokens: int = 16,
    rank: int = 16,
    repeats: int = 9,
    adapters: str = "1,2,4,8,16",
    grouped: bool = False,
    out: Path = RESULTS / "generate_cpu.csv",
) -> None:
    """Time the base model, ours and PEFT alternately, REPEATS times, and report medians and ratios."""
    rows = []
    for label, targets in TARGETS.items():
        for count in [int(value) for value in adapters.split(",")]:
            names = [f"adapter{index * count // batch if grouped else index % count}" for index in range(batch)]
            rows.append(measure(label, targets, names, prompt, new_tokens, rank, repeats))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, out.with_suffix(".png"))
    table = Table("targets", "adapters", "base s", "ours s", "PEFT s", "ours / base", "PEFT / base", "PEFT / ours")
    for row in rows:
        numbers = [
            row[key] for key in ("base_s", "ours_s", "peft_s", "ours_per_base", "peft_per_base", "peft_per_ours")
        ]
        table.add_row(row["targets"], str(row["adapters"]), *(f"{number:.3f}" for number in numbers))
    console.print(table)


def measure(
    label: str, targets: list[str], names: list[str], prompt: int, new_tokens: int, rank: int, repeats: int
) -> dict[str, Any]:
    count, batch = len({*names}), len(names)
    base_model, model = build(count, rank, targets)
    torch.manual_seed(1)
    inputs = {"input_ids": torch.randint(1, 32000, (batch, prompt)), "attention_mask": torch.ones(batch, prompt)}
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    theirs = copy.deepcopy(model)
    begin = clock()
    peft_multibatch.enable(model)
    enabling = clock() - begin

    def peft_mixed() -> torch.Tensor:
        return theirs.generate(**inputs, **options, adapter_names=names)

    def ours() -> torch.Tensor:
        return model.generate(**inputs, **options, adapter_ids=names)

    def base() -> torch.Tensor:
        return base_model.generate(**inputs, **options)

    def one_adapter_at_a_time() -> torch.Tensor:
        parts: dict[int, torch.Tensor] = {}
        for name in dict.fromkeys(names):
            mine = [row for row, own in enumerate(names) if own == name]
            theirs.set_adapter(name)
            parts |= zip(mine, theirs.generate(**{key: value[mine] for key, value in inputs.items()}, **options))
        return torch.stack([parts[row] for row in range(batch)])

    runs = {"base": base, "ours": ours, "peft": peft_mixed}
    if not torch.equal(ours(), one_adapter_at_a_time()):
        raise SystemExit(
            f"{count} adapters on {label}: tokens differ from PEFT one adapter at a time; nothing is timed"
        )
    base(), peft_mixed()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(repeats), description=f"{label}, {count} adapters", console=console):
        for name, run in runs.items():
            begin = clock()
            run()
            times[name].append(clock() - begin)
    median = {name: statistics.median(values) for name, values in times.items()}

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b]))

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "targets": label, "adapters": count, "rank": rank, "batch": batch, "prompt": prompt, "new_tokens": new_tokens,
        **{f"{name}_s": round(value, 4) for name, value in median.items()}, "enable_s": round(enabling, 4),
        "ours_per_base": round(ratio("ours", "base"), 3),
        "peft_per_base": round(ratio("peft", "base"), 3),
        "peft_per_ours": round(ratio("peft", "ours"), 3),
        "interleaved": names != sorted(names, key=names.index),
        "repeats": repeats, "threads": torch.get_num_threads(), "machine": platform.machine(),
        "torch": torch.__version__, "peft": peft.__version__, "commit": commit,
        "transformers": transformers.__version__,
    }  # fmt: skip


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(TARGETS), figsize=(10, 4), sharey=True, layout="constrained")
    for axis, label in zip(axes, TARGETS):
        mine = [row for row in rows if row["targets"] == label]
        counts = [row["adapters"] for row in mine]
        axis.plot(counts, [row["peft_per_base"] for row in mine], "o-", label="PEFT adapter_names")
        axis.plot(counts, [row["ours_per_base"] for row in mine], "o-", label="peft_multibatch")
        axis.axhline(1, color="gray", linestyle=":", label="base model")
        axis.set(
            xscale="log", yscale="log", xticks=counts, xlabel="adapters in a batch of 16", title=f"{label} projections"
        )
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
    axes[0].set(ylabel="time of generate / base model", yticks=[1, 1.5, 2, 3, 5, 8])
    axes[0].set_yticks([1, 1.5, 2, 3, 5, 8], ["1", "1.5", "2", "3", "5", "8"])
    axes[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
