"""Models of Sentence Transformers, whose loops sort by length: every input takes its id along.

``encode`` and ``predict`` sort inputs, cut them into batches, preprocess a batch and call the model with its features.
Here an input goes in as a ``Sample``, a tuple around it that has its entry, and stays one wherever the loop puts it.
Where a batch is preprocessed, samples become a feature beside the others, and where the model is called with these
features, their entries are active. So the loop, its batches and its progress bar are the library's own, and whatever
its order is, nothing depends on it. At the end every sample must have run once.
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
"""Name under which samples travel among the features of their batch."""


class Sample(tuple):
    """An input on its way through a loop. The library takes its length for that of the input inside.

    Attributes:
        entry: what it runs under, as users pass it.
        runs: how often the model was called with it.
    """

    def __new__(cls, value: Any, entry: Any) -> Sample:
        sample = super().__new__(cls, (value,))
        sample.entry, sample.runs = entry, 0
        return sample

    entry: Any
    runs: int


def is_sentence_model(model: Any) -> bool:
    """Whether this is a model of Sentence Transformers, which is never imported for the answer."""
    library = sys.modules.get(SENTENCES)
    names = ("SentenceTransformer", "CrossEncoder", "SparseEncoder", "MultiVectorEncoder")
    classes = tuple(getattr(library, name) for name in names if hasattr(library, name))
    return isinstance(model, classes)


def model_inside(model: Any) -> Any:
    """The model to enable: the one with adapters among those that a model of Sentence Transformers is made of.

    Raises:
        UnsupportedError: there is none, or nobody can tell which.
    """
    if not hasattr(model, "preprocess") or not hasattr(model, "is_singular_input"):
        raise UnsupportedError(
            f"enable got a {type(model).__name__} without preprocess: expected one of sentence-transformers 6.2 or "
            "newer, whose loops can be followed. Install a newer version."
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
            "adapters: expected exactly one with adapters. Pass one of the models inside to enable, and call it by "
            "itself."
        )
    return parts[0]


def with_samples(model: nn.Module) -> list[Callable[[], None]]:
    """Let a model's ``encode`` and ``predict`` take ids, and return what undoes it."""
    loops = [method for method in LOOPS if hasattr(type(model), method)]
    undos = [_replace(model, method, _loop) for method in loops]
    return [*undos, _replace(model, "preprocess", _preprocess), _replace(model, "forward", _forward)]


def _replace(model: nn.Module, method: str, function: Callable[..., Any]) -> Callable[[], None]:
    attribute = own_attribute(model, method)
    own, owner = model.__dict__.get(attribute), weakref.ref(model)

    def wrapper(self, *args, **kwargs):
        # in a copy of the model, what the original had as an attribute of its own belongs to the original
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
        return original(*args, **kwargs)  # which says so
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
            f"{len(samples)} inputs, by ways on which their ids can't be followed: expected every input to be "
            "preprocessed and run once. Call it without ids, for one adapter at a time."
        )
    return found[0] if is_single else found


def _check_loop(model: Any, method: str, given: dict[str, Any]) -> None:
    """Raise where inputs leave the process, or the model's code would hold their ids for good."""
    if given.get("pool") is not None or isinstance(given.get("device"), (list, tuple)):
        raise UnsupportedError(
            f"{method} was called with ids and a pool of processes, whose copies of the model are plain ones: "
            "expected one device and no pool. Call enable in processes of your own, each with a share of the inputs "
            "and of their ids."
        )
    if getattr(model, "_distributed_inference", None) is not None and given.get("device") is None:
        raise UnsupportedError(
            f"{method} was called with ids inside distributed inference, which hands inputs to other ranks without "
            "them: expected each rank to have its own inputs. Split inputs and ids together."
        )
    if model._compiled_call_impl is not None:
        raise UnsupportedError(
            f"{method} was called with ids on a compiled {type(model).__name__}, whose graph would hold them for "
            "good: expected the transformers model inside to be compiled. Call compile on that one instead."
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
            f"inputs with ids were packed into one row, as flash attention reads them without padding: expected "
            f"{len(inputs)} rows. Set unpad_inputs to False on the {type(self).__name__}'s first module."
        )
    features[FEATURE] = list(inputs)
    return features


def _forward(self: Any, handle: Handle | None, original: Any, *args: Any, **kwargs: Any) -> Any:
    features = args[0] if args else kwargs.get("input")
    if torch.compiler.is_compiling():
        if FEATURE in kwargs or (features is not None and FEATURE in features):
            raise UnsupportedError(
                "adapter_ids was passed to a compiled model, whose graph can't take it: expected the ids to be active "
                "around the call. Write: with mb.batch(adapter_ids): compiled_model(...)"
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
            "model: expected a route through it. Pass no ids for such inputs."
        )
    for sample in samples:
        sample.runs += 1
    return found
