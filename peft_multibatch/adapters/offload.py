"""Weights that accelerate keeps in memory or on disk between forwards, and loads when their own module is called.

What stands in their place in the meantime is on the meta device, and torch may compute with it without an error.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def loader(module: nn.Module) -> Any:
    """The hook of accelerate's that loads a module's weights when it is called; None where there is none."""
    hook = module.__dict__.get("_hf_hook")
    return next((each for each in getattr(hook, "hooks", [hook]) if getattr(each, "offload", False)), None)


def onloaded(module: nn.Module, beside: nn.Module) -> Tensor | None:
    """A module's weight where it is needed: itself wherever possible, a copy where it or its neighbour is offloaded.

    Args:
        module: a module that isn't called, so that its hook loads nothing.
        beside: one that is called on the same device.
    """
    weight: Tensor | None = module._parameters.get("weight")
    own, other = loader(module), loader(beside)
    if weight is not None and weight.is_meta and own is not None:
        return own.weights_map["weight"].to(own.execution_device, weight.dtype)
    if weight is not None and not weight.is_meta and other is not None:  # PEFT makes new adapters on the CPU
        return weight.to(other.execution_device)
    return weight


def are_loaded_when_called(layer: nn.Module) -> bool:
    """Whether every offloaded parameter under a layer belongs to a module that loads it when it is called."""
    return all(
        loader(module) is not None and not isinstance(module, (nn.ParameterDict, nn.ParameterList))
        for module in layer.modules()
        if any(parameter is not None and parameter.is_meta for parameter in module._parameters.values())
    )


def comes_later(layer: Any, name: str) -> bool:
    """Whether a layer's weights are offloaded until they, or the part of the model around them, run."""
    for module in (layer.lora_A._modules.get(name), layer.lora_B._modules.get(name)):
        weight = None if module is None else module._parameters.get("weight")
        if module is not None and weight is not None and weight.is_meta:
            base = layer.get_base_layer()
            is_around = loader(base) is None and any(parameter.is_meta for parameter in base.parameters())
            return loader(module) is not None or is_around
    return False
