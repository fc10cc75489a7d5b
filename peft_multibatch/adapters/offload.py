"""Weights that accelerate offloads to memory or disk, and loads when their module is called.

Between calls, their parameters are on the meta device, and torch may compute with these without an error.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn


if TYPE_CHECKING:
    from peft_multibatch.compat import LoraLayer


def loader(module: nn.Module) -> Any:
    """The accelerate hook that loads a module's weights when it is called, or None."""
    hook = module.__dict__.get("_hf_hook")
    return next((each for each in getattr(hook, "hooks", [hook]) if getattr(each, "offload", False)), None)


def onloaded(module: nn.Module, beside: nn.Module) -> Tensor | None:
    """A module's weight on the device where it is used: a copy if it or its base layer is offloaded, else itself.

    Args:
        module: a module whose forward isn't called, so that its hook doesn't load it.
        beside: its base layer, which is called.
    """
    weight: Tensor | None = module._parameters.get("weight")
    own, other = loader(module), loader(beside)
    if weight is not None and weight.is_meta and own is not None:
        return own.weights_map["weight"].to(own.execution_device, weight.dtype)
    if weight is not None and not weight.is_meta and other is not None:  # PEFT creates new adapters on the CPU
        return weight.to(other.execution_device)
    return weight


def are_loaded_when_called(layer: nn.Module) -> bool:
    """Whether every offloaded parameter of a layer belongs to a module that loads it when it is called."""
    return all(
        loader(module) is not None and not isinstance(module, (nn.ParameterDict, nn.ParameterList))
        for module in layer.modules()
        if any(parameter is not None and parameter.is_meta for parameter in module._parameters.values())
    )


def comes_later(layer: Any, name: str) -> bool:
    """Whether an adapter's weights in a layer are offloaded until they, or the module around the layer, run."""
    for module in (layer.lora_A._modules.get(name), layer.lora_B._modules.get(name)):
        weight = None if module is None else module._parameters.get("weight")
        if module is not None and weight is not None and weight.is_meta:
            base = layer.get_base_layer()
            is_around = loader(base) is None and any(parameter.is_meta for parameter in base.parameters())
            return loader(module) is not None or is_around
    return False


def base_device(layer: LoraLayer) -> torch.device:
    """The device on which the base layer runs, also if its weights are quantized or offloaded."""
    base = layer.get_base_layer()
    hook = loader(base)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    return next(itertools.chain(base.parameters(), base.buffers())).device
