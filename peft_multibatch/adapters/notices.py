"""What is noticed when it happens, and so needn't be looked for: hooks, and modules and parameters that come in.

torch tells whoever asks of every module and every parameter that becomes part of another module, and counts hooks. It
tells nobody when a tensor gets other memory (``.data = ``, ``set_``, ``swap_tensors``), when a module's dictionaries
are written behind its back, or when a forward is replaced; for these a call looks at the adapters that it needs.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from peft_multibatch.adapters.views import CONTAINERS
from peft_multibatch.compat import AuxiliaryTrainingWrapper, BaseTunerLayer


class Listener(Protocol):
    """Hears of PEFT layers before they are part of a model."""

    def layer_comes(self, parent: nn.Module, key: str, layer: Any) -> None: ...


listeners: weakref.WeakSet[Any] = weakref.WeakSet()


class _Noticed:
    registrations = 0


def now() -> tuple[int, int]:
    """Another value whenever something was noticed that may concern an adapter."""
    return torch.utils.hooks.RemovableHandle.next_id, _Noticed.registrations


LAYERS = BaseTunerLayer, AuxiliaryTrainingWrapper
CHANGED = *CONTAINERS, *LAYERS


def _parameter(module: nn.Module, key: str, parameter: Any) -> None:
    # of weights a call looks at each; in compiled code this would be part of the graph, and a reason to compile anew
    if key == "bias" and parameter is not None and not torch.compiler.is_compiling():
        _Noticed.registrations += 1


def _module(parent: nn.Module, key: str, child: Any) -> None:
    if torch.compiler.is_compiling():
        return
    # what adapters have is in containers by their names, and parametrizations come in one; slices of a model's layers,
    # which models make as they run, are lists
    if isinstance(child, CHANGED) or isinstance(parent, CHANGED):
        _Noticed.registrations += 1
    if isinstance(child, LAYERS):
        for listener in list(listeners):
            listener.layer_comes(parent, key, child)


# for as long as the process lives: torch iterates over its hooks, which must not change while it does
register_module_parameter_registration_hook(_parameter)
register_module_module_registration_hook(_module)
