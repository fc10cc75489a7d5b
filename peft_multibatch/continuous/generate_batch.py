"""transformers' entry points to continuous batching, with an adapter for every request."""

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
"""Settings that end ``generate``, and that continuous batching doesn't look at."""

LIMIT = "max_new_tokens"
"""What ``generate_batch`` reads among its ``**kwargs``."""


class BatchingOptions(TypedDict, total=False):
    """Keyword arguments of transformers' ``continuous_batching_context_manager``.

    Attributes:
        generation_config: how tokens are chosen, and how many; by default the model's own.
        continuous_batching_config: pages of the cache, tokens of a step and more.
        warmup: whether CUDA graphs are captured before the first request.
        block: whether leaving the block waits for the manager's thread to end.
        timeout: seconds that it waits at most.
        workload_hints: what transformers may assume about requests; not in its older versions.
    """

    generation_config: GenerationConfig | None
    continuous_batching_config: ContinuousBatchingConfig | None
    warmup: bool
    block: bool
    timeout: float | None
    workload_hints: WorkloadHints | None


def with_requests(module: nn.Module) -> Callable[[], None]:
    """Let ``generate_batch``, continuous batching, take an adapter for every request, and return what undoes it."""
    function: Any = getattr(type(module), "generate_batch", None)
    if function is None:
        return lambda: None

    def generate_batch(self, inputs, *args, **kwargs):
        handle: Handle | None = getattr(self, STATE, None)
        adapter_ids = pop_ids(kwargs)
        check_keywords("generate_batch", kwargs)
        call = None
        if handle is not None:  # ids of its own are all that a task needs that outlived its block
            call = handle._router.active() if adapter_ids is None else handle._router.live()
        if call is not None and not call.ended:
            raise UnsupportedError(
                "generate_batch was called while ids of samples are in force, inside mb.batch(...) or by generate "
                "with cache_implementation='paged': expected ids of requests. Call generate_batch(inputs, "
                "adapter_ids=[...]) by itself."
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
    """All that ``generate_batch`` takes, with ``max_new_tokens`` in the place of transformers' ``**kwargs``."""
    signature = inspect.signature(function)
    named = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    limit = inspect.Parameter(LIMIT, inspect.Parameter.KEYWORD_ONLY, default=None, annotation="int | None")
    return with_ids(signature.replace(parameters=[*named, limit]))


def _check_read(function: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    """Raise where transformers' ``generate_batch`` would swallow an argument: it takes any, and reads one more.

    Raises:
        UnsupportedError: it would.
    """
    names = {*inspect.signature(function).parameters}
    swallowed = sorted(kwargs.keys() - names - {LIMIT})
    if swallowed:
        raise UnsupportedError(
            f"generate_batch got {', '.join(swallowed)}, which continuous batching doesn't read: expected "
            f"{', '.join(sorted(names - {'self', 'kwargs'}))}, max_new_tokens or adapter_ids. Put settings such as "
            "temperature into a GenerationConfig, and call generate for what continuous batching can't do."
        )


def _check_settings(config: GenerationConfig) -> None:
    """Raise where continuous batching would leave out settings, and give other tokens than ``generate``.

    Raises:
        UnsupportedError: it would.
    """
    mode = config.get_generation_mode()
    asked = [] if mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) else [mode.value]
    asked += [f"{name}={getattr(config, name)!r}" for name in UNREAD if getattr(config, name) is not None]
    if asked:
        raise UnsupportedError(
            f"a GenerationConfig for continuous batching asks for {', '.join(asked)}, which it doesn't read: expected "
            "greedy search or sampling, which end by tokens. Leave it out, or call generate."
        )


class Batching(ContinuousMixin):
    """transformers' own entry points to continuous batching, for one enabled model and with its manager."""

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
                "continuous batching with an adapter for every request got persistent_manager=True, which would give "
                "its manager to calls without ids as well: expected False. Keep mb.continuous_batching(...) open."
            )
        return super().continuous_batching_context_manager(*args, **kwargs)

    @torch.no_grad()
    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        **options: Any,
    ) -> AdapterBatchingManager:
        from peft_multibatch.continuous.manager import AdapterBatchingManager  # needs much of transformers

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
