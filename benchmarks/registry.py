"""Benchmark the host time of a call by number of registered adapters, in a tiny model on a CPU.

    python benchmarks/registry.py                              # results/registry.csv and .png beside this script
    python benchmarks/registry.py --counts 1,10,100 --names 0 --only enter,forward     # well under a minute

A batch of eight rows always uses the same eight adapters (or one, if only one is registered), while 1 to 1,000 are
registered. Measurements:

- ``enter``: entering and leaving ``mb.batch(ids)``, without gradients.
- ``enter_grad``: the same with gradients enabled, as without ``torch.no_grad()``.
- ``forward``: an eager forward with ``adapter_ids``, without gradients.
- ``step``: forward and backward. Only the adapters of the batch are trainable, and the model is in eval mode.
- ``compiled``: a warm call of a model compiled with ``fullgraph=True``, under ``mb.batch(ids)``, without gradients.
- ``added``: the first forward after PEFT's ``add_adapter``. The batch does not use the new adapter. Neither
  ``add_adapter`` nor ``delete_adapter``, which follows, is timed. Each new adapter has a new name.

The model is a Llama with four layers and a hidden size of 48, in float32. All adapters have rank 8 on all seven
projections of every layer, except at the point with 10,000 names (``--names``), where only ``enter`` is timed: there,
all adapters except eight have rank 1 on one projection of one layer.

PEFT's ``add_adapter`` walks through every module of the model, which takes 3 s for the thousandth adapter. It adds the
adapters of the batch and the first of the others. The rest are added by ``update_layer``, which ``add_adapter`` calls
for every layer, without two steps that visit all adapters of the layer: ``set_adapter``, which runs once at the end,
and the move to the base layer's device and dtype, which new adapters already have. The result is the same. The models
are enabled afterwards.

Before anything is timed, the logits of the mixed batch, and the gradients for ``step``, must equal PEFT's with one
adapter at a time. There is one model per count, and all models exist at the same time. Every round measures each count
once, and ratios are medians of the ratios within rounds. Python's garbage collector doesn't visit registered adapters
during measurements (``gc.freeze``).
"""

from __future__ import annotations

import gc
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import torch
import typer
from end_to_end import PROJECTIONS, versions, write
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import peft_multibatch


matplotlib.use("Agg")
import matplotlib.pyplot as plt


RESULTS = Path(__file__).parent / "results"
LABELS = {
    "enter": "enter and leave mb.batch(ids)",
    "enter_grad": "enter and leave, gradients enabled",
    "forward": "forward",
    "step": "forward and backward",
    "compiled": "compiled forward",
    "added": "first forward after add_adapter",
}
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
}
CALLS = ("enter", "enter_grad", "forward", "step")
ROWS, TOKENS = 8, 4
REFERENCE = 10  # the count that others are compared with
TOLERANCE = 1e-5  # relative, of logits and gradients in float32
MOST_SAMPLES, FEWEST_SAMPLES, SECONDS = 40, 3, 0.15  # limits per measurement and round
EVERYWHERE, ONE_LAYER = "all layers", "one layer"
console = Console(width=130)


class Point:
    """A model with a number of registered adapters, its batch, and PEFT's results for that batch.

    Args:
        registered: number of adapters of the model.
        reach: EVERYWHERE, or ONE_LAYER if adapters outside the batch have rank 1 on one projection.
    """

    def __init__(self, registered: int, reach: str = EVERYWHERE) -> None:
        self.registered, self.reach = registered, reach
        self.times: dict[str, list[list[float]]] = defaultdict(list)  # by measurement: µs of every round
        self.lora = LoraConfig(r=8, target_modules=PROJECTIONS, init_lora_weights=False, task_type="CAUSAL_LM")
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(eos_token_id=None, pad_token_id=0, **SIZES)).eval()
        self.model = get_peft_model(base, self.lora, adapter_name="adapter0").eval()
        used = min(ROWS, registered)
        for index in range(1, used):
            self.model.add_adapter(f"adapter{index}", self.lora)
        self.input_ids = torch.randint(1, SIZES["vocab_size"], (ROWS, TOKENS))
        self.names = [f"adapter{row % used}" for row in range(ROWS)]
        others = [f"adapter{index}" for index in range(used, registered)]
        bystander = self.lora
        if reach == ONE_LAYER:
            bystander = LoraConfig(
                r=1, target_modules=["v_proj"], layers_to_transform=[0], init_lora_weights=False, task_type="CAUSAL_LM"
            )
        register(self.model, others, bystander)
        self.model.eval()  # PEFT adds adapters in train mode
        self.logits, self.gradients = self._by_peft()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(any(f".{used}." in name for used in self.names))
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.enable()

    def enable(self) -> None:
        """Enable the model again, so that no state of one part of the benchmark affects the next."""
        peft_multibatch.disable(self.model)
        self.mb = peft_multibatch.enable(self.model, backend="torch")

    def forward(self) -> Tensor:
        return self.model(input_ids=self.input_ids, adapter_ids=self.names, use_cache=False).logits

    def step(self) -> None:
        loss_of(self.forward()).backward()

    def forget_gradients(self) -> None:
        for parameter in self.trainable:
            parameter.grad = None

    def enter(self) -> None:
        with self.mb.batch(self.names):
            pass

    def compiled(self) -> Callable[[], Tensor]:
        """Return a function that runs the compiled model; its first call compiles."""
        fast = torch.compile(self.model.get_base_model(), fullgraph=True)

        def run() -> Tensor:
            with self.mb.batch(self.names):
                return fast(input_ids=self.input_ids, use_cache=False).logits

        return run

    def check(self, logits: Tensor, what: str) -> None:
        """Stop the benchmark if logits differ from PEFT's."""
        self._compare(logits, self.logits, f"logits of {what}")

    def check_step(self) -> None:
        """Stop the benchmark if gradients differ from PEFT's."""
        self.step()
        for parameter, theirs in zip(self.trainable, self.gradients, strict=True):
            self._compare(parameter.grad, theirs, "a gradient")
        self.forget_gradients()

    def _compare(self, ours: Tensor, theirs: Tensor, what: str) -> None:
        error = distance(ours, theirs)
        if not error <= TOLERANCE:
            raise SystemExit(
                f"{self.registered} adapters: {what} differs from PEFT by {error:.1e}. Nothing more is timed."
            )

    def _by_peft(self) -> tuple[Tensor, list[Tensor]]:
        """Compute PEFT's logits and gradients of the batch, one row at a time."""
        rows = []
        for row, name in enumerate(self.names):
            self.model.set_adapter(name)
            rows.append(self.model(input_ids=self.input_ids[row : row + 1], use_cache=False).logits)
            loss_of(rows[-1]).backward()
        logits = torch.cat(rows).detach()
        found = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in found]
        for parameter in found:
            parameter.grad = None
        with self.model.disable_adapter(), torch.no_grad():
            plain = self.model(input_ids=self.input_ids, use_cache=False).logits
        if not distance(plain, logits) > 0.01:
            raise SystemExit("the adapters change nothing, so the comparison proves nothing. Nothing is timed.")
        return logits, gradients


def loss_of(logits: Tensor) -> Tensor:
    """A loss that is a sum over rows, so that rows can run one at a time."""
    return logits.square().sum()


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def register(model: PeftModel, names: list[str], lora: LoraConfig) -> None:
    """Add adapters of one configuration, in the quick way described at the top of this file."""
    if not names:
        return
    model.add_adapter(names[0], lora)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and names[0] in layer.lora_A]
    with mock.patch.multiple(LoraLayer, set_adapter=mock.DEFAULT, _move_adapter_to_device_of_base_layer=mock.DEFAULT):
        for name in names[1:]:
            model.peft_config[name] = lora
            for layer in layers:
                layer.update_layer(name, lora.r, lora_alpha=lora.lora_alpha, config=lora)
    for layer in layers:
        layer.set_adapter(layer.active_adapters)


def microseconds(run: Callable[[], object], between: Callable[[], object] = lambda: None) -> list[float]:
    """Time a call after a warmup, as often as fits into SECONDS, within bounds."""
    run()
    between()
    took: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(took) < FEWEST_SAMPLES or (len(took) < MOST_SAMPLES and time.perf_counter() < end):
        begin = time.perf_counter()
        run()
        took.append(1e6 * (time.perf_counter() - begin))
        between()
    return took


class TooLongError(BaseException):
    """Compiling takes longer than allowed; not an Exception, because torch.compile catches some of those."""


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def measure_calls(points: list[Point], parts: list[str], rounds: int) -> None:
    """Measure entering, forward and step; every round runs each of them at every count."""
    everywhere = [point for point in points if point.reach == EVERYWHERE]
    for point in points:
        with torch.no_grad():
            point.check(point.forward(), "the mixed batch")
    for point in everywhere if "step" in parts else []:
        point.check_step()
    for _ in track(range(rounds), description="calls", console=console):
        for part in [part for part in CALLS if part in parts]:
            for point in points if part == "enter" else everywhere:
                run = {"forward": point.forward, "step": point.step}.get(part, point.enter)
                with torch.set_grad_enabled(part in ("enter_grad", "step")):
                    point.times[part].append(microseconds(run, point.forget_gradients))


@torch.no_grad()
def measure_compiled(points: list[Point], rounds: int, most: int, seconds: int) -> None:
    """Compile for counts up to a maximum, or up to one that takes too long, then time warm calls alternately."""
    runs: list[tuple[Point, Callable[[], Tensor]]] = []
    for point in sorted(points, key=lambda point: point.registered):
        if point.registered > most:
            console.print(f"compiled, {point.registered} adapters: skipped (--compile-up-to {most})")
            continue
        run = point.compiled()
        begin = time.perf_counter()
        try:
            with limit(seconds):
                logits = run()
        except TooLongError:
            console.print(f"compiled, {point.registered} adapters and more: skipped, compiling took {seconds} s")
            break
        point.check(logits, "the compiled model")
        console.print(f"compiled, {point.registered} adapters: {time.perf_counter() - begin:.1f} s to compile")
        runs.append((point, run))
    for _ in track(range(rounds), description="compiled calls", console=console):
        for point, run in runs:
            point.times["compiled"].append(microseconds(run))


@torch.no_grad()
def measure_added(points: list[Point], rounds: int) -> None:
    """Add an adapter, time the first call, delete the adapter."""
    for point in points:
        point.forward()
    for index in track(range(rounds), description="calls after an add", console=console):
        for point in points:
            point.model.add_adapter(f"new{index}", point.lora)
            begin = time.perf_counter()
            logits = point.forward()
            point.times["added"].append([1e6 * (time.perf_counter() - begin)])
            point.check(logits, "the first call after an add")
            point.model.delete_adapter(f"new{index}")
            point.forward()


def summarize(points: list[Point], known: dict[str, str]) -> list[dict[str, Any]]:
    """Compute percentiles over all samples of a point, and the median ratio to REFERENCE adapters within rounds."""
    reference = next((each for each in points if (each.registered, each.reach) == (REFERENCE, EVERYWHERE)), None)
    records: list[dict[str, Any]] = []
    for what in LABELS:
        for point in [point for point in points if point.times.get(what)]:
            rounds = point.times[what]
            samples = sorted(value for values in rounds for value in values)
            p20, p50, p80 = (samples[round(part * (len(samples) - 1))] for part in (0.2, 0.5, 0.8))
            ratio: float | str = ""
            if reference is not None and reference.times.get(what):
                pairs = zip(rounds, reference.times[what])
                ratio = round(statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs), 3)
            records.append(
                {
                    "what": what, "registered": point.registered, "reach": point.reach,
                    "us_p20": round(p20, 1), "us_p50": round(p50, 1), "us_p80": round(p80, 1), "ratio_to_10": ratio,
                    "rounds": len(rounds), "samples": len(samples), **known,
                }
            )  # fmt: skip
    return records


def plot(records: list[dict], path: Path) -> None:
    figure, (times, ratios) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for index, what in enumerate(dict.fromkeys(record["what"] for record in records)):
        mine = [record for record in records if record["what"] == what]
        ladder = [record for record in mine if record["reach"] == EVERYWHERE]
        names = [record for record in mine if record["reach"] == ONE_LAYER]
        color = f"C{index}"
        for axis, key, scale in ((times, "us_p50", 1e-3), (ratios, "ratio_to_10", 1)):
            shown = [record for record in ladder if record[key] != ""]
            counts, values = [record["registered"] for record in shown], [scale * record[key] for record in shown]
            axis.plot(counts, values, "o-", color=color, label=LABELS[what])
            if axis is times:
                low, high = ([1e-3 * record[edge] for record in shown] for edge in ("us_p20", "us_p80"))
                axis.fill_between(counts, low, high, color=color, alpha=0.15)
            for record in [record for record in names if record[key] != ""]:
                label = f"{LABELS[what]},\nbystanders on one projection"
                axis.plot(
                    record["registered"], scale * record[key], "D", color=color, markerfacecolor="white", label=label
                )
    ticks = sorted({record["registered"] for record in records})
    for axis in (times, ratios):
        axis.set(xscale="log", yscale="log", xlabel="registered adapters")
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.xaxis.minorticks_off()
        axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.grid(alpha=0.3)
    times.set(ylabel="host time in ms (median; shaded: 20 % to 80 %)", title="Time of a call")
    ratios.set(ylabel=f"time / time with {REFERENCE} adapters", title=f"Growth from {REFERENCE} adapters")
    ratios.axhline(1, color="gray", linestyle=":", zorder=0)
    figure.suptitle(f"A batch of {ROWS} rows with up to {ROWS} adapters, tiny Llama with 4 layers, one CPU thread")
    figure.legend(*times.get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=120)


def main(
    counts: str = "1,10,100,1000",
    names: int = 10_000,
    rounds: int = 7,
    only: str = ",".join(LABELS),
    compile_up_to: int = 100,
    compile_limit: int = 90,
    out: Path = RESULTS / "registry.csv",
    commit: str = "",
) -> None:
    """Run the measurements named in ONLY at every count of registered adapters.

    --names 0 leaves out the point for names. Models are compiled for counts up to --compile-up-to, for at most
    --compile-limit seconds each.
    """
    parts = only.split(",")
    unknown = [part for part in parts if part not in LABELS]
    if unknown:
        raise typer.BadParameter(f"--only got {', '.join(unknown)}: expected some of {', '.join(LABELS)}")
    torch.set_num_threads(1)
    begin = time.perf_counter()
    points = [Point(int(count)) for count in track(counts.split(","), description="models", console=console)]
    ladder = list(points)
    if names and "enter" in parts:
        points.append(Point(names, ONE_LAYER))
    gc.collect()
    gc.freeze()
    console.print(f"models with {', '.join(str(point.registered) for point in points)} adapters built")
    known = {"threads": str(torch.get_num_threads())} | versions(commit)
    if set(CALLS) & set(parts):
        measure_calls(points, parts, rounds)
        write(summarize(points, known), out, plot)
    if "compiled" in parts:
        for point in ladder:
            point.enable()
        measure_compiled(ladder, rounds, compile_up_to, compile_limit)
        torch._dynamo.reset()
        write(summarize(points, known), out, plot)
    if "added" in parts:
        for point in ladder:
            point.enable()
        measure_added(ladder, rounds)
        write(summarize(points, known), out, plot)
    table = Table(
        "what", "registered", "bystanders on", "µs p20", "µs p50", "µs p80", f"/ {REFERENCE} adapters", "samples"
    )
    for record in summarize(points, known):
        times = [f"{record[key]:,.0f}" for key in ("us_p20", "us_p50", "us_p80")]
        cells = [f"{record['registered']:,}", record["reach"], *times, record["ratio_to_10"], record["samples"]]
        table.add_row(LABELS[record["what"]], *map(str, cells))
    console.print(table)
    console.print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    typer.run(main)
