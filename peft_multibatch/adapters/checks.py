"""What makes an adapter fit a layer: whatever kernels read without asking must be as they take it to be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_multibatch.adapters.shards import own, split_of
from peft_multibatch.errors import AdapterMismatchError


if TYPE_CHECKING:
    from peft_multibatch.compat import LoraLayer


def check_halves(name: str, layer: LoraLayer) -> None:
    """Raise where a layer has a part of an adapter and lacks another.

    Raises:
        AdapterMismatchError: it does.
    """
    parts = {"lora_A": layer.lora_A, "lora_B": layer.lora_B, "scaling": layer.scaling}
    missing = [what for what, found in parts.items() if name not in found]
    if missing:
        there = ", ".join(what for what in parts if what not in missing)
        raise AdapterMismatchError(
            f"adapter {name!r} has {there} and no {', '.join(missing)} in a layer: expected all of them. Load the "
            "adapter again from complete files; rows without it are not affected."
        )


def check_fit(name: str, layer: LoraLayer, lora_a: Tensor, lora_b: Tensor, scaling: Any) -> None:
    """Raise where weights don't fit each other or their base layer, or can't be scaled.

    Args:
        name: the adapter's name.
        layer: the LoRA layer.
        lora_a: its ``lora_A``, expected to be ``[rank, in_features]``.
        lora_b: its ``lora_B``, expected to be ``[out_features, rank]``.
        scaling: PEFT's scaling, a number or a tensor of one.

    Raises:
        AdapterMismatchError: they don't.
    """
    base: Any = layer.get_base_layer()
    inputs, outputs = layer.in_features, layer.out_features
    if split_of(layer) is not None:
        outputs, inputs = own(base.weight).shape
    a, b = own(lora_a), own(lora_b)
    fits = (
        a.dim() == b.dim() == 2
        and a.shape[0] == b.shape[1]
        and a.shape[1] in (inputs, layer.in_features)
        and b.shape[0] in (outputs, layer.out_features)
    )
    if not fits:
        raise AdapterMismatchError(
            f"adapter {name!r} has lora_A of shape {list(a.shape)} and lora_B of shape {list(b.shape)} in a layer of "
            f"{inputs} inputs and {outputs} outputs: expected [rank, {inputs}] and [{outputs}, rank]. Load it again "
            "from files made for this model; rows without it are not affected."
        )
    if not (a.is_floating_point() and b.is_floating_point()):
        raise AdapterMismatchError(
            f"adapter {name!r} has weights of {a.dtype} and {b.dtype}: expected floating-point weights. Convert the "
            "adapter; rows without it are not affected."
        )
    number = float(scaling)
    if not math.isfinite(number) or abs(number) > torch.finfo(torch.float32).max:
        raise AdapterMismatchError(
            f"adapter {name!r} has a scaling of {number:g}: expected a finite number in float32, which lora_alpha / r "
            "gives. Set another lora_alpha; rows without it are not affected."
        )
