"""Views of PEFT layers in which certain adapters are active, leaving the layer unchanged for other threads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_multibatch.adapters.offload import are_loaded_when_called
from peft_multibatch.compat import (
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    BufferDict,
    LoraLayer,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    lora,
)
from peft_multibatch.errors import ModelStateError


STATE = "_multibatch"
"""Attribute of a patched module with its ``PatchedLayer``."""

# Layers that, without variants, read all parameters by calling the modules that own them.
CALLS_ITS_PARTS = (lora.Linear, lora.Embedding, lora.Conv1d, lora.Conv2d, lora.Conv3d, ModulesToSaveWrapper)

CONTAINERS = {nn.ModuleDict: "_modules", nn.ParameterDict: "_parameters", BufferDict: "_buffers"}
"""PEFT's containers of modules, parameters and buffers by adapter name -> the attribute with the entries."""

PARTS = ("base_layer", "original_module", "token_adapter")
"""Modules of a layer that are never containers by adapter name."""

OF_MODULES = frozenset(nn.Module().__dict__)
"""Attributes of every module, which aren't dictionaries by adapter name."""


def attribute_of(child: Any) -> str | None:
    """The attribute with a container's entries; None if it isn't a container."""
    return next((CONTAINERS[cls] for cls in CONTAINERS if isinstance(child, cls)), None)


def entries(layer: Any) -> list[dict[str, Any]]:
    """The dictionaries of a layer's modules, parameters and buffers by adapter name."""
    found = []
    for key, child in layer._modules.items():
        attribute = None if key in PARTS else attribute_of(child)
        if attribute is not None:
            found.append(child.__dict__[attribute])
    if isinstance(layer, TrainableTokensWrapper):
        found += entries(layer.token_adapter)
    return found


def settings(layer: Any) -> list[dict[str, Any]]:
    """The dictionaries of a layer's other entries by adapter name: scalings and variants."""
    found = (getattr(layer, key, None) for key in ("scaling", "lora_variant"))
    return [each for each in found if isinstance(each, dict)]


def has(layer: Any, name: str) -> bool:
    """Whether an adapter has entries in a layer."""
    return any(name in each for each in entries(layer))


def view_of(
    layer: Any, sources: Mapping[str, Any], weights: Mapping[str, float] | None = None, runs: bool = True
) -> Any:
    """A shallow copy of a layer in which these adapters, or none, are active. Modules and parameters are shared.

    The view keeps the adapters' entries from ``sources``, and everything else from the layer, even if these change
    later.

    Args:
        layer: the layer.
        sources: the layer, or a view of it, from which each active adapter's entries are taken, by adapter name.
        weights: for a mixture, each adapter's weight, which multiplies its scaling.
        runs: False for a view that is only a source for others.
    """
    view: Any = copy.copy(layer)
    view._disable_adapters = not sources
    view._active_adapter = list(sources)
    for key, value in layer.__dict__.items():
        if type(value) is dict and key not in OF_MODULES:
            own = _own({name: source.__dict__[key] for name, source in sources.items()})
            if own or isinstance(layer, LoraLayer):  # other tuners also have dictionaries with other keys
                view.__dict__[key] = own
    if isinstance(layer, AuxiliaryTrainingWrapper):
        view._adapters = set(sources)
    view._modules = dict(layer._modules)
    if "base_layer" in view._modules:
        view._modules["base_layer"] = unpatched(layer.base_layer)
    for key, child in layer._modules.items():
        attribute = None if key in PARTS else attribute_of(child)
        if attribute is not None:
            own = _own({name: source._modules[key].__dict__[attribute] for name, source in sources.items()})
            if own or isinstance(layer, LoraLayer):
                view._modules[key] = _with(child, attribute, own)
    if weights is not None:
        view.scaling = {key: scaling * weights.get(key, 1.0) for key, scaling in view.scaling.items()}
    if isinstance(layer, TrainableTokensWrapper):  # its inner layer has its own entries, and may lack the adapter
        inner = {name: source.token_adapter for name, source in sources.items() if has(source.token_adapter, name)}
        view._modules["token_adapter"] = view_of(layer.token_adapter, inner, runs=runs)
    # these two write weights into their base module while they run, so it is copied
    elif isinstance(layer, lora.ParamWrapper):
        inner = {name: source.base_layer for name, source in sources.items()}
        is_nested = isinstance(layer.base_layer, lora.ParamWrapper)
        if is_nested:
            view._modules["base_layer"] = view_of(layer.base_layer, inner, weights, runs)
        elif runs:
            view._modules["base_layer"] = _copy_of(view.base_layer)
    elif isinstance(layer, lora.MultiheadAttention):
        inner = {name: source.base_layer.out_proj for name, source in sources.items()}
        out_proj = view_of(layer.base_layer.out_proj, inner, weights, runs)
        if runs:
            base = _copy_of(layer.base_layer)
            out_proj._modules["base_layer"] = _copy_of(out_proj.base_layer)
        else:
            base = copy.copy(layer.base_layer)
            base._modules = dict(base._modules)
        base._modules["out_proj"] = out_proj
        view._modules["base_layer"] = base
        view.merged_adapters, out_proj.merged_adapters = [], []
    return view


def unpatched(base: Any) -> Any:
    """A layer's base module without the handler that it may have for stored adapters."""
    patch = None if isinstance(base, BaseTunerLayer) else base.__dict__.get(STATE)
    return base if patch is None else patch.inner


def holding(layer: Any, name: str, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Any:
    """A view of a LoRA layer with the weights of a stored adapter, as a source for other views.

    Args:
        layer: the layer.
        name: the adapter's name.
        lora_a: ``[R, K]``.
        lora_b: ``[N, R]``.
        scaling: the factor of their product.
    """
    view = view_of(layer, {}, runs=False)
    with torch.inference_mode(False):
        halves = {"lora_A": _linear(lora_a), "lora_B": _linear(lora_b), "lora_dropout": nn.Identity()}
    for key, module in halves.items():
        view._modules[key] = _with(layer._modules[key], "_modules", {name: module})
    view.r, view.lora_alpha, view.scaling = {name: len(lora_a)}, {name: scaling * len(lora_a)}, {name: scaling}
    for key in ("use_dora", "use_rslora", "lora_bias"):
        view.__dict__[key] = {name: False}
    view._disable_adapters, view._active_adapter = False, [name]
    return view


def _linear(weight: Tensor) -> nn.Module:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return module


def check_loaded(view: Any) -> Any:
    """Check that a view's parameters are in memory, or will be loaded when their modules are called. Returns the view.

    Raises:
        ModelStateError: a parameter is offloaded that the layer reads without calling its module.
    """
    read = get_base(view) if view._disable_adapters else view
    if any(parameter.is_meta for parameter in read.parameters()) and not (
        type(view) in CALLS_ITS_PARTS and not getattr(view, "lora_variant", None) and are_loaded_when_called(read)
    ):
        raise ModelStateError(
            f"parameters of a {type(view).__name__} are on the meta device, as with offloading, and the layer reads "
            "them without calling their modules: expected them on a real device. Don't offload this layer."
        )
    return view


def _own(sources: Mapping[str, dict]) -> dict:
    """Each adapter's entry in its own dictionary, if it has one."""
    return {name: source[name] for name, source in sources.items() if name in source}


def _with(container: nn.Module, attribute: str, entries: dict) -> nn.Module:
    """A copy of a container with only these entries."""
    copied = copy.copy(container)
    copied.__dict__[attribute] = entries
    if isinstance(container, nn.ParameterDict):
        copied.__dict__["_keys"] = dict.fromkeys(entries)
    return copied


def _copy_of(module: nn.Module) -> nn.Module:
    """A copy of a module that shares its parameters, which can be replaced without affecting the original."""
    copied = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[name] = dict(module.__dict__[name])
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.requires_grad:
            # gets a separate version counter: parametrizations increase it, and autograd would raise an error
            copied._parameters[name] = nn.Parameter(parameter.data, requires_grad=False)
    return copied


def bare(module: Any) -> Any:
    """A module without any adapters inside. Only modules that contain adapters are copied."""
    module = get_base(module)
    children = {key: child and bare(child) for key, child in module._modules.items()}
    if all(child is module._modules[key] for key, child in children.items()):
        return module
    copied = copy.copy(module)
    copied._modules = children
    return copied


def get_base(layer: Any) -> nn.Module:
    """The module of the base model inside a PEFT layer."""
    while isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
    return layer
