"""A whole model on a GPU: decode step, ``generate``, prefill; mixed batches against the base model and PEFT.

    python benchmarks/end_to_end.py                    # results/end_to_end.csv beside this script

Llama-8B-shaped with 8 of its 32 layers, random weights, bfloat16, adapters of rank 16 on all seven projections. Before
anything is timed, the logits of the mixed batch must be as near to PEFT's as bfloat16 allows.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import peft_multibatch


RESULTS = Path(__file__).parent / "results"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
console = Console(width=150)


def build(num_adapters: int, rank: int, layers: int) -> tuple[LlamaForCausalLM, peft.PeftModel]:
    """The base model and a model of its own with adapters, both on the GPU."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        eos_token_id=None,
        pad_token_id=0,
        dtype=torch.bfloat16,
    )
    models = []
    with torch.device("cuda"):
        for _ in range(2):
            torch.manual_seed(0)
            models.append(LlamaForCausalLM(config).to(torch.bfloat16).eval())
        lora = LoraConfig(r=rank, target_modules=PROJECTIONS, init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(models[1], lora, adapter_name="adapter0", autocast_adapter_dtype=False)
        for index in track(range(1, num_adapters), description="adding adapters", console=console):
            model.add_adapter(f"adapter{index}", lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.1)  # of the size of a trained adapter's, so that logits stay in range
    return models[0], model.eval()


def seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure(target, inputs: dict[str, torch.Tensor], repeats: int, **ids) -> dict[str, float]:
    """Decode step after 128 tokens, `generate` of 32 tokens, and prefill of 512."""
    prompt, wide = inputs["prompt"], inputs["wide"]
    cache = DynamicCache(config=target.config)
    target(input_ids=prompt, past_key_values=cache, **ids)
    length = cache.get_seq_length()

    def step() -> None:
        target(input_ids=prompt[:, -1:], past_key_values=cache, **ids)
        cache.crop(length)

    def generate() -> None:
        target.generate(input_ids=prompt, max_new_tokens=32, do_sample=False, **ids)

    def prefill() -> None:
        target(input_ids=wide, logits_to_keep=1, **ids)

    return {
        "decode_ms": round(1e3 * seconds(step, 5 * repeats), 3),
        "generate32_s": round(seconds(generate, repeats), 4),
        "prefill512_ms": round(1e3 * seconds(prefill, repeats), 2),
    }


@torch.inference_mode()
def main(
    layers: int = 8, rank: int = 16, points: str = "8:8,32:1,32:8,32:32,64:64", out: Path = RESULTS / "end_to_end.csv"
) -> None:
    """Measure every point BATCH:ADAPTERS."""
    pairs = [tuple(map(int, point.split(":"))) for point in points.split(",")]
    base, model = build(max(adapters for _, adapters in pairs), rank, layers)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    records = []
    for batch, adapters in pairs:
        names = [f"adapter{row * adapters // batch}" for row in range(batch)]
        prompt = torch.randint(1, 128000, (batch, 128), device="cuda")
        mb = peft_multibatch.enable(model)
        ours = model(input_ids=prompt, adapter_ids=names).logits[:, -1].float()
        mb.disable()
        theirs = model(input_ids=prompt, adapter_names=names).logits[:, -1].float()
        plain = base(input_ids=prompt).logits[:, -1].float()
        error = float((ours - theirs).norm() / theirs.norm())
        effect = float((plain - theirs).norm() / theirs.norm())
        if not error < 0.03 < effect:  # two roundings of bfloat16 are this far apart
            found = f"error {error:.3f}, effect of the adapters {effect:.3f}"
            raise SystemExit(f"{batch}:{adapters}: {found}; nothing is timed")

        inputs = {"prompt": prompt, "wide": torch.randint(1, 128000, (batch, 512), device="cuda")}
        peft_multibatch.enable(model)
        found = {"peft_multibatch": measure(model, inputs, 3, adapter_ids=names)}
        peft_multibatch.disable(model)
        found = {"base": measure(base, inputs, 3), **found}
        found["PEFT, one adapter"] = measure(model, inputs, 3)
        found["PEFT adapter_names"] = measure(model, inputs, 1, adapter_names=names)
        records.extend({"batch": batch, "adapters": adapters, "way": way, **times} for way, times in found.items())
        for record in records[-4:]:
            console.print(record)
        console.print(f"error against PEFT {error:.4f}, effect of the adapters {effect:.2f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    extra = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "commit": commit,
    }
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, records[0] | extra)
        writer.writeheader()
        writer.writerows(record | extra for record in records)
    table = Table("batch", "adapters", "way", "decode ms", "× base", "generate s", "× base", "prefill ms", "× base")
    for record in records:
        first = next(r for r in records if (r["batch"], r["adapters"]) == (record["batch"], record["adapters"]))
        cells = [
            cell
            for key in ("decode_ms", "generate32_s", "prefill512_ms")
            for cell in (f"{record[key]}", f"{record[key] / first[key]:.2f}")
        ]
        table.add_row(str(record["batch"]), str(record["adapters"]), record["way"], *cells)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
