"""LoRA layers for modules of the base model that only stored adapters use.

PEFT would replace the module with a LoRA layer, which renames its parameters. Here the LoRA layer stays outside of the
model: it shares the module's weights, has no adapters, and is used by banks, groups and views. The module stays where
it is, and only its forward is replaced by a handler.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import nn

from peft_multibatch.adapters.checks import HOOKS
from peft_multibatch.adapters.offload import loader
from peft_multibatch.adapters.views import STATE
from peft_multibatch.compat import Conv1D, LoraLayer, lora
from peft_multibatch.errors import AdapterUnsupportedError
from peft_multibatch.layers.patch import is_replaced


def check_plain(name: str, module: nn.Module, parent: nn.Module) -> None:
    """Check that stored adapters can be applied to a module.

    Raises:
        AdapterUnsupportedError: they can't.
    """
    why = ""
    if not isinstance(module, (nn.Linear, Conv1D)):
        why = "not a linear layer"
    elif isinstance(parent, nn.MultiheadAttention):
        why = "part of a MultiheadAttention, which reads its weights without calling it"
    elif "_hf_hook" in module.__dict__ or loader(module) is not None:
        why = "hooked by accelerate, as in models on several devices"
    elif is_replaced(module):
        why = "a module whose forward was replaced"
    elif "weight" not in module._parameters:
        why = "a module whose weight is computed, as by a parametrization or by pruning"
    elif any(parameter.is_meta for parameter in module.parameters()):
        why = "on the meta device"
    if why:
        raise AdapterUnsupportedError(
            f"{name}, of type {type(module).__name__}, is {why}, and an adapter with weights for it was registered: "
            "expected linear layers of a model on one device. Use load_adapter."
        )


def layer_for(module: Any) -> Any:
    """A LoRA layer without adapters that represents a module, and isn't part of any model."""
    layer: Any = lora.Linear.__new__(lora.Linear)
    nn.Module.__init__(layer)
    LoraLayer.__init__(layer, without_patch(module, is_hooked=False))
    layer.fan_in_fan_out = isinstance(module, Conv1D)
    layer._active_adapter = []
    layer.__dict__["_forward_pre_hooks"] = module._forward_pre_hooks  # which groups check
    return layer


def without_patch(module: Any, is_hooked: bool) -> Any:
    """A copy of a module that shares its parameters and has the forward of its class.

    Args:
        module: the module.
        is_hooked: whether its hooks run, including those added later.
    """
    copied = copy.copy(module)
    for key in ("forward", STATE):
        copied.__dict__.pop(key, None)
    if not is_hooked:
        copied.__dict__.update({key: OrderedDict() for key in HOOKS})
    return copied
