"""A layer as it is when certain adapters are active, without touching the layer, which other threads may be using."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from peft_multibatch.adapters.offload import are_loaded_when_called
from peft_multibatch.compat import (
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    LoraLayer,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    lora,
)
from peft_multibatch.errors import ModelStateError, UnsupportedError
from peft_multibatch.plan.segments import BASE


if TYPE_CHECKING:
    from peft_multibatch.layers.patch import Patch
    from peft_multibatch.plan.ids import Entry

# Layers that read no parameter but through the forward of the module that holds it, as long as no variant does.
CALLS_ITS_PARTS = (lora.Linear, lora.Embedding, lora.Conv1d, lora.Conv2d, lora.Conv3d, ModulesToSaveWrapper)


def view_for(layer: Any, entry: Entry, patch: Patch) -> Any:
    """The same layer with what one entry names active: an adapter, several with their weights, or none.

    Raises:
        UnsupportedError: a mixture of adapters whose outputs here aren't sums of deltas.
    """
    names = patch.router.names
    if not isinstance(entry, tuple):
        return single_adapter_view(layer, None if entry == BASE else names[entry])
    weights = {str(names[slot]): weight for slot, weight in entry}
    if isinstance(layer, LoraLayer) and not layer.lora_variant.keys() & weights.keys():
        return single_adapter_view(layer, list(weights), weights)
    present = sorted(adapters_of(layer) & weights.keys())
    if present:
        raise UnsupportedError(
            f"a mixture names adapter {present[0]!r}, and in {patch.name} what it gives isn't a delta that can be "
            f"weighted ({type(layer).__name__}): expected plain LoRA, without variants, copies of modules and trained "
            "tokens. Give the row one adapter alone, or leave that adapter out of mixtures."
        )
    return single_adapter_view(layer, None)


def adapters_of(layer: Any) -> set[str]:
    """Names of the adapters that a PEFT layer has something for."""
    if isinstance(layer, BaseTunerLayer):
        return set(layer._get_available_adapters())
    if isinstance(layer, TrainableTokensWrapper):
        return set(layer.token_adapter.trainable_tokens_delta)
    return set(layer.modules_to_save)


def single_adapter_view(layer: nn.Module, name: str | list[str] | None, weights: dict | None = None) -> Any:
    """The same layer, its modules and parameters shared, with one adapter active, or with none.

    The layer's own attributes stay untouched, because other threads may be using them.

    Args:
        layer: the layer.
        name: the adapter, or the adapters of a mixture.
        weights: of a mixture, what each adapter counts beside its scaling.
    """
    if any(parameter.is_meta for parameter in layer.parameters()) and not (
        type(layer) in CALLS_ITS_PARTS and not getattr(layer, "lora_variant", None) and are_loaded_when_called(layer)
    ):
        raise ModelStateError(
            f"parameters of a {type(layer).__name__} are on the meta device, as offloading leaves them between calls, "
            "and it reads them without calling their modules: expected them on a real device. Leave this layer out of "
            "what is offloaded."
        )
    view: Any = copy.copy(layer)
    view._disable_adapters = name is None
    view._active_adapter = name if isinstance(name, list) else [name] if name is not None else []
    if weights is not None:
        view.scaling = {key: scaling * weights.get(key, 1.0) for key, scaling in view.scaling.items()}
    if isinstance(layer, TrainableTokensWrapper):  # what does the work has a state of its own, and may lack the name
        tokens = layer.token_adapter
        own = single_adapter_view(tokens, name if name in tokens.trainable_tokens_delta else None)
        view._modules = {**layer._modules, "token_adapter": own}
    # these two put weights into the base module while they run: into a copy of it, here
    elif isinstance(layer, lora.ParamWrapper):
        is_nested = isinstance(layer.base_layer, lora.ParamWrapper)
        base = single_adapter_view(layer.base_layer, name, weights) if is_nested else _copy_of(layer.base_layer)
        view._modules = {**layer._modules, "base_layer": base}
    elif isinstance(layer, lora.MultiheadAttention):
        base, out_proj = _copy_of(layer.base_layer), single_adapter_view(layer.base_layer.out_proj, name, weights)
        out_proj._modules = {**out_proj._modules, "base_layer": _copy_of(out_proj.base_layer)}
        base._modules["out_proj"] = out_proj
        view._modules = {**layer._modules, "base_layer": base}
        view.merged_adapters, out_proj.merged_adapters = [], []
    return view


def _copy_of(module: nn.Module) -> nn.Module:
    """A module with the same parameters that may be replaced without touching the original's."""
    copied = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[name] = dict(module.__dict__[name])
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.requires_grad:
            # with a version counter of its own: parametrizations count as changes, which autograd would complain of
            copied._parameters[name] = nn.Parameter(parameter.data, requires_grad=False)
    return copied


def get_base(layer: Any) -> nn.Module:
    """The module of the base model that a PEFT layer stands for."""
    while isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
    return layer
