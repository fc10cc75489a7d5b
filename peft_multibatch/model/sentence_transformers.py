"""Adds ids to the ``encode`` and ``predict`` methods of Sentence Transformers, which sort their inputs.

These methods sort inputs by length, divide them into batches, preprocess each batch and call the model with its
features. Here, each input is wrapped in a ``Sample``, a tuple that also has its entry, so the entry stays with the
input in whatever order the loop uses. ``preprocess`` unwraps the samples and adds them to the features, and
``forward`` makes their entries active. The loop, its batches and its progress bar are the library's own. At the end,
it is checked that every sample ran exactly once.
"""

from __future__ import annotations

import copy
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from peft_multibatch.compat import PeftMixedModel, PeftModel
from peft_multibatch.errors import UnsupportedError
from peft_multibatch.layers.patch import STATE, Replacement, own_attribute
from peft_multibatch.model.callers import LOOPS, SENTENCES, reads
from peft_multibatch.model.handle import Handle
from peft_multibatch.model.scan import inner_model
from peft_multibatch.model.wrap import check_length, copy_error, doc_with_ids, pop_ids, with_ids
from peft_multibatch.plan.ids import check_keywords, resolve


FEATURE = "adapter_ids"
"""The name of the feature that has the samples of a batch."""


class Sample(tuple):
    """An input of a loop, with its entry. The library measures the length of the input inside.

    Attributes:
        entry: its adapter or mixture, as users pass it.
        runs: how often the model was called with it.
    """

    def __new__(cls, value: Any, entry: Any) -> Sample:
        sample = super().__new__(cls, (value,))
        sample.entry, sample.runs = entry, 0
        return sample

    entry: Any
    runs: int


def is_sentence_model(model: Any) -> bool:
    """Whether this is a Sentence Transformers model. Doesn't import the library."""
    library = sys.modules.get(SENTENCES)
    names = ("SentenceTransformer", "CrossEncoder", "SparseEncoder", "MultiVectorEncoder")
    classes = tuple(getattr(library, name) for name in names if hasattr(library, name))
    return isinstance(model, classes)


def model_inside(model: Any) -> Any:
    """The transformers model to enable inside a Sentence Transformers model: the one that has adapters.

    Raises:
        UnsupportedError: there isn't exactly one, or the version of Sentence Transformers is too old.
    """
    if not hasattr(model, "preprocess") or not hasattr(model, "is_singular_input"):
        raise UnsupportedError(
            f"enable got a {type(model).__name__} without preprocess: expected sentence-transformers 6.2 or newer. "
            "Install a newer version."
        )
    if hasattr(model, "peft_config"):
        return model
    found: dict[str, nn.Module] = {}
    for name, part in model.named_modules():
        if isinstance(part, (PeftModel, PeftMixedModel, PreTrainedModel)) and not name.startswith(
            tuple(f"{each}." for each in found)
        ):
            found[name] = part
    adapted = [part for part in found.values() if hasattr(inner_model(part), "peft_config")]
    parts = adapted or list(found.values())
    if len(parts) != 1:
        raise UnsupportedError(
            f"enable got a {type(model).__name__} of {len(found)} transformers models, {len(adapted)} of them with "
            "adapters: expected exactly one with adapters. Pass one of the models inside to enable, and call it "
            "directly."
        )
    return parts[0]


def with_samples(model: nn.Module) -> list[Callable[[], None]]:
    """Add ids to a model's ``encode`` and ``predict``. Returns functions that undo it."""
    loops = [method for method in LOOPS if hasattr(type(model), method)]
    undos = [_replace(model, method, _loop) for method in loops]
    return [*undos, _replace(model, "preprocess", _preprocess), _replace(model, "forward", _forward)]


def _replace(model: nn.Module, method: str, function: Callable[..., Any]) -> Callable[[], None]:
    attribute = own_attribute(model, method)
    own, owner = model.__dict__.get(attribute), weakref.ref(model)

    def wrapper(self, *args, **kwargs):
        # a method that was an instance attribute is bound to the original model, not to a copy of it
        is_own = own is not None and owner() is self
        original = own if is_own else types.MethodType(getattr(type(self), method), self)
        return function(self, getattr(self, STATE, None), original, *args, **kwargs)

    known = getattr(type(model), method)
    doc, signature = known.__doc__, inspect.signature(known)
    if method != "preprocess":
        doc, signature = doc_with_ids(known, "input"), with_ids(signature)
    wrapper.__name__, wrapper.__doc__, wrapper.__signature__ = method, doc, signature  # type: ignore[attr-defined]
    return Replacement(model, attribute, types.MethodType(wrapper, model)).undo


def _loop(self: Any, handle: Handle | None, original: Any, *args: Any, **kwargs: Any) -> Any:
    adapter_ids = pop_ids(kwargs)
    check_keywords(original.__name__, kwargs, lambda name: reads(self, name))
    if handle is None:
        if adapter_ids is not None:
            raise copy_error()
        return original(*args, **kwargs)
    call = handle._router.active()
    if adapter_ids is not None:
        handle._refresh()
        entries = resolve(adapter_ids, handle._registry.names)
    elif call is not None:
        entries = list(call.plan.ids)
    else:
        return original(*args, **kwargs)
    given = inspect.signature(original).bind_partial(*args, **kwargs).arguments
    given.update(given.pop("kwargs", {}))
    _check_loop(self, original.__name__, given)
    key = "sentences" if "sentences" in given else "inputs"
    if key not in given:
        return original(*args, **kwargs)  # raises the library's own error
    inputs = given[key]
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "UO":
        inputs = inputs.tolist()
    is_single = self.is_singular_input(inputs)
    values = [inputs] if is_single else list(inputs)
    check_length(len(entries), len(values))
    samples = [
        Sample(value, dict(entry) if isinstance(entry, tuple) else entry) for value, entry in zip(values, entries)
    ]
    given[key] = samples
    found = original(**given)
    if any(sample.runs != 1 for sample in samples):
        raise UnsupportedError(
            f"{original.__name__} with ids called the model {sum(sample.runs for sample in samples)} times for "
            f"{len(samples)} inputs, so their ids may have been lost: expected every input to be preprocessed and "
            "run once. Call it without ids, for one adapter at a time."
        )
    return found[0] if is_single else found


def _check_loop(model: Any, method: str, given: dict[str, Any]) -> None:
    """Check that the loop runs in this process, and that the model isn't compiled as a whole.

    Raises:
        UnsupportedError: it doesn't, or it is.
    """
    if given.get("pool") is not None or isinstance(given.get("device"), (list, tuple)):
        raise UnsupportedError(
            f"{method} was called with ids and a pool of processes, whose copies of the model aren't enabled: "
            "expected one device and no pool. Start your own processes, call enable in each, and give each a share of "
            "the inputs and their ids."
        )
    if getattr(model, "_distributed_inference", None) is not None and given.get("device") is None:
        raise UnsupportedError(
            f"{method} was called with ids inside distributed inference, which sends inputs to other ranks without "
            "their ids: expected each rank to have its own inputs. Split inputs and ids together."
        )
    if model._compiled_call_impl is not None:
        raise UnsupportedError(
            f"{method} was called with ids on a compiled {type(model).__name__}, whose graph would use them for all "
            "later calls: expected only the transformers model inside to be compiled. Call compile on that one "
            "instead."
        )


def _preprocess(self: Any, handle: Handle | None, original: Any, *args: Any, **kwargs: Any) -> Any:
    inputs = args[0] if args else kwargs.get("inputs")
    if not isinstance(inputs, (list, tuple)) or not any(isinstance(value, Sample) for value in inputs):
        return original(*args, **kwargs)
    if args:
        args = ([value[0] for value in inputs], *args[1:])
    else:
        kwargs["inputs"] = [value[0] for value in inputs]
    features = original(*args, **kwargs)
    if len(inputs) > 1 and any(name.startswith("cu_seq_lens") for name in features):
        raise UnsupportedError(
            f"inputs with ids were packed into one row without padding, for flash attention: expected {len(inputs)} "
            f"rows. Set unpad_inputs to False on the {type(self).__name__}'s first module."
        )
    features[FEATURE] = list(inputs)
    return features


def _forward(self: Any, handle: Handle | None, original: Any, *args: Any, **kwargs: Any) -> Any:
    features = args[0] if args else kwargs.get("input")
    if torch.compiler.is_compiling():
        if FEATURE in kwargs or (features is not None and FEATURE in features):
            raise UnsupportedError(
                "adapter_ids was passed to a compiled model, whose graph can't take it: expected a call inside "
                "mb.batch. Write: with mb.batch(adapter_ids): compiled_model(...)"
            )
        return original(*args, **kwargs)
    adapter_ids = pop_ids(kwargs)
    check_keywords("forward", kwargs, lambda name: reads(self, name))
    samples: list[Sample] = []
    if isinstance(features, Mapping) and FEATURE in features and adapter_ids is None:
        features = copy.copy(features)
        adapter_ids = features.pop(FEATURE)  # type: ignore[attr-defined]
        if isinstance(adapter_ids, list) and all(isinstance(value, Sample) for value in adapter_ids):
            samples, adapter_ids = adapter_ids, [value.entry for value in adapter_ids]
        if args:
            args = (features, *args[1:])
        else:
            kwargs["input"] = features
    if adapter_ids is None:
        return original(*args, **kwargs)
    if handle is None:
        raise copy_error()
    with handle._routing(adapter_ids, expands=False) as call:
        found = original(*args, **kwargs)
    if not call.is_used:
        raise UnsupportedError(
            f"adapter_ids was passed for inputs that the {type(self).__name__} sent along a route without the enabled "
            "model: expected a route through that model. Don't pass ids for these inputs."
        )
    for sample in samples:
        sample.runs += 1
    return found
