"""Adapters in files, and PEFT's results for the same files, one adapter at a time."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from models import base_model, left_padded, lora_configs
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save(folder: Path, config: LoraConfig, architecture: str = "llama", seed: int = 0) -> Path:
    """Write an adapter with random weights, using PEFT."""
    torch.manual_seed(seed)
    model = get_peft_model(base_model(architecture), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def save_all(folder: Path, architecture: str = "llama") -> Path:
    """Save `lora_configs` as folders."""
    for seed, (name, config) in enumerate(lora_configs(architecture).items()):
        save(folder / name, config, architecture, seed)
    return folder


def save_many(folder: Path, count: int, rank: int = 4, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> list[str]:
    """Save different adapters `a0`, `a1`, ... of the same shape."""
    config = LoraConfig(r=rank, target_modules=list(targets), init_lora_weights=False, task_type="CAUSAL_LM")
    first = save(folder / "a0", config)
    tensors = load_file(first / WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    for number in range(1, count):
        other = folder / f"a{number}"
        other.mkdir()
        shutil.copy(first / CONFIG, other / CONFIG)
        random = {key: torch.randn(each.shape, generator=generator) * 0.2 for key, each in tensors.items()}
        save_file(random, other / WEIGHTS)
    return [f"a{number}" for number in range(count)]


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


@contextlib.contextmanager
def by_peft(base: Any, folder: Path, **options: Any) -> Iterator[PeftModel]:
    """Return a model with an adapter loaded by PEFT's `load_adapter`."""
    model = PeftModel.from_pretrained(base, str(folder), **options).eval()
    yield model
    model.unload()


def expected(
    names: list[str], folders: dict[str, Path] | Path, call: Callable[[Any, dict[str, Tensor]], Tensor],
    inputs: dict[str, Tensor] | None = None, architecture: str = "llama", dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Run each row by itself with its own adapter, loaded by PEFT."""
    inputs = left_padded(len(names)) if inputs is None else inputs
    found: dict[int, Tensor] = {}
    base = base_model(architecture, dtype)
    for name in dict.fromkeys(names):
        folder = None if name == "__base__" else folders[name] if isinstance(folders, dict) else folders / name
        with contextlib.nullcontext(base) if folder is None else by_peft(base, folder) as model:
            for row in [row for row, each in enumerate(names) if each == name]:
                found[row] = call(model, {key: value[row : row + 1] for key, value in inputs.items()})
    return torch.cat([found[row] for row in range(len(names))])


def logits(model: Any, inputs: dict[str, Tensor], **ids: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **ids).logits
