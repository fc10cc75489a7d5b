"""Attention whose layers see one row of positions for all samples: a part of it runs as a whole, once per segment.

What such a layer gives under several adapters has no place in the model, which makes one table of it for all samples.
So what reads the table runs for the samples of one adapter at a time, under a call of theirs alone.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from peft_multibatch.calls.call import Call
from peft_multibatch.calls.router import Router
from peft_multibatch.errors import RowMappingError
from peft_multibatch.layers.patch import STATE, Replacement, handles, own_attribute
from peft_multibatch.layers.per_segment import label
from peft_multibatch.layers.rows import Outputs


READS_TABLE = {
    "DisentangledSelfAttention": ("disentangled_attention_bias", "disentangled_att_bias"),  # DeBERTa 2 and 1, SEW-D
    "FastSpeech2ConformerAttention": ("forward",),
    "SeamlessM4TConformerSelfAttention": ("forward",),
    "Swin2SRSelfAttention": ("forward",),
    "Swinv2SelfAttention": ("forward",),
    "Wav2Vec2BertSelfAttention": ("forward",),
    "Wav2Vec2ConformerSelfAttention": ("forward",),
}
"""Classes of attention, and what their method may be called in which positions meet the rows of all samples."""

HAVE_ROWS = ("hidden_states", "query_layer", "key_layer", "attention_mask")
"""Arguments of these that have the rows of samples, if they have as many as the first."""


class SharedPositions:
    """A method of a model's attention in whose place it runs once per segment, if it has to.

    Args:
        module: the attention.
        name: its name in the model.
        router: tells which call is active.
    """

    def __init__(self, module: nn.Module, name: str, router: Router) -> None:
        method = _find(module)
        attribute = own_attribute(module, method)
        self.name, self.router = name, router
        self.original: Callable[..., Any] = getattr(module, attribute)
        self.parameters = list(inspect.signature(getattr(type(module), method)).parameters)[1:]
        self.is_needed = False
        module.__dict__[STATE] = self
        self._module = module
        self._method = Replacement(module, attribute, types.MethodType(METHODS[method], module))

    def remove(self) -> None:
        """Put the module's own method back."""
        self._method.undo()
        self._module.__dict__.pop(STATE, None)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the method gives."""
        call = self.router.current(self)
        if not isinstance(call, Call) or call.plan.runs[0].num_segments < 2:
            return self.original(*args, **kwargs)
        if not self.is_needed:
            try:
                return self.original(*args, **kwargs)
            except RowMappingError:  # adapters have something in layers that see positions
                self.is_needed = True
        return self._run_by_segment(call, {**dict(zip(self.parameters, args)), **kwargs})

    def _run_by_segment(self, call: Call, given: dict[str, Any]) -> Any:
        segments, entries = call.plan.runs
        have_rows = {key: given[key] for key in HAVE_ROWS if isinstance(given.get(key), Tensor)}
        first = next(iter(have_rows.values()))
        found, parts = segments.rows(len(first), first.device, self.name), []
        for index, rows in found:
            own = {key: value[rows] for key, value in have_rows.items() if len(value) == len(first)}
            with self.router.routing(functools.partial(call.alone, entries[index])):
                parts.append(self.original(**{**given, **own}))
        labels = [label(entries[index], call.plan) for index, _ in found]
        return Outputs(self.name, segments, parts, labels, lambda *_: 0).joined()

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


def _method(name: str) -> Callable[..., Any]:
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(STATE)
        return getattr(type(self), name)(self, *args, **kwargs) if state is None else state.run(*args, **kwargs)

    handles()(method)
    method.__name__ = name  # by which bound methods are pickled
    return method


METHODS = {name: _method(name) for names in READS_TABLE.values() for name in names}


def _find(module: nn.Module) -> str:
    names = READS_TABLE.get(type(module).__name__, ())
    return next((name for name in names if hasattr(type(module), name)), "")


def attach(known: dict[nn.Module, SharedPositions], names: dict[nn.Module, str], router: Router) -> None:
    """Have these methods run so in all modules that have them, and in no others any more.

    Args:
        known: those that run so; changed.
        names: the model's modules, and how the names of their children begin.
        router: tells which call is active.
    """
    for module in [module for module in known if module not in names]:
        known.pop(module).remove()
    for module, prefix in names.items():
        if module not in known and _find(module):
            known[module] = SharedPositions(module, prefix.rstrip("."), router)
