"""Compiled decoding that looks at layers with adapters once per ``generate`` instead of once per token.

Before it runs compiled code, Dynamo checks everything that was read while the code was traced. For a layer with
adapters this is about 90 values, several times as many as for a plain layer, and the GPU waits meanwhile. ``generate``
compares the same values when it begins. ``Captures.layout`` names them, and is all that is left for Dynamo to check.

A guard is left out only if ``state_of`` has its value. Everything else stays guarded: other modules, layers that
aren't plain, values that another version of PEFT or torch may read, and code that was traced without ids.
"""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_multibatch.adapters.checks import HOOKS
from peft_multibatch.calls.graphs import Graph
from peft_multibatch.layers.base import is_plain
from peft_multibatch.layers.linear import linear
from peft_multibatch.layers.patch import STATE, PatchedLayer, Replacement


CALLS = {"__call__", "_call_impl", "_compiled_call_impl"}
"""Attributes that replace how a module is called."""


class Decoding:
    """Makes ``generate`` compile decoding of a model with fewer guards.

    Args:
        graph: the state that compiled code reads.
        layers: returns the patched layers.
    """

    def __init__(self, graph: Graph, layers: Callable[[], Collection[PatchedLayer]]) -> None:
        self._layers, self._graph = layers, graph
        self._plain: frozenset[str] = frozenset()  # names of layers whose guards aren't needed

        def keep(guards: Sequence[Any]) -> list[bool]:
            """Which of Dynamo's guards it has to check."""
            is_guarded = any(guard.name.endswith(".captures.layout") for guard in guards)
            if not is_guarded or not graph.here.thread.active:  # a part of the model, or a call without ids
                return [True] * len(guards)
            return [not self._covers(guard.name) for guard in guards]

        self._keep = keep  # a function, because transformers copies options, and a method's object with them

    def attach(self, model: nn.Module) -> Callable[[], None]:
        """Replace the model's ``get_compiled_call``, with which ``generate`` begins. Returns a function to undo it."""
        original = getattr(type(model), "get_compiled_call", None)
        if original is None:
            return lambda: None

        def get_compiled_call(self, compile_config):
            handle = getattr(self, STATE, None)
            if handle is not None:  # not a copy of an enabled model
                compile_config = handle._decoding.prepare(self, compile_config)
            return original(self, compile_config)

        return Replacement(model, "get_compiled_call", types.MethodType(get_compiled_call, model)).undo

    def prepare(self, model: Any, config: Any) -> Any:
        """Compare the layers with the last time, and return how ``generate`` compiles decoding.

        Args:
            model: the model.
            config: transformers' ``CompileConfig``, or None for its default.
        """
        states = tuple((layer.name, state_of(layer)) for layer in self._layers())
        self._plain = frozenset(name for name, state in states if state is not None)
        self._graph.captures.describe(states)
        found = copy.copy(model._default_compile_config() if config is None else config)
        has_own_modes = found.backend != "inductor" and found.mode is not None
        if has_own_modes or "guard_filter_fn" in (found.options or {}):
            return config
        # torch takes either a mode or options
        options = {} if found.mode is None else torch._inductor.list_mode_options(found.mode, found.dynamic)
        found.mode, found.options = None, {**options, **(found.options or {}), "guard_filter_fn": self._keep}
        return found

    def _covers(self, guard: str) -> bool:
        """Whether ``state_of`` has the value of a guard."""
        found = _GUARD.fullmatch(guard.replace("._modules['base_layer']", ".base_layer"))
        return found is not None and ".".join(_KEY.findall(found[1])) in self._plain


def state_of(layer: PatchedLayer) -> tuple | None:
    """What compiled code with kernels reads of a layer, besides its tables; None if that may be something else."""
    module, bank, group = layer.module, layer.bank, layer.group
    attributes = module.__dict__
    if (
        bank is None
        or bank.is_split
        or layer.handler is not linear
        or not layer.is_in_place
        or not CALLS.isdisjoint(attributes)
        or any(attributes[hooks] for hooks in HOOKS)
        or module.merged_adapters
        or module._disable_adapters
        or not is_plain(module.base_layer)
    ):
        return None
    base = module.base_layer._parameters
    whole = (None, None) if group is None else (group[0]._weight, group[0]._bias)
    slices = None if group is None else (group[0].bank.key, group[1])
    # a bank belongs to one layer or group, and its key to no other bank
    return type(module), bank.key, slices, *(map(_form, (base["weight"], base["bias"], *whole)))


def _form(tensor: Tensor | None) -> tuple | None:
    if tensor is None:
        return None
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.requires_grad


# The values that ``state_of`` has or compares, by their names in Dynamo's guards, with ``base_layer`` as an attribute.
_HOOKS = r"\._(?:forward|backward)(?:_pre)?_hooks"
_BANK = r"\.bank(?:\.key|\.is_split|\.widths(?:\[\d\])?|\.layers(?:\[\d\])?|\.graph_tables(?:\[\d+\](?:\.\w+)?)?)?"
_GROUP = rf"\.group(?:\[1\]|\[0\](?:\._weight|\._bias|{_BANK})?)?"
_LAYER = rf"""(?:
    | {_HOOKS} | \.merged_adapters | \._disable_adapters | \._parameters | \._modules
    | \.forward(?:\.__func__|\.__self__)?
    | \.base_layer(?:{_HOOKS} | \._parameters(?:\['(?:weight|bias)'\])?)?
    | \._multibatch(?:\.router | {_BANK} | {_GROUP})?
)"""
_KEY = re.compile(r"\['([^']*)'\]")
_GUARD = re.compile(
    rf"""(?:dict\()?(?:type\()? self ((?:\._modules\['[^']*'\])+)
    (?:\._multibatch\.group\[0\]\.bank\.layers\[\d\])? {_LAYER}
    \)?(?:\.__dict__\) | \.__mro__\[\d\]\.__dict__\)\['_compiled_call_impl'\])?""",
    re.VERBOSE,
)
