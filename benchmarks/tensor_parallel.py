"""Benchmark tensor parallelism: decode step and ``generate`` of a mixed batch against the base model on the same GPUs.

    torchrun --nproc_per_node 2 benchmarks/tensor_parallel.py    # results/tensor_parallel.csv beside this script

It needs peft 0.21.1 or newer, which splits adapters with the model.

The model is that of end_to_end.py: the shape of Llama 8B with 8 of its 32 layers, random weights in bfloat16, and
adapters of rank 16 on all seven projections. Before anything is timed, the logits of the mixed batch must match
PEFT's, one adapter at a time on the same split model, to the precision of bfloat16. Rounds alternate between the base
model and the mixed batch.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from pathlib import Path

import peft
import torch
import torch.distributed as dist
import typer
from end_to_end import BASE, OURS, PROJECTIONS, RESULTS, calls, console, versions, write
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import peft_multibatch
from peft_multibatch.compat import SPLITS_ADAPTERS


DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def load(folder: Path) -> LlamaForCausalLM:
    how = DistributedConfig(tp_size=dist.get_world_size())
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=how).eval()


def build(num_adapters: int, rank: int, layers: int, sizes: dict[str, int]) -> tuple[LlamaForCausalLM, PeftModel]:
    """Build the base model and a separate model with adapters, both split over the ranks."""
    shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    if dist.get_rank() == 0:
        config = LlamaConfig(
            num_hidden_layers=layers, eos_token_id=None, pad_token_id=0, dtype=torch.bfloat16, **sizes
        )
        with torch.device(DEVICE):
            torch.manual_seed(0)
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    dist.barrier()
    base, other = load(folder), load(folder)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    lora = LoraConfig(r=rank, target_modules=PROJECTIONS, init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)  # PEFT synchronizes ranks only for adapters that it initializes itself
    model = get_peft_model(other, lora, adapter_name="adapter0", autocast_adapter_dtype=False)
    for index in range(1, num_adapters):
        model.add_adapter(f"adapter{index}", lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.1)  # the scale of trained adapters, so that logits stay in range
    return base, model.eval()


def correct(base: LlamaForCausalLM, model: PeftModel, prompt: torch.Tensor, names: list[str]) -> tuple[float, float]:
    """Return the relative distances of our logits and of the base model's from PEFT's, on a few rows."""
    found = []
    rows = range(0, len(names), max(1, len(names) // 4))
    for row in rows:
        model.set_adapter(names[row])
        found.append(model(input_ids=prompt[row : row + 1]).logits[:, -1].float())
    theirs, plain = torch.cat(found), base(input_ids=prompt).logits[rows, -1].float()
    peft_multibatch.enable(model)
    ours = model(input_ids=prompt, adapter_ids=names).logits[rows, -1].float()
    peft_multibatch.disable(model)
    return float((ours - theirs).norm() / theirs.norm()), float((plain - theirs).norm() / theirs.norm())


@torch.no_grad()
def main(
    batch: int = 32,
    adapters: int = 32,
    layers: int = 8,
    rank: int = 16,
    rounds: int = 5,
    hidden_size: int = 4096,
    intermediate_size: int = 14336,
    vocab_size: int = 128256,
    out: Path = RESULTS / "tensor_parallel.csv",
    commit: str = "",
) -> None:
    """Time a decode step, `generate` and prefill of the mixed batch and the base model."""
    if not SPLITS_ADAPTERS:
        raise SystemExit(f"peft {peft.__version__} can't run adapters of a split model: expected 0.21.1 or newer")
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "vocab_size": vocab_size}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    base, model = build(adapters, rank, layers, sizes)
    names = [f"adapter{row * adapters // batch}" for row in range(batch)]
    torch.manual_seed(0)  # the same prompts on every rank
    prompt, wide = (torch.randint(1, vocab_size, (batch, length)).to(DEVICE) for length in (128, 512))
    error, effect = correct(base, model, prompt, names)
    if dist.get_rank() == 0:
        console.print(f"{batch}:{adapters}: error against PEFT {error:.4f}, effect of the adapters {effect:.2f}")
    if not error < 0.03 < effect:  # two roundings of bfloat16 are this far apart
        raise SystemExit("results differ from PEFT, so nothing is timed")
    peft_multibatch.enable(model)
    ways = {BASE: calls(base, prompt, wide), OURS: calls(model, prompt, wide, adapter_ids=names)}
    measures = list(ways[BASE])
    times: dict[tuple[str, str], list[float]] = {(way, measure): [] for way in ways for measure in measures}
    for index in range(rounds + 1):  # the first is warmup
        for measure in measures:
            for way, runs in ways.items():
                dist.barrier()
                took = runs[measure]()
                if index:
                    times[way, measure].append(took)
    records = []
    for way in ways:
        record = {"ranks": dist.get_world_size(), "batch": batch, "adapters": adapters, "way": way}
        for measure in measures:
            mine, theirs = times[way, measure], times[BASE, measure]
            record[measure] = round(statistics.median(mine), 4)
            record[f"{measure} × base"] = round(statistics.median(a / b for a, b in zip(mine, theirs)), 3)
        records.append(record)
    records[1]["error"] = round(error, 4)
    if dist.get_rank() == 0:
        console.print(*records, sep="\n")
        write([record | versions(commit) for record in records], out)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
