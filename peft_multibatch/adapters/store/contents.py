"""Describes an adapter's folder from its configuration and the header of its weights, without reading any weights."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any

from peft_multibatch.adapters.store import files
from peft_multibatch.adapters.store.files import StoredTensor
from peft_multibatch.adapters.store.layout import parse_key
from peft_multibatch.adapters.store.settings import read_settings
from peft_multibatch.errors import MultibatchError


PREFIX = "base_model.model."
INDEX = re.compile(r"(?:^|\.)(\d+)\.")
PARAMETER = re.compile(r"\.(?:lora_\w+(?:\.weight|\.bias)?|weight|bias|[^.]+)$")

VARIANTS = {"use_dora": "DoRA", "use_rslora": "rsLoRA", "alora_invocation_tokens": "aLoRA"}
"""Keys of LoRA's configuration that turn on a variant -> the variant's label."""


@dataclass(frozen=True)
class Contents:
    """A description of an adapter's files.

    Attributes:
        name: its name in messages.
        folder: its folder.
        kind: PEFT's type, such as ``"LORA"``, followed by the variant, if any.
        ranks: its ranks, in ascending order; empty for types without ranks.
        alpha: ``lora_alpha``, or None.
        targets: names of modules, or a pattern.
        modules: the number of modules with weights.
        layers: the number of numbered layers that contain them.
        dtypes: the dtypes of its weights, such as ``"bfloat16"``.
        parameters: the number of parameters.
        bytes: the size of its weights.
        task: PEFT's task type, such as ``"CAUSAL_LM"``, or the empty string.
        base: the base model for which it was trained, or the empty string.
        refusal: why an adapter store refuses it, or the empty string.
        tensors: its tensors, by name.
    """

    name: str
    folder: str
    kind: str
    ranks: tuple[int, ...]
    alpha: float | None
    targets: tuple[str, ...] | str
    modules: int
    layers: int
    dtypes: tuple[str, ...]
    parameters: int
    bytes: int
    task: str
    base: str
    refusal: str
    tensors: dict[str, StoredTensor]


def read_contents(name: str, folder: str | os.PathLike) -> Contents:
    """Read an adapter's configuration and the header of its weights.

    Args:
        name: its name in messages.
        folder: a folder written by PEFT's ``save_pretrained``.

    Raises:
        AdapterFileError: files are missing or damaged.
    """
    found = files.find(name, folder, ())
    config = files.parse_config(name, found.config)
    tensors = {each.key: each for each in files.parse_header(name, found.header, found.size)}
    modules = {PARAMETER.sub("", key.removeprefix(PREFIX)) for key in tensors}
    variants = [label for key, label in VARIANTS.items() if config.get(key)]
    alpha = config.get("lora_alpha")
    return Contents(
        name=name,
        folder=os.fspath(folder),
        kind=" ".join([str(config.get("peft_type", "?")), *variants]),
        ranks=tuple(sorted({each.shape[0] for key, each in tensors.items() if _is_lora_a(key) and each.shape})),
        alpha=alpha if type(alpha) in (int, float) else None,
        targets=_targets(config.get("target_modules")),
        modules=len(modules),
        layers=len({index[1] for module in modules if (index := INDEX.search(f"{module}."))}),
        dtypes=tuple(sorted({str(each.dtype).removeprefix("torch.") for each in tensors.values()})),
        parameters=sum(math.prod(each.shape) for each in tensors.values()),
        bytes=sum(math.prod(each.shape) * each.dtype.itemsize for each in tensors.values()),
        task=str(config.get("task_type") or ""),
        base=str(config.get("base_model_name_or_path") or ""),
        refusal=_refusal(name, config, tensors),
        tensors=tensors,
    )


def _refusal(name: str, config: dict[str, Any], tensors: dict[str, StoredTensor]) -> str:
    try:
        read_settings(name, config)
        for key in tensors:
            parse_key(name, key)
    except MultibatchError as error:
        return str(error)
    return ""


def _is_lora_a(key: str) -> bool:
    return ".lora_A." in key or key.endswith(".lora_embedding_A")


def _targets(value: Any) -> tuple[str, ...] | str:
    return tuple(sorted(map(str, value))) if isinstance(value, (list, tuple)) else str(value or "")
