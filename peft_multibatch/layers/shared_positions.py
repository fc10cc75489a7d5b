"""Attention in which adapted layers compute one table of positions for all samples.

If the batch has several adapters, every adapter has a different table, and the model has room for only one. So the
method that reads the table runs once per segment, for the samples of one adapter at a time.
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
    "GraniteSpeechEncoderProjector": ("forward",),
    "SeamlessM4TConformerSelfAttention": ("forward",),
    "Swin2SRSelfAttention": ("forward",),
    "Swinv2SelfAttention": ("forward",),
    "Wav2Vec2BertSelfAttention": ("forward",),
    "Wav2Vec2ConformerSelfAttention": ("forward",),
}
"""Attention class -> possible names of its method that combines positions with the rows of samples."""

HAVE_ROWS = ("hidden_states", "query_layer", "key_layer", "attention_mask")
"""Arguments of these methods that have rows of samples, if they have as many rows as the first one."""


class SharedPositions:
    """Replaces a method of an attention module, and runs it once per segment if needed.

    Args:
        module: the attention module.
        name: its name in the model.
        router: finds the active call.
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
        """Restore the module's own method."""
        self._method.undo()
        self._module.__dict__.pop(STATE, None)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method, once per segment if adapted layers in it see positions."""
        call = self.router.current(self)
        if not isinstance(call, Call) or call.plan.runs[0].num_segments < 2:
            return self.original(*args, **kwargs)
        if not self.is_needed:
            try:
                return self.original(*args, **kwargs)
            except RowMappingError:  # layers that see positions have adapters
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
    method.__name__ = name  # bound methods are pickled by name
    return method


METHODS = {name: _method(name) for names in READS_TABLE.values() for name in names}


def _find(module: nn.Module) -> str:
    names = READS_TABLE.get(type(module).__name__, ())
    return next((name for name in names if hasattr(type(module), name)), "")


def attach(known: dict[nn.Module, SharedPositions], names: dict[nn.Module, str], router: Router) -> None:
    """Replace these methods in all modules of the model that have them, and restore those of removed modules.

    Args:
        known: the modules whose methods are replaced; updated.
        names: the model's modules -> the prefix of their children's names.
        router: finds the active call.
    """
    for module in [module for module in known if module not in names]:
        known.pop(module).remove()
    for module, prefix in names.items():
        if module not in known and _find(module):
            known[module] = SharedPositions(module, prefix.rstrip("."), router)
