"""Adds ``adapter_ids`` to a model's ``forward`` and ``generate``, and checks a call before it runs."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_multibatch.calls.call import Call, Invocations
from peft_multibatch.calls.origin import Origin
from peft_multibatch.compat import calculate_alora_offsets
from peft_multibatch.errors import (
    AdapterIdsError,
    AdapterIdsLengthError,
    ModelStateError,
    NotEnabledError,
    UnsupportedError,
)
from peft_multibatch.layers.architectures import is_dual_encoder
from peft_multibatch.layers.patch import STATE, Replacement, own_attribute
from peft_multibatch.model.callers import cache_of, check_order, check_prompts, check_trainer, reads, without_cached
from peft_multibatch.plan.ids import DESCRIPTION, check_keywords, speaks_of_adapters
from peft_multibatch.plan.segments import BASE


# Arguments that may contain the samples, in order of preference.
INPUTS = (
    "input_ids",
    "inputs",
    "inputs_embeds",
    "input_features",
    "input_values",
    "pixel_values",
    "past_values",
    "decoder_input_ids",
)


UNPREPARED = "_original_forward"
"""Attribute in which accelerate's prepare saves a model's forward, until unwrap_model restores it."""


def wrap(module: nn.Module, method: str) -> Callable[[], None]:
    """Add ids to a model's ``forward`` or ``generate``. Returns a function that undoes it."""
    function = getattr(type(module), method, None)
    if function is None:
        return lambda: None
    attribute = own_attribute(module, method)
    own, owner = module.__dict__.get(attribute), weakref.ref(module)
    parameters = frozenset([*inspect.signature(function).parameters][1:])
    order = _order(function, getattr(type(getattr(module.__dict__.get(STATE), "_inner", module)), method, function))
    unprepared = module.__dict__.get(UNPREPARED) if method == "forward" else None

    def note(self, handle, call, args, kwargs, begins=False):
        """Note the arguments for parts of the model that encode media."""
        if call is None or not handle._encoders:
            return
        is_whole = self is handle._inner or self is handle._outer
        if any(self is model for model, _ in handle._encoders) or (begins and not is_whole):
            given = {**dict(zip(order, args)), **kwargs}
            call.note_arguments(self, without_cached(given) if method == "generate" else given)
        elif is_whole:
            call.note_arguments(self, {})  # a model inside it will note its own

    def wrapper(self, *args, **kwargs):
        handle: Any = getattr(self, STATE, None)
        # a method that was an instance attribute is bound to the original model, not to a copy of it
        original = functools.partial(function, self) if own is None or owner() is not self else own
        if unprepared is not None and UNPREPARED not in self.__dict__ and owner() is self:
            original = unprepared
        if args and args[0] is self:  # accelerate's unwrap_model binds the method even if it is bound already
            args = args[1:]
        passed = "adapter_ids" in kwargs or "adapter_names" in kwargs
        if torch.compiler.is_compiling():
            is_asked = self is getattr(handle, "_inner", self)  # not the PeftModel, which accepts any keyword
            if passed or (is_asked and any(speaks_of_adapters(name) for name in kwargs if name not in parameters)):
                raise UnsupportedError(
                    "adapter_ids was passed to a compiled model, whose graph can't take it: expected a call inside "
                    "mb.batch. Write: with mb.batch(adapter_ids): compiled_model(...)"
                )
            if handle is not None and self is handle._inner:
                thread = handle._router.graph.here.thread
                assert handle._router.graph.captures.layout  # a guard; see `Decoding`
                if thread.samples:
                    check_length(thread.samples, _num_samples(None, order, args, kwargs))
                if handle._encoders:
                    torch.compiler.disable(note)(self, handle, handle._router.active(), args, kwargs)
            return original(*args, **kwargs)
        if handle is not None:
            _check_attention(self, kwargs)
        adapter_ids = pop_ids(kwargs) if passed else None
        check_keywords(method, kwargs, lambda name: reads(self, name, kwargs.get("custom_generate")))
        if adapter_ids is not None and handle is None:
            raise copy_error()
        call = handle._router.look() if handle is not None and adapter_ids is None else None
        if handle is not None and (call is None or not call.inside):
            check_trainer(handle, adapter_ids is not None or call is not None)
        if handle is None or (adapter_ids is None and call is None):
            return original(*args, **kwargs)
        samples = _num_samples(self, order, args, kwargs)
        if method == "generate":
            if kwargs.get("generation_mode") == "image":
                raise UnsupportedError(
                    "generate was called with ids and generation_mode='image', for which Janus appends rows without "
                    "a prompt to the batch: expected the rows of each sample next to each other. Generate images "
                    "without ids, one adapter at a time."
                )
            _check_cache(self, kwargs)
            samples = 1 if samples is None else samples  # transformers' default without inputs
        if adapter_ids is not None:
            with handle._routing(adapter_ids, method == "generate", samples) as own_call:
                note(self, handle, own_call, args, kwargs, begins=True)
                return _run(handle, own_call, original, args, kwargs)
        assert call is not None
        if call.inside:
            note(self, handle, call, args, kwargs)
            if self is handle._inner:
                call.check_rows(samples)
                if method == "forward":
                    if call.invocations is not None:
                        call.invocations.step(*_num_tokens(args, kwargs))
                    if call.prompts is not None:
                        check_prompts(call, kwargs.get("input_ids", args[0] if args else None), kwargs)
            return original(*args, **kwargs)
        # a block of `batch()` is open, and the model may have changed since it was entered
        base_layers = handle._check(call.plan.ids_in_use)
        if not handle._has_layers(self):
            return original(*args, **kwargs)  # for example a vision tower, whose rows don't have to match the ids
        check_length(len(call.plan.ids), samples)
        check_order(call.plan.ids)
        call.is_used = True
        with handle._router.routing(call.plan.ids, expands=method == "generate", base_layers=base_layers) as own_call:
            note(self, handle, own_call, args, kwargs, begins=True)
            return _run(handle, own_call, original, args, kwargs, call.origin)

    wrapper.__name__, wrapper.__doc__ = method, doc_with_ids(function)
    # not `functools.wraps`: accelerate follows `__wrapped__` past the wrapper
    wrapper.__signature__ = with_ids(inspect.signature(function))  # type: ignore[attr-defined]
    bound = types.MethodType(wrapper, module)
    undo, hooked = Replacement(module, attribute, bound).undo, getattr(module, method)
    if attribute == method or not hasattr(hooked, "__wrapped__"):
        return undo
    before, hooked.__wrapped__ = hooked.__wrapped__, bound  # inspect.signature reads parameters from __wrapped__

    def undo_both() -> None:
        undo()
        if hooked.__wrapped__ is bound:
            hooked.__wrapped__ = before

    return undo_both


def with_ids(signature: inspect.Signature) -> inspect.Signature:
    """A signature with ``adapter_ids``, from which Trainer infers the columns that a model takes."""
    named = inspect.Parameter(
        "adapter_ids", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="AdapterIds | None"
    )
    parameters = [each for each in signature.parameters.values() if each.name != named.name]
    last = len(parameters) - bool(parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*parameters[:last], named, *parameters[last:]])


def doc_with_ids(function: Callable[..., Any], each: str = "sample") -> str:
    """A method's docstring with a paragraph on ``adapter_ids``, for ``help`` and editors.

    Args:
        function: the method.
        each: the word for the things that have ids.
    """
    doc = inspect.getdoc(function)
    return "\n\n".join([*([doc] if doc else []), DESCRIPTION.format(each=each)])


def _run(
    handle: Any,
    call: Call,
    original: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    origin: Origin | None = None,
) -> Any:
    """Run a method after its ids were checked against its samples.

    Args:
        origin: where the ids became active, if that was before the method was called.
    """
    call.begin_model(_invocations(handle, call, args, kwargs))
    if origin is not None:
        handle._router.replays.note(call, origin)
    if kwargs.get("custom_generate") is not None:
        prompts = _first_tensor([kwargs.get(name) for name in INPUTS[:2]] + [args])
        is_tokens = prompts is not None and prompts.dim() == 2 and not prompts.is_floating_point()
        call.prompts = prompts if is_tokens else None
    return original(*args, **kwargs)


def _check_attention(model: Any, kwargs: dict[str, Any]) -> None:
    """Check that the model's attention isn't the one that continuous batching sets, which needs its own mask.

    Raises:
        ModelStateError: it is, and other calls would run without a causal mask.
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention == "paged|eager" and "write_index" not in kwargs and kwargs.get("cache_implementation") != "paged":
        raise ModelStateError(
            "the model was called while continuous batching runs on it with the attention 'paged|eager', with which "
            "other calls would see future tokens: expected no other calls. Load the model with "
            "attn_implementation='sdpa', or wait until the manager has stopped."
        )


def _check_cache(model: Any, kwargs: dict[str, Any]) -> None:
    """Check that ``generate`` doesn't offload its cache from a GPU, where a test found tokens that differ from PEFT's.

    Raises:
        UnsupportedError: it does.
    """
    configs = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]
    asked = [kwargs.get("cache_implementation"), *(getattr(each, "cache_implementation", None) for each in configs)]
    chosen = next((each for each in asked if each is not None), "")
    offloads = str(chosen).startswith("offloaded") or getattr(cache_of(kwargs), "offloading", False)
    if offloads and model.device.type != "cpu":
        raise UnsupportedError(
            "generate was called with ids and an offloaded cache on a GPU, where mixed batches produced different "
            "tokens than PEFT: expected a cache that stays on the GPU. Pass cache_implementation='dynamic' or "
            "'static'."
        )


def check_length(entries: int, samples: int | None) -> None:
    """Check that there are as many ids as samples.

    Raises:
        AdapterIdsLengthError: there aren't.
    """
    if samples is not None and entries != samples:
        raise AdapterIdsLengthError(
            f"adapter_ids has {entries} entries for a batch of {samples} samples: expected one entry per sample. Use "
            "-1 for the base model."
        )


def _invocations(handle: Any, call: Call, args: tuple, kwargs: dict[str, Any]) -> Invocations | None:
    """Where aLoRA adapters start in the samples of a call; None if none of its adapters is one."""
    configs: Any = getattr(handle._inner, "peft_config", None) or {}
    # mixtures of variants are refused where layers run
    adapters = call.plan.adapters
    entries = call.plan.entries
    names = [None if isinstance(entry, tuple) or entry == BASE else adapters[entry].name for entry in entries]
    if not any(name and getattr(configs.get(name), "alora_invocation_tokens", None) for name in names):
        return None
    given = [kwargs.get("input_ids"), kwargs.get("inputs"), *args]
    input_ids = next((value for value in given if isinstance(value, Tensor) and not value.is_floating_point()), None)
    if input_ids is None or input_ids.dim() != 2:
        raise UnsupportedError(
            "an aLoRA adapter was named in a call without input_ids, which are needed to find its invocation tokens: "
            "expected input_ids of shape [samples, tokens]. Pass them instead of inputs_embeds."
        )
    offsets = kwargs.get("alora_offsets")
    if offsets is None:
        known = [name or "__base__" for name in names]
        offsets = calculate_alora_offsets(configs, known[0], input_ids, adapter_names=known)
    return Invocations(offsets, input_ids.shape[1], call.expands)


def _num_tokens(args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
    """The number of tokens in a forward, and in its cache."""
    tensor, cache = _first_tensor([kwargs.get(name) for name in INPUTS] + [args]), cache_of(kwargs)
    assert tensor is not None
    return tensor.shape[1], 0 if cache is None else int(cache.get_seq_length())


def copy_error() -> NotEnabledError:
    return NotEnabledError(
        "adapter_ids was passed to a copy of an enabled model: expected the model itself. Call "
        "peft_multibatch.enable on the copy to use it."
    )


def pop_ids(kwargs: dict[str, Any]) -> Any:
    adapter_ids, adapter_names = kwargs.pop("adapter_ids", None), kwargs.pop("adapter_names", None)
    if adapter_ids is not None and adapter_names is not None:
        raise AdapterIdsError(
            "both adapter_ids and adapter_names were passed: expected one of them. adapter_ids also accepts names."
        )
    return adapter_names if adapter_ids is None else adapter_ids


def _order(function: Callable[..., Any], inner: Callable[..., Any]) -> list[str]:
    """The names of a method's positional arguments; those of the inner model if a ``PeftModel`` passes them on."""
    names = [*inspect.signature(function).parameters.values()][1:]
    if any(each.kind is each.VAR_POSITIONAL for each in names):
        names = [*inspect.signature(inner).parameters.values()][1:]
    return [each.name for each in names if each.kind is each.POSITIONAL_OR_KEYWORD]


def _num_samples(model: Any, order: list[str], args: tuple, kwargs: dict[str, Any]) -> int | None:
    """The batch size of a call, or None if its arguments don't show it.

    Args:
        order: the names of positional arguments.

    Raises:
        AdapterIdsLengthError: a dual encoder gets different numbers of texts and images, or of texts and audio.
    """
    if is_dual_encoder(model):
        names = inspect.signature(type(model).forward).parameters
        given = {**dict(zip(names, (model, *args))), **kwargs}
        sizes = {name: size for name in INPUTS if (size := _num_rows(given.get(name))) is not None}
        if len(set(sizes.values())) > 1:
            raise AdapterIdsLengthError(
                f"adapter_ids was passed with {', '.join(f'{size} {name}' for name, size in sizes.items())}: expected "
                "equal numbers, because an id belongs to a pair, such as a text and an image. Call the model with "
                "pairs, or encode texts and images in separate calls."
            )
    named = {**dict(zip(order, args)), **kwargs}
    for value in [named.get(name) for name in INPUTS] + [*args, *kwargs.values()]:
        size = _num_rows(value)
        if size is not None:
            return size
    return None


def _num_rows(value: Any) -> int | None:
    """The batch size of an argument: a tensor with the samples in dimension 0, or a list of one tensor per sample."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(x, Tensor) and x.dim() == 1 for x in value):
        return len(value)  # sequences of different lengths
    tensor = _first_tensor([value])
    return tensor.shape[0] if tensor is not None and tensor.dim() else None


def _first_tensor(values: Iterable[Any]) -> Tensor | None:
    for value in values:
        if isinstance(value, Mapping):
            value = _first_tensor(value.values())
        elif isinstance(value, (list, tuple)):
            value = _first_tensor(value)
        if isinstance(value, Tensor):
            return value
    return None
