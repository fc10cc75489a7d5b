"""Benchmark a whole model on a GPU (decode step, ``generate``, prefill), mixed against the base model and PEFT.

    python benchmarks/end_to_end.py                    # results/end_to_end.csv and .png beside this script
    python benchmarks/end_to_end.py --quantize "bitsandbytes 4-bit" --points 32:32 --compiled "" --out quantized.csv
    python benchmarks/end_to_end.py --tiny --layers 2 --points 4:2 --compiled 4:2      # on a CPU, to see it run

The model has the shape of Llama 8B with 8 of its 32 layers, random weights in bfloat16, and adapters of rank 16 on all
seven projections. Before a method is timed, its logits of the mixed batch must match PEFT's to the precision of
bfloat16. Every round times each method and the base model once, and ratios are medians of the ratios within rounds.
``begin_ms`` is the host's time to begin a call, a part of all of these measurements.
Stored adapters are the same ones, saved and registered in an adapter store, which isn't compared with PEFT's modules
whenever a call begins.
"""

from __future__ import annotations

import csv
import gc
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
import peft
import torch
import transformers
import triton
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import BitsAndBytesConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import peft_multibatch
from peft_multibatch.layers.fusion import Fuse


matplotlib.use("Agg")
import matplotlib.pyplot as plt


RESULTS = Path(__file__).parent / "results"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MEASURES = ("decode_ms", "generate32_s", "prefill512_ms")
TITLES = dict(zip(MEASURES, ("a decode step", "generate, 32 tokens", "prefill, 512 tokens")))
BASE, OURS, FUSED = "base", "peft_multibatch", "peft_multibatch fuse='weights'"
STORED = f"{FUSED}, stored adapters"
WAYS: dict[str, tuple[Fuse, bool]] = {OURS: (True, False), FUSED: ("weights", False), STORED: ("weights", True)}
"""Our methods: the option ``fuse``, and whether adapters are stored."""

ONE, NAMES, ALONE = "PEFT, one adapter", "PEFT adapter_names", "PEFT, one at a time"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 999,
}
console = Console(width=150)


def quantization(kind: str) -> BitsAndBytesConfig | TorchAoConfig:
    """transformers' configuration for a kind of quantized base model."""
    if kind == "bitsandbytes 8-bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind == "bitsandbytes 4-bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    if kind == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    raise typer.BadParameter(f"{kind!r}: expected 'bitsandbytes 8-bit', 'bitsandbytes 4-bit' or 'torchao int8'")


def build(
    num_adapters: int, rank: int, layers: int, device: torch.device = DEVICE, quantize: str = "", **sizes: int
) -> tuple[LlamaForCausalLM, peft.PeftModel]:
    """Build the base model and a separate model with adapters, both on the device."""
    models = [llama(layers, device, **sizes) for _ in range(2)]
    if quantize:
        with tempfile.TemporaryDirectory() as folder:
            models.pop().save_pretrained(folder)
            models.clear()
            options = {"dtype": torch.bfloat16, "device_map": device, "quantization_config": quantization(quantize)}
            models += [LlamaForCausalLM.from_pretrained(folder, **options).eval() for _ in range(2)]
    return models[0], with_adapters(models[1], num_adapters, rank)


def llama(layers: int, device: torch.device, **sizes: int) -> LlamaForCausalLM:
    """Build a model with random weights, by default with Llama 8B's sizes."""
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    } | sizes
    config = LlamaConfig(num_hidden_layers=layers, eos_token_id=None, pad_token_id=0, dtype=torch.bfloat16, **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def with_adapters(base: LlamaForCausalLM, num_adapters: int, rank: int) -> peft.PeftModel:
    """Add ``adapter0`` and so on, on all projections."""
    with base.device:
        lora = LoraConfig(r=rank, target_modules=PROJECTIONS, init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(base, lora, adapter_name="adapter0", autocast_adapter_dtype=False)
        for index in track(range(1, num_adapters), description="adding adapters", console=console):
            model.add_adapter(f"adapter{index}", lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.1)  # the scale of trained adapters, so that logits stay in range
    return model.eval()


def seconds(run: Callable[[], object]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    wait()
    begin = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begin


def calls(target: Any, prompt: torch.Tensor, wide: torch.Tensor, **ids: Any) -> dict[str, Callable[[], float]]:
    """Return the measurements of one method: a decode step after 128 tokens, `generate` of 32, prefill of 512."""
    cache = DynamicCache(config=target.config)
    target(input_ids=prompt, past_key_values=cache, **ids)

    def decode() -> float:
        took = []
        for _ in range(10):
            took.append(seconds(lambda: target(input_ids=prompt[:, -1:], past_key_values=cache, **ids)))
            cache.crop(-1)
        return 1e3 * statistics.median(took)

    def generate() -> float:
        return seconds(lambda: target.generate(input_ids=prompt, max_new_tokens=32, do_sample=False, **ids))

    def prefill() -> float:
        return 1e3 * seconds(lambda: target(input_ids=wide, logits_to_keep=1, use_cache=False, **ids))

    return dict(zip(MEASURES, (decode, generate, prefill)))


def compiled_calls(target: Any, prompt: torch.Tensor, **ids: Any) -> dict[str, Callable[[], float]]:
    """The same with a static cache, for which transformers compiles the decode step, which is a mean over 64 steps."""

    def generate(tokens: int) -> float:
        options = {"max_new_tokens": tokens, "do_sample": False, "cache_implementation": "static"}
        return seconds(lambda: target.generate(input_ids=prompt, **options, **ids))

    return {"decode_ms": lambda: 1e3 * (generate(65) - generate(1)) / 64, "generate32_s": lambda: generate(32)}


def alone_calls(
    model: Any, names: list[str], prompt: torch.Tensor, wide: torch.Tensor
) -> dict[str, Callable[[], float]]:
    """One adapter at a time: every adapter's rows in a separate batch."""
    adapters = list(dict.fromkeys(names))
    rows = {name: [row for row, each in enumerate(names) if each == name] for name in adapters}
    own = {}

    def each(measure: str) -> Callable[[], float]:
        def run() -> float:
            total = 0.0
            for name in adapters:
                model.set_adapter(name)
                if name not in own:
                    own[name] = calls(model, prompt[rows[name]], wide[rows[name]])
                total += own[name][measure]()
            model.set_adapter("adapter0")
            return total

        return run

    return {measure: each(measure) for measure in MEASURES}


class Timings:
    """Rounds of measurements, each of which runs every method once."""

    def __init__(self, batch: int, adapters: int) -> None:
        self.batch, self.adapters = batch, adapters
        self.records: list[dict] = []

    def measure(
        self,
        ways: dict[str, dict[str, Callable[[], float]]],
        rounds: int,
        warm_up: bool = True,
        columns: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Time methods and compare them with the first one; methods that already have a record get no second one.

        Args:
            ways: the measurements of each method.
            rounds: how often each is taken.
            warm_up: whether to take each once before.
            columns: more columns for the second method.
        """
        base, measures = next(iter(ways)), list(next(iter(ways.values())))
        times: dict[tuple[str, str], list[float]] = {(way, measure): [] for way in ways for measure in measures}
        what = f"{self.batch}:{self.adapters} {', '.join(ways)}"[:60]
        for index in track(range(rounds + warm_up), description=what, console=console):
            for measure in measures:
                for way, runs in ways.items():
                    took = runs[measure]()
                    if index >= warm_up:
                        times[way, measure].append(took)
        known = {record["way"] for record in self.records}
        for way in [way for way in ways if way not in known]:
            record = {"batch": self.batch, "adapters": self.adapters, "way": way}
            for measure in measures:
                mine, theirs = times[way, measure], times[base, measure]
                record[measure] = round(statistics.median(mine), 4)
                record[f"{measure} × base"] = round(statistics.median(a / b for a, b in zip(mine, theirs)), 3)
            self.records.append(record if way == base else {**record, **columns})
            console.print(record)


class Correct:
    """PEFT's logits of the last tokens, which others must match to the precision of bfloat16.

    Attributes:
        noise: the relative distance of PEFT's own logits from these if inputs are rounded differently.
        effect: the base model's distance.
    """

    def __init__(self, base: Any, model: Any, prompt: torch.Tensor, names: list[str], is_quantized: bool) -> None:
        self._prompt = prompt
        self._theirs = last(model, input_ids=prompt, adapter_names=names)
        exact = model.get_input_embeddings()(prompt)
        factors = 1 + torch.finfo(exact.dtype).eps * (2 * torch.rand(exact.shape, device=exact.device) - 1)
        embeddings = (exact.float() * factors).to(exact.dtype)
        self.noise = self._distance(last(model, inputs_embeds=embeddings, adapter_names=names))
        self.effect = self._distance(last(base, input_ids=prompt))
        # two roundings of bfloat16 are this far apart, and quantized layers that round their inputs amplify them
        self._limit = max(0.03, self.noise) if is_quantized else 0.03

    def check(self, way: str, model: Any, names: list[str]) -> dict[str, float]:
        """Check a method's logits; returns columns for its record."""
        error = self._distance(last(model, input_ids=self._prompt, adapter_ids=names))
        console.print(
            f"{way}: error against PEFT {error:.4f}, of roundings {self.noise:.4f}, effect {self.effect:.2f}"
        )
        if not error < self._limit < self.effect:
            raise SystemExit("results differ from PEFT, so nothing is timed")
        return {"error": round(error, 4), "error of roundings": round(self.noise, 4)}

    def _distance(self, logits: torch.Tensor) -> float:
        return float((logits - self._theirs).norm() / self._theirs.norm())


def last(target: Any, **inputs: Any) -> torch.Tensor:
    """Return float32 logits ``[rows, vocabulary]`` of the last tokens."""
    return target(**inputs).logits[:, -1].float()


@contextmanager
def enabled(model: Any, names: list[str], fuse: Fuse, is_stored: bool) -> Iterator[tuple[Any, list[str]]]:
    """Enable the model; yields the handle, and ids for the rows of the adapters with these names.

    Args:
        model: the PEFT model.
        names: an adapter for each row.
        fuse: as in ``enable``.
        is_stored: whether to save the adapters and register them in a store.
    """
    with tempfile.TemporaryDirectory() as folder:
        if is_stored:
            model.save_pretrained(folder)
        mb = peft_multibatch.enable(model, fuse=fuse)
        try:
            if is_stored:
                store = mb.adapter_store(max_device_memory="8GB", dtype="file")
                for name in {*names}:
                    store.register(f"stored {name}", Path(folder, name))
                names = [f"stored {name}" for name in names]
            yield mb, names
        finally:
            peft_multibatch.disable(model)


def begin_ms(mb: Any, model: Any, prompt: torch.Tensor, names: list[str]) -> float:
    """Return the host's time to begin a call after another one, when nothing runs on the GPU yet."""
    took = []
    for _ in range(10):
        model(input_ids=prompt, adapter_ids=names, logits_to_keep=1, use_cache=False)
        begin = time.perf_counter()
        with mb.batch(names):
            took.append(time.perf_counter() - begin)
    return round(1e3 * statistics.median(took), 3)


def memory(base: Any, model: Any, prompt: torch.Tensor, names: list[str]) -> dict[str, float]:
    """Return peak memory of `generate` in GB, and memory kept between calls relative to the adapters' size."""

    def peak(target: Any, **ids: Any) -> float:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        target.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, **ids)
        return (torch.cuda.max_memory_allocated() - held) / 1e9

    own = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
    found = {"peak_base_GB": round(peak(base), 3)}
    gc.collect()
    before = torch.cuda.memory_allocated()
    peft_multibatch.enable(model)
    found["peak_ours_GB"] = round(peak(model, adapter_ids=names), 3)
    gc.collect()
    found["adapter_memory"] = round(1 + (torch.cuda.memory_allocated() - before) / own, 4)
    peft_multibatch.disable(model)
    return found


def plot(records: list[dict], path: Path) -> None:
    """Plot multiples of the base model's time; compiled methods are compared with the compiled base model."""
    shown = [record for record in records if not record["way"].startswith(BASE)]
    labels = [f"{record['way']}; {record['batch']} prompts, adapters: {record['adapters']}" for record in shown]
    size = (8.4, 0.24 * len(shown) + 1.2)
    figure, axes = plt.subplots(1, len(MEASURES), figsize=size, sharey=True, layout="constrained")
    for axis, measure in zip(axes, MEASURES):
        values = [float(record.get(f"{measure} × base") or 0) for record in shown]
        bars = axis.barh(
            range(len(shown)), values, color=["tab:orange" if OURS in label else "tab:gray" for label in labels]
        )
        axis.bar_label(bars, [f"{value:.1f} ×" if value else "" for value in values], padding=2, fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlim(0.9, 9 * max(values))
        axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_title(TITLES[measure], fontsize=9)
    axes[0].set_yticks(range(len(shown)), labels, fontsize=8)
    axes[0].invert_yaxis()
    figure.supxlabel("multiples of the base model's time", fontsize=9)
    figure.savefig(path, dpi=130)


def versions(commit: str) -> dict[str, str]:
    """Return the measured commit (by default the checkout's) and the versions of the libraries."""
    if not commit:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "commit": commit.strip(),
    }


def write(records: list[dict], out: Path, plot: Callable[[list[dict], Path], None] | None = None) -> None:
    """Write a CSV with the columns of all records, and a plot next to it if ``plot`` is given."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for record in records for key in record)))
        writer.writeheader()
        writer.writerows(records)
    if plot is not None:
        plot(records, out.with_suffix(".png"))


@torch.inference_mode()
def main(
    layers: int = 8,
    rank: int = 16,
    points: str = "8:8,32:1,32:8,32:32,64:64",
    rounds: int = 5,
    slow: str = "32:32,64:64",
    alone: str = "32:32",
    compiled: str = "32:32,64:64",
    quantize: str = "",
    ways: str = "; ".join(WAYS),
    tiny: bool = False,
    out: Path = RESULTS / "end_to_end.csv",
    commit: str = "",
) -> None:
    """Measure every point BATCH:ADAPTERS; PEFT's methods and compiled ones only at some of them, and quantized base
    weights only as they are."""
    pairs = [tuple(map(int, point.split(":"))) for point in points.split(",")]
    base, model = build(
        max(adapters for _, adapters in pairs), rank, layers, DEVICE, quantize, **(TINY if tiny else {})
    )
    known = {"base weights": quantize or "bfloat16"} | versions(commit)
    found: list[Timings] = []
    batches = []
    for batch, adapters in pairs:
        point = f"{batch}:{adapters}"
        torch._dynamo.reset()
        names = [f"adapter{row * adapters // batch}" for row in range(batch)]
        prompt, wide = (
            torch.randint(1, base.config.vocab_size, (batch, length), device=DEVICE) for length in (128, 512)
        )
        correct = Correct(base, model, prompt, names, bool(quantize))
        timings = Timings(batch, adapters)
        found.append(timings)
        batches.append((point, names, prompt, wide))
        used = memory(base, model, prompt, names) if DEVICE.type == "cuda" else {}
        plain = calls(base, prompt, wide)
        for way in [OURS] if quantize else ways.split("; "):
            with enabled(model, names, *WAYS[way]) as (mb, ids):
                columns = correct.check(way, model, ids) | (used if way == OURS else {})
                columns["begin_ms"] = begin_ms(mb, model, prompt, ids)
                mixed = calls(model, prompt, wide, adapter_ids=ids)
                timings.measure({BASE: plain, way: mixed}, rounds, columns=columns)
                if point in compiled.split(","):
                    mixed = compiled_calls(model, prompt, adapter_ids=ids)
                    both = {f"{BASE}, compiled": compiled_calls(base, prompt), f"{way}, compiled": mixed}
                    timings.measure(both, rounds)
        timings.measure({BASE: plain, ONE: calls(model, prompt, wide)}, rounds)
        write([record | known for each in found for record in each.records], out, plot)
    for timings, (point, names, prompt, wide) in zip(found, batches):
        if point in slow.split(","):
            plain = calls(base, prompt, wide)
            timings.measure({BASE: plain, NAMES: calls(model, prompt, wide, adapter_names=names)}, 1, warm_up=False)
        if point in alone.split(","):
            timings.measure({BASE: plain, ALONE: alone_calls(model, names, prompt, wide)}, 1, warm_up=False)
        write([record | known for each in found for record in each.records], out, plot)
    records = [record for each in found for record in each.records]
    table = Table("batch", "adapters", "way", *(column for measure in MEASURES for column in (measure, "× base")))
    for record in records:
        cells = [str(record.get(key, "")) for measure in MEASURES for key in (measure, f"{measure} × base")]
        table.add_row(str(record["batch"]), str(record["adapters"]), record["way"], *cells)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
