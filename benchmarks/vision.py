"""Prefill of a vision-language model with adapters in its vision encoder: mixed batches against the base model.

    python benchmarks/vision.py                # on a GPU: results/vision.csv beside this script
    python benchmarks/vision.py --device cpu   # results/vision_cpu.csv, of a smaller model

Qwen2-VL-shaped (7B, with some of its layers), random weights, adapters of rank 16 on all linear layers of the vision
encoder, its merger and the text model. Samples have 1, 0, 2 and 3 images in turn, every second image of a sample being
half as wide. Before anything is timed, every sample's logits must be as near to PEFT's as the dtype allows. The ways
take turns in every round, and ratios are medians of the ratios of a round. Switching PEFT's adapters on, off or to
another one isn't timed.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from end_to_end import RESULTS, console, seconds, versions, write
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import peft_multibatch


BASE, OURS, ALONE = "base model", "peft_multibatch, mixed", "PEFT, one at a time"
START, END, IMAGE = 151652, 151653, 151655
COUNTS = 1, 0, 2, 3
SIZES = {
    "cuda": (
        {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
        {"embed_dim": 1280, "num_heads": 16},
    ),
    "cpu": (
        {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}},
        {"embed_dim": 128, "num_heads": 4},
    ),
}  # fmt: skip


def build(adapters: int, rank: int, depth: int, layers: int, device: str) -> PeftModel:
    """A model with adapters of the size that trained ones have."""
    text, vision = SIZES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={**text, "num_hidden_layers": layers, "vocab_size": 152064, "max_position_embeddings": 32768},
        vision_config={**vision, "depth": depth, "hidden_size": text["hidden_size"]},
        image_token_id=IMAGE,
    )
    with torch.device(device):
        torch.set_default_dtype(dtype)
        base = Qwen2VLForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
        lora = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(base, lora, adapter_name="adapter0", autocast_adapter_dtype=False)
        for index in track(range(1, adapters), description="adding adapters", console=console):
            model.add_adapter(f"adapter{index}", lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.1)
    return model.eval()


class Batch:
    """Samples with images and text.

    Args:
        samples: how many.
        side: patches of a large image along each side.
        tokens: of each sample's text, beside its images.
        model: what they are for.
    """

    def __init__(self, samples: int, side: int, tokens: int, model: PeftModel) -> None:
        counts = [COUNTS[sample % len(COUNTS)] for sample in range(samples)]
        self.grids = [[[1, side, side // (1 + image % 2)] for image in range(count)] for count in counts]
        width = model.config.vision_config.patch_size**2 * 3 * model.config.vision_config.temporal_patch_size
        generator = torch.Generator().manual_seed(0)
        self.pixels = [
            [torch.randn(height * width_, width, generator=generator) for _, height, width_ in grids]
            for grids in self.grids
        ]
        self.texts = [torch.randint(1000, 100000, (tokens,), generator=generator).tolist() for _ in counts]
        self.device, self.dtype = model.device, model.dtype

    def inputs(self, samples: range) -> dict[str, Tensor]:
        """Inputs of some samples, padded on the left."""
        rows = []
        for each in samples:
            row = []
            for _, height, width in self.grids[each]:
                row += [START, *[IMAGE] * (height * width // 4), END]
            rows.append(row + self.texts[each])
        length = max(map(len, rows))
        made = {
            "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        }
        made["mm_token_type_ids"] = (made["input_ids"] == IMAGE).long()
        grids = [grid for each in samples for grid in self.grids[each]]
        if grids:
            made["image_grid_thw"] = torch.tensor(grids)
            made["pixel_values"] = torch.cat([one for each in samples for one in self.pixels[each]]).to(self.dtype)
        return {name: value.to(self.device) for name, value in made.items()}


@torch.inference_mode()
def main(
    device: str = "cuda",
    depth: int = 16,
    layers: int = 8,
    rank: int = 16,
    points: str = "4:4,8:8,8:2",
    side: int = 32,
    tokens: int = 128,
    rounds: int = 7,
    out: Annotated[
        Path | None,
        typer.Option(help="the CSV", show_default="results/vision.csv, or vision_cpu.csv"),
    ] = None,
    commit: str = "",
) -> None:
    """Measure every point SAMPLES:ADAPTERS."""
    out = out or RESULTS / ("vision.csv" if device == "cuda" else "vision_cpu.csv")
    pairs = [tuple(map(int, point.split(":"))) for point in points.split(",")]
    model = build(max(adapters for _, adapters in pairs), rank, depth, layers, device)
    known, records = versions(commit), []
    for samples, adapters in pairs:
        batch = Batch(samples, side, tokens, model)
        names = [f"adapter{sample % adapters}" for sample in range(samples)]
        whole = batch.inputs(range(samples))
        alone = [batch.inputs(range(sample, sample + 1)) for sample in range(samples)]

        def last(inputs: dict[str, Tensor], **ids: list[str]) -> Tensor:
            return model(**inputs, use_cache=False, logits_to_keep=1, **ids).logits[:, -1]

        def ready(way: str) -> None:
            peft_multibatch.disable(model)
            model.base_model.enable_adapter_layers()
            if way == OURS:
                peft_multibatch.enable(model)
            elif way == BASE:
                model.base_model.disable_adapter_layers()

        # the calls of each way, and the adapter that PEFT activates before, which takes no part in the time
        ways: dict[str, list[tuple[str, Callable[[], Tensor]]]] = {
            BASE: [("", functools.partial(last, whole))],
            OURS: [("", functools.partial(last, whole, adapter_ids=names))],
            ALONE: [(name, functools.partial(last, inputs)) for name, inputs in zip(names, alone)],
        }

        def runs(way: str, ways: dict = ways) -> Iterator[Callable[[], Tensor]]:
            for name, run in ways[way]:
                if name:
                    model.set_adapter(name)
                yield run

        found = {}
        for way in (ALONE, OURS):
            ready(way)
            found[way] = torch.cat([run().float() for run in runs(way)])
        error = float((found[OURS] - found[ALONE]).norm() / found[ALONE].norm())
        console.print(f"{samples}:{adapters}: error of the logits against PEFT {error:.2e}")
        if not error < (0.05 if device == "cuda" else 1e-4):
            raise SystemExit("nothing is timed")
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in track(range(rounds + 1), description="rounds", console=console):
            for way in ways:
                ready(way)
                took = [sum(map(seconds, runs(way))) for _ in range(4)]  # the first one warms up
                median = statistics.median(took[1:])
                if number:
                    times[way].append(1e3 * median)
        record: dict[str, object] = {
            "samples": samples, "adapters": adapters,
            "patches": sum(height * width for grids in batch.grids for _, height, width in grids),
            "tokens": whole["input_ids"].shape[1],
        }  # fmt: skip
        record |= {f"{way}, ms": round(statistics.median(each), 2) for way, each in times.items()}
        for way in (OURS, ALONE):
            ratio = statistics.median(mine / theirs for mine, theirs in zip(times[way], times[BASE]))
            record[f"{way} / base"] = round(ratio, 3)
        records.append(record | {"error": f"{error:.1e}"})
        write([each | {"depth": depth, "layers": layers, "rank": rank} | known for each in records], out)
    table = Table(*records[0])
    for record in records:
        table.add_row(*map(str, record.values()))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
