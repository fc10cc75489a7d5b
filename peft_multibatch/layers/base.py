"""Running base layers without their adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_multibatch.adapters.views import unpatched


if TYPE_CHECKING:
    from peft_multibatch.compat import LoraLayer


def is_plain(base: nn.Module) -> bool:
    """Whether calling a base layer is equivalent to ``F.linear``."""
    hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    is_own = type(base) is nn.Linear and "forward" not in base.__dict__
    return is_own and not hooked and not nn.modules.module._has_any_global_hook()


def base_output(layer: LoraLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's output without adapters, in a tensor that may be written in place."""
    base = layer.base_layer
    if "forward" in base.__dict__:
        base = unpatched(base)
    if "forward" in base.__dict__ or base._forward_hooks:
        # deltas are added in place, and a hook may have kept the output or returned a tensor it still uses
        return base(x, *args, **kwargs).clone()
    if args or kwargs or not is_plain(base):
        return base(x, *args, **kwargs)
    parameters: dict[str, Any] = base._parameters  # avoids the overhead of calling the module
    return F.linear(x, parameters["weight"], parameters["bias"])


def bare_weights(layers: Iterable[LoraLayer], x: Tensor) -> list[nn.Parameter] | None:
    """The weight of each layer's base layer, if all outputs for ``x`` are ``x @ weight.T`` and nothing else."""
    found = []
    for layer in layers:
        base = layer.base_layer
        if not is_plain(base) or base._parameters["bias"] is not None:
            return None
        weight = base._parameters["weight"]
        if type(weight) is not nn.Parameter or (weight.dtype, weight.device) != (x.dtype, x.device):
            return None
        found.append(weight)
    return found


def frozen_bases(layers: Iterable[LoraLayer], dtype: torch.dtype) -> list[tuple[Tensor, Tensor | None]] | None:
    """Weight and bias of each layer's base layer; None if any of them is trained or isn't a plain linear layer.

    Args:
        layers: the layers.
        dtype: dtype of their input, which the weights must share: float32 or float64.
    """
    found = []
    for layer in layers:
        base = layer.base_layer
        if dtype not in (torch.float32, torch.float64) or not is_plain(base):
            return None
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        for each in (weight, bias):
            if each is not None and (each.requires_grad or each.dtype != dtype or type(each) is not nn.Parameter):
                return None
        found.append((weight, bias))
    return found
