"""transformers' entry points to continuous batching, with an adapter per request."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig, ContinuousMixin
from transformers.generation.configuration_utils import GenerationMode

from peft_multibatch.continuous.prompts import integers_of
from peft_multibatch.errors import UnsupportedError
from peft_multibatch.layers.patch import STATE, Replacement
from peft_multibatch.model.wrap import copy_error, doc_with_ids, pop_ids, with_ids
from peft_multibatch.plan.ids import Entry, check_keywords, check_requests, resolve


if TYPE_CHECKING:
    from transformers.generation.continuous_batching.utils import WorkloadHints

    from peft_multibatch.continuous.manager import AdapterBatchingManager
    from peft_multibatch.model.handle import Handle


UNREAD = ("stop_strings", "max_time")
"""Stopping criteria of ``generate`` that continuous batching ignores."""

LIMIT = "max_new_tokens"
"""The only keyword that ``generate_batch`` reads from its ``**kwargs``."""


class BatchingOptions(TypedDict, total=False):
    """Keyword arguments of transformers' ``continuous_batching_context_manager``.

    Attributes:
        generation_config: how tokens are chosen, and how many; by default the model's own.
        continuous_batching_config: cache size, tokens per step and more.
        warmup: whether to capture CUDA graphs before the first request.
        block: whether leaving the context waits for the manager's thread to end.
        timeout: how long to wait at most, in seconds.
        workload_hints: what transformers may assume about requests; not in its older versions.
    """

    generation_config: GenerationConfig | None
    continuous_batching_config: ContinuousBatchingConfig | None
    warmup: bool
    block: bool
    timeout: float | None
    workload_hints: WorkloadHints | None


def with_requests(module: nn.Module) -> Callable[[], None]:
    """Add ``adapter_ids`` to ``generate_batch`` (continuous batching); returns a function that undoes it."""
    function: Any = getattr(type(module), "generate_batch", None)
    if function is None:
        return lambda: None

    def generate_batch(self, inputs, *args, **kwargs):
        handle: Handle | None = getattr(self, STATE, None)
        adapter_ids = pop_ids(kwargs)
        check_keywords("generate_batch", kwargs)
        call = None
        if handle is not None:  # a task that outlived its block may still call this with ids of its own
            call = handle._router.active() if adapter_ids is None else handle._router.live()
        if call is not None and not call.ended:
            raise UnsupportedError(
                "generate_batch was called while adapter ids per sample are active, inside mb.batch(...) or by "
                "generate with cache_implementation='paged': expected adapter ids per request. Call "
                "generate_batch(inputs, adapter_ids=[...]) outside."
            )
        _check_read(function, kwargs)
        if adapter_ids is None:
            return function(self, inputs, *args, **kwargs)
        if handle is None:
            raise copy_error()
        handle._refresh()
        entries = resolve(adapter_ids, handle._registry.names)
        check_requests(entries, inputs)
        inputs = [integers_of("a prompt", prompt) for prompt in inputs]
        return Batching(handle, entries).generate_batch(inputs, *args, **kwargs)

    generate_batch.__doc__ = doc_with_ids(function, "prompt")
    generate_batch.__signature__ = _signature(function)  # type: ignore[attr-defined]
    return Replacement(module, "generate_batch", types.MethodType(generate_batch, module)).undo


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of ``generate_batch``, with ``max_new_tokens`` instead of transformers' ``**kwargs``."""
    signature = inspect.signature(function)
    named = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    limit = inspect.Parameter(LIMIT, inspect.Parameter.KEYWORD_ONLY, default=None, annotation="int | None")
    return with_ids(signature.replace(parameters=[*named, limit]))


def _check_read(function: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    """Reject arguments that transformers' ``generate_batch`` would silently ignore.

    Raises:
        UnsupportedError: there is such an argument.
    """
    names = {*inspect.signature(function).parameters}
    swallowed = sorted(kwargs.keys() - names - {LIMIT})
    if swallowed:
        raise UnsupportedError(
            f"generate_batch got {', '.join(swallowed)}, which continuous batching ignores: expected "
            f"{', '.join(sorted(names - {'self', 'kwargs'}))}, max_new_tokens or adapter_ids. Put settings such as "
            "temperature into a GenerationConfig, and call generate for what continuous batching can't do."
        )


def _check_settings(config: GenerationConfig) -> None:
    """Reject generation settings that continuous batching ignores, so that tokens would differ from ``generate``.

    Raises:
        UnsupportedError: there is such a setting.
    """
    mode = config.get_generation_mode()
    asked = [] if mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) else [mode.value]
    asked += [f"{name}={getattr(config, name)!r}" for name in UNREAD if getattr(config, name) is not None]
    if asked:
        raise UnsupportedError(
            f"a GenerationConfig for continuous batching sets {', '.join(asked)}, which continuous batching ignores: "
            "expected greedy search or sampling that stops at tokens. Leave the setting out, or call generate."
        )


class Batching(ContinuousMixin):
    """transformers' own entry points to continuous batching, using this package's manager for an enabled model."""

    def __init__(self, handle: Handle, waiting_ids: Sequence[Entry] = (), mixtures: int = 1) -> None:
        self._model = handle._inner
        self._handle = handle
        self._waiting_ids = waiting_ids
        self._mixtures = mixtures

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def continuous_batching_context_manager(
        self, *args: Any, persistent_manager: bool = False, **kwargs: Any
    ) -> AbstractContextManager[AdapterBatchingManager]:
        if persistent_manager:
            raise UnsupportedError(
                "continuous batching with an adapter per request got persistent_manager=True, which would share "
                "its manager with calls without ids: expected False. Keep mb.continuous_batching(...) open instead."
            )
        return super().continuous_batching_context_manager(*args, **kwargs)

    @torch.no_grad()
    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        **options: Any,
    ) -> AdapterBatchingManager:
        from peft_multibatch.continuous.manager import AdapterBatchingManager  # imports much of transformers

        config: Any = copy.copy(generation_config or self._model.generation_config)
        _check_settings(config)
        if config.eos_token_id is None:
            config.eos_token_id = -1
        return AdapterBatchingManager(
            self._handle,
            self._waiting_ids,
            self._mixtures,
            generation_config=config,
            continuous_batching_config=continuous_batching_config or ContinuousBatchingConfig(),
            **options,
        )
