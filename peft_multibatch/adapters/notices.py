"""Changes that are noticed when they happen, so that calls don't have to check for them.

torch has hooks for modules and parameters that are registered in a module, and it numbers hook handles. It has none
for a tensor that gets different memory (``.data = ``, ``set_``, ``swap_tensors``), for direct writes to a module's
dictionaries, or for a replaced forward; for these, each call checks the adapters that it needs.
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
    """Notified of PEFT layers before they are inserted into a model."""

    def layer_comes(self, parent: nn.Module, key: str, layer: Any) -> None: ...


listeners: weakref.WeakSet[Any] = weakref.WeakSet()


class _Noticed:
    registrations = 0


def now() -> tuple[int, int]:
    """A value that changes with every change that may concern an adapter."""
    return torch.utils.hooks.RemovableHandle.next_id, _Noticed.registrations


LAYERS = BaseTunerLayer, AuxiliaryTrainingWrapper
CHANGED = *CONTAINERS, *LAYERS


def _parameter(module: nn.Module, key: str, parameter: Any) -> None:
    # calls check weights themselves; in compiled code this would be part of the graph and cause recompilation
    if key == "bias" and parameter is not None and not torch.compiler.is_compiling():
        _Noticed.registrations += 1


def _module(parent: nn.Module, key: str, child: Any) -> None:
    if torch.compiler.is_compiling():
        return
    # adapters' modules are in containers by name, and so are parametrizations. Module lists don't count, because
    # models slice their lists of layers in forward
    if isinstance(child, CHANGED) or isinstance(parent, CHANGED):
        _Noticed.registrations += 1
    if isinstance(child, LAYERS):
        for listener in list(listeners):
            listener.layer_comes(parent, key, child)


# never removed: torch iterates over its hooks, which must not change meanwhile
register_module_parameter_registration_hook(_parameter)
register_module_module_registration_hook(_module)
