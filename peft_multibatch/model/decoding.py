"""Compiled decoding that looks at layers with adapters once per ``generate`` instead of once per token.

Before it runs compiled code, Dynamo checks everything that was read while the code was traced. For a layer with
adapters this is about 90 values, several times as many as for a plain layer, and the GPU waits meanwhile. ``generate``
compares the same values when it begins. ``Captures.layout`` names them, and is all that is left for Dynamo to check.

A guard is left out only if ``state_of`` has its value, which holds for plain layers. Everything else stays guarded:
other layers, with the rest of their group, other modules, whether parameters are shared, values that another version
of PEFT or torch may read, and code that was traced without ids, outside of ``generate``, or while a layer changed.
"""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_multibatch.adapters.checks import HOOKS
from peft_multibatch.calls.call import Call
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
        call: returns the active call.
        layers: returns the patched layers.
    """

    def __init__(
        self, graph: Graph, call: Callable[[], Call | None], layers: Callable[[], Collection[PatchedLayer]]
    ) -> None:
        self._layers, self._graph = layers, graph

        def keep(guards: Sequence[Any]) -> list[bool]:
            """Which of Dynamo's guards it has to check."""
            is_named = any(guard.name.endswith(".captures.layout") for guard in guards)
            states, active = self._states(), call()
            # a part of the model, a call that isn't `generate`, or a layer that has changed since `prepare`
            if not is_named or active is None or not active.expands or graph.captures.described != _named(states):
                return [True] * len(guards)
            plain = {layer.name for layer in states if _is_plain(layer, states)}
            return [not self._covers(guard, plain) for guard in guards]

        self._keep = keep  # a function, because transformers copies options, and a method's object with them

    def attach(self, model: nn.Module) -> Callable[[], None]:
        """Replace the model's ``get_compiled_call``, with which ``generate`` begins. Returns a function to undo it."""
        original = getattr(type(model), "get_compiled_call", None)
        if original is None or "get_compiled_call" in model.__dict__:
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
        self._graph.captures.describe(_named(self._states()))
        found = copy.copy(model._default_compile_config() if config is None else config)
        # torch takes either a mode or options, and other backends have modes of their own
        is_fixed = found.mode is not None and (found.backend != "inductor" or found.options is not None)
        if is_fixed or "guard_filter_fn" in (found.options or {}):
            return config
        options = {} if found.mode is None else torch._inductor.list_mode_options(found.mode, found.dynamic)
        found.mode, found.options = None, {**options, **(found.options or {}), "guard_filter_fn": self._keep}
        return found

    def _states(self) -> dict[PatchedLayer, tuple | None]:
        return {layer: state_of(layer) for layer in self._layers()}

    def _covers(self, guard: Any, plain: Collection[str]) -> bool:
        """Whether ``state_of`` has the value of a guard, given the names of the plain layers."""
        found = _GUARD.fullmatch(guard.name.replace("._modules['base_layer']", ".base_layer"))
        if found is None or ".".join(_KEY.findall(found[1])) not in plain or guard.guard_type not in _TYPES:
            return False
        return guard.guard_type != "DUPLICATE_INPUT" or _OF_BASE.search(found[0]) is None  # a parameter may be shared


def _named(states: Mapping[PatchedLayer, tuple | None]) -> tuple:
    return tuple((layer.name, state) for layer, state in states.items())


def _is_plain(layer: PatchedLayer, states: Mapping[PatchedLayer, tuple | None]) -> bool:
    """Whether ``state_of`` has everything of a layer and its group, whose first layer runs all of them."""
    group = (layer.module,) if layer.group is None else layer.group[0].layers
    return all(states.get(each.__dict__[STATE]) is not None for each in group)


def state_of(layer: PatchedLayer) -> tuple | None:
    """What compiled code with kernels reads of a layer, besides its tables; None if that may be something else."""
    module, place, bank, group = layer.module, layer.place, layer.bank, layer.group
    if (
        bank is None
        or bank.is_split
        or layer.handler is not linear
        or not layer.is_in_place
        or any(_is_called_in_another_way(each) for each in (module, place))
        or module.merged_adapters
        or module._disable_adapters
        or not is_plain(module.base_layer)
    ):
        return None
    base = module.base_layer._parameters
    if "weight" not in base or (place is not module and type(place) is not type(module.base_layer)):
        return None
    tensors = (
        base["weight"],
        base.get("bias"),
        *((None, None) if group is None else (group[0]._weight, group[0]._bias)),
    )
    if any(type(each) not in (nn.Parameter, Tensor) for each in tensors if each is not None):
        return None
    slices = None if group is None else (group[0].bank.key, group[1])
    # a bank belongs to one layer or group, and its key to no other bank
    return type(module), type(place), bank.key, slices, *map(_form, tensors)


def _is_called_in_another_way(module: nn.Module) -> bool:
    attributes = module.__dict__
    return not CALLS.isdisjoint(attributes) or any(attributes[hooks] for hooks in HOOKS)


def _form(tensor: Tensor | None) -> tuple | None:
    if tensor is None:
        return None
    sizes = tensor.shape, tensor.stride()
    return type(tensor), tensor.dtype, tensor.device, *sizes, tensor.requires_grad, tensor.is_inference()


# The values that ``state_of`` has or compares, by their names in Dynamo's guards, with ``base_layer`` as an attribute.
_HOOKS = r"\._(?:forward|backward)(?:_pre)?_hooks"
_BANK = r"\.bank(?:\.key|\.is_split|\.widths(?:\[\d\])?|\.layers(?:\[\d\])?|\.graph_tables(?:\[\d+\](?:\.\w+)?)?)?"
_GROUP = rf"\.group(?:\[1\]|\[0\](?:\._weight|\._bias|{_BANK})?)?"
_LAYER = rf"""(?:
    | {_HOOKS} | \.merged_adapters | \._disable_adapters | \._parameters | \._modules
    | \.forward(?:\.__func__|\.__self__)?
    | \.base_layer(?:{_HOOKS} | \._parameters(?:\['(?:weight|bias)'\])?)?
    | \._multibatch(?:\.router | \.handler | {_BANK} | {_GROUP})?
)"""
_TYPES = {
    "CLASS_MATCH", "CLOSURE_MATCH", "CONSTANT_MATCH", "DICT_NOT_CONTAINS", "DUPLICATE_INPUT", "EQUALS_MATCH",
    "EMPTY_NN_MODULE_HOOKS_DICT", "NOT_PRESENT_IN_GENERIC_DICT", "SEQUENCE_LENGTH", "TENSOR_MATCH", "TYPE_MATCH",
}  # fmt: skip
_OF_BASE = re.compile(r"base_layer|\._weight|\._bias")
_KEY = re.compile(r"\['([^']*)'\]")
_GUARD = re.compile(
    rf"""(?:dict\()?(?:type\()? self ((?:\._modules\['[^']*'\])+)
    (?:\._multibatch(?:\.module | \.group\[0\]\.bank\.layers\[\d\]))? {_LAYER}
    \)?(?:\.__dict__\) | \.__mro__\[\d\]\.__dict__\)\['_compiled_call_impl'\])?""",
    re.VERBOSE,
)
