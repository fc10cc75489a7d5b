"""Continuous batching with an adapter per request, on top of transformers' own manager.

transformers schedules requests, keeps their cache in pages and runs them packed: one row that holds the tokens of all
requests. Here every request has its adapter, and what depends on it:

- the packed row runs under one entry per token;
- cached prefixes are shared under one adapter, and one version of it, alone;
- requests wait in the order of what their adapters were served, so that a flood for one doesn't starve the others;
- adapters change between steps, when no request that began with the old weights is under way.
"""

from __future__ import annotations

import threading
import weakref
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import RequestState

from peft_multibatch.continuous.admission import Admission, vocabulary_of
from peft_multibatch.continuous.leaving import Leaving, cancel_in, children_of
from peft_multibatch.continuous.outputs import Outputs
from peft_multibatch.continuous.prefixes import Prefixes
from peft_multibatch.continuous.prompts import check_name, check_options, ends_of, limit_of, prefix_of, tokens_of
from peft_multibatch.continuous.quarantine import Quarantine
from peft_multibatch.continuous.scheduler import KEY, FairScheduler, entry_of, has_begun
from peft_multibatch.continuous.steps import Steps
from peft_multibatch.continuous.stored import StoredRequests
from peft_multibatch.errors import ModelStateError, MultibatchError, UnsupportedError
from peft_multibatch.plan.ids import BASE_NAME, Entry, check_keywords, check_requests, ids_of, resolve
from peft_multibatch.plan.segments import BASE


if TYPE_CHECKING:
    from peft_multibatch.model.handle import Handle
    from peft_multibatch.plan.ids import AdapterId, AdapterIds


class AdapterBatchingManager(ContinuousBatchingManager):
    """transformers' manager of continuous batching, whose requests name their adapters.

    What it does beside: ``add_request(..., adapter_id=...)``, ``changing(...)``, ``served`` and ``prefix_hits``. A
    request that can't run ends with an error of its own, in the output where its tokens would have been.

    Attributes:
        served: tokens that ran for each adapter, by name; for a mixture, the names and their weights.
        prefix_hits: tokens whose cache was found instead of computed.
    """

    def __init__(self, handle: Handle, waiting_ids: Sequence[Entry] = (), mixtures: int = 1, **options: Any) -> None:
        if handle._router.split is not None or handle._router.is_gathered:
            raise UnsupportedError(
                "continuous batching with an adapter for every request was started on a model that is split over "
                "devices, which wasn't tested: expected a model that every rank holds whole. Call generate with "
                "adapter_ids, or run a copy of the model on every device."
            )
        super().__init__(model=handle._inner, **options)
        longest = max((len(entry) for entry in waiting_ids if isinstance(entry, tuple)), default=1)
        handle._router.graph.expect(max(mixtures, longest))
        self.logit_processor.supported_keys[KEY] = object
        self.output_router = Outputs()
        self.prefix_hits = 0
        self._handle, self._router = handle, handle._router
        self._waiting_ids = waiting_ids  # of `generate_batch`, whose requests are added without them
        self._queue, self._registry = FairScheduler(), handle._registry
        self._prefixes = Prefixes(vocabulary_of(self.model), self._registry)
        self._admission = Admission(handle, self.model, self._prefixes)
        self._steps = Steps(handle, self._admission, self._queue)
        self.served = self._steps.served
        self._gate = threading.Condition(threading.RLock())  # a step of the loop, or a change
        self._changes = 0
        self._changing: list[int] = []  # threads inside `changing`
        self._stored = StoredRequests(self._registry, getattr(self, "_wake_up_loop", None))
        self._registry.guard = weakref.WeakMethod(self.changing)
        self._held: Counter[int] = Counter()  # ids whose requests may not begin, and how many changes wait for them

    # What users call.

    def add_request(
        self,
        input_ids: list[int],
        request_id: Any = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        *,
        adapter_id: AdapterId = BASE,
        **kwargs: Any,
    ) -> Any:
        """Add a request.

        Args:
            input_ids: the prompt's tokens.
            request_id: a name for it, any hashable value; made up where it isn't given.
            max_new_tokens: as in transformers' ``ContinuousBatchingManager.add_request``.
            streaming: as in transformers.
            record_timestamps: as in transformers.
            eos_token_id: as in transformers.
            adapter_id: an id, a name or a mixture such as ``{"sql": 0.7, "poet": 0.3}``; the base model alone where it
                isn't given.
            **kwargs: as in transformers.

        Returns:
            The request's id. A request that can't run (a prompt that is empty, too long, no list of integers or has
            tokens which the model doesn't know; an adapter that isn't there) gives an output with an error, and no
            tokens.

        Raises:
            UnsupportedError: the id isn't hashable.
        """
        check_keywords("add_request", kwargs, takes="adapter_id")
        check_name(request_id)
        error: Exception | None = None
        tokens: list[int] = []
        try:
            self._handle._refresh(is_looked_at=True)  # before the next step
            entry = self._resolve(adapter_id)
            self._admission.check_entry(entry)
            tokens = tokens_of(input_ids, vocabulary_of(self.model))
            max_new_tokens, eos_token_id = limit_of(max_new_tokens), ends_of(eos_token_id)
            check_options(self.logit_processor, kwargs)
        except MultibatchError as caught:
            error = caught
        if error is None:
            self._stored.queued(entry, self.batch_processor, self.input_queue.qsize())
            return super().add_request(
                tokens,
                request_id,
                max_new_tokens,
                streaming,
                record_timestamps,
                eos_token_id,
                **kwargs,
                **{KEY: entry},
            )
        if request_id is None:
            with self._request_lock:
                request_id = f"req_{self._request_counter}"
                self._request_counter += 1
        for name in (request_id, *children_of(request_id, self.num_return_sequences - 1)):
            self.output_router.fail_and_deliver(RequestState(name, tokens), error)
        return request_id

    def add_requests(
        self, inputs: list[list[int]], *args: Any, adapter_ids: AdapterIds | None = None, **kwargs: Any
    ) -> list[str]:
        """Add several requests.

        Args:
            inputs: their prompts.
            *args: as in transformers.
            adapter_ids: one entry for every prompt, as in ``generate``; the base model alone where it isn't given.
            **kwargs: as in transformers.

        Raises:
            AdapterIdsLengthError: there are more prompts than ids, or fewer.
        """
        check_keywords("add_requests", kwargs)
        if adapter_ids is None:
            known = [dict(entry) if isinstance(entry, tuple) else entry for entry in self._waiting_ids]
            adapter_ids = known or [BASE] * len(inputs)
        entries = adapter_ids.tolist() if hasattr(adapter_ids, "tolist") else list(adapter_ids)
        check_requests(entries, inputs)
        eos = self.generation_config.eos_token_id
        eos = self.model.config.get_text_config().eos_token_id if eos is None else eos
        kwargs.setdefault("eos_token_id", -1 if eos is None else eos)
        with self._request_lock:
            names = [f"req_{self._request_counter + index}" for index in range(len(inputs))]
            self._request_counter += len(inputs)
        order: Iterable[int] = range(len(inputs))
        if self._use_prefix_sharing:  # prompts that begin alike one after the other
            order = sorted(order, key=lambda index: prefix_of(inputs[index]), reverse=True)
        for index in order:
            self.add_request(inputs[index], names[index], *args, adapter_id=entries[index], **kwargs)
        return names

    @contextmanager
    def changing(self, *adapter_ids: int | str) -> Iterator[None]:
        """Change adapters while requests run: load, delete, hot-swap or write them inside the block.

        Requests that have begun under these adapters end first, with the weights they began with; later ones wait
        until the block ends, and all others go on. Inside the block no step runs.

        Args:
            *adapter_ids: ids or names of the adapters that change; none where adapters are only added.

        Example:
            ```python
            with manager.changing("sql"):
                hotswap_adapter(model, "new/sql", adapter_name="sql")
            ```
        """
        if hasattr(ContinuousBatchingManager, "pause") and self.background_thread_status.is_pause_requested(
            local=True
        ):
            raise ModelStateError(
                "changing was called inside manager.pause(), which holds the loop where changes can't begin: expected "
                "one of both. Leave out pause, because inside changing no step runs either."
            )
        with self._request_lock:
            self._changes += 1
        try:
            with self._gate:
                self._handle._refresh()
                entries = [self._resolve(each) for each in adapter_ids]
                if BASE in entries:
                    raise UnsupportedError(
                        "changing was called for the base model, whose cached prefixes all adapters' differ from: "
                        "expected adapters. Leave the manager's block to change the base model."
                    )
                ids = {number for entry in entries for number in ids_of(entry)}
                self._held.update(ids)
                self._changing.append(threading.get_ident())
                try:
                    while not self._gate.wait_for(lambda: not self._has_begun(ids), 0.1):
                        pass  # a loop that ended tells nobody
                    if self.model.device.type == "cuda":
                        torch.cuda.synchronize(self.model.device)
                    yield
                finally:
                    self._changing.remove(threading.get_ident())
                    self._registry.renew(ids)
                    self._held -= Counter(ids)
        finally:
            with self._request_lock:
                self._changes -= 1
            if hasattr(self, "_wake_up_loop"):  # older transformers look for themselves
                self._wake_up_loop.set()

    def cancel_request(self, request_id: Any) -> None:
        """End a request, and the sequences into which it was forked; the output of each has an error that says so."""
        check_name(request_id)
        cancel_in(self.input_queue, request_id)
        super().cancel_request(request_id)

    def register_result_handler(self, request_id: Any, callback: Callable) -> None:
        """As in transformers; the handler gets what came before it was registered as well."""
        with self.output_router._lock:
            super().register_result_handler(request_id, callback)
            self.output_router.hand_over(request_id)

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; not inside ``changing``, for whose end the loop waits."""
        self._check_not_changing("stop")
        super().stop(*args, **kwargs)

    def pause(self) -> AbstractContextManager[None]:
        """As in newer transformers, and adapters count as changed afterwards; not inside ``changing``."""
        self._check_not_changing("pause")
        return self._paused(super().pause())

    @contextmanager
    def _paused(self, pause: AbstractContextManager[None]) -> Iterator[None]:
        with pause:
            try:
                yield
            finally:
                self._registry.renew(list(self._registry.names.by_id))

    # What runs in the loop's thread.

    def _run_generation_loop(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._run_generation_loop(*args, **kwargs)
        finally:
            self._stored.keep(())

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        scheduler = batch_processor.scheduler
        with self._gate:
            self._stored.keep(ChainMap(scheduler.active_requests, scheduler.waiting_requests))
            if self._changes:
                self._gate.notify_all()
                self._gate.wait(0.001)  # a lock that is let go of and taken again at once is nobody else's
            self._fail_hopeless()
            return super()._generation_loop_body(batch_processor, bootstrapping)

    def _create_batch_processor(self) -> Any:
        is_new = self.batch_processor is None
        processor = super()._create_batch_processor()
        if is_new:
            self._admission.prepare(processor)
            scheduler, cache = processor.scheduler, processor.cache
            self._leaving = Leaving(processor, self.num_return_sequences)
            self._quarantine = Quarantine(processor, self._leaving, self._registry, self._prefixes.key)
            self._steps.wrap(processor, self._quarantine)
            scheduler.add_waiting_request = self._admission.once(scheduler, scheduler.add_waiting_request)
            scheduler._get_waiting_candidates = self._in_turn(scheduler, scheduler._get_waiting_candidates)
            cache.search_prefix_match = self._salted_search(cache.search_prefix_match)
            for name in ("mark_complete_blocks", "mark_shareable_blocks_as_complete"):  # newer and older transformers
                if hasattr(cache, name):
                    setattr(cache, name, self._prefixes.salted_mark(getattr(cache, name)))
        return processor

    def _in_turn(self, scheduler: Any, candidates: Callable[[], list[RequestState]]) -> Callable[[], list]:
        def in_turn() -> list[RequestState]:
            if len(scheduler.active_requests) >= scheduler.max_requests_per_batch:
                return []  # nobody's turn
            running = {entry_of(state) for state in scheduler.active_requests.values()}
            there = list(filter(self._admission.may_begin, candidates()))
            found = self._queue.order(there, running)
            free = [state for state in found if has_begun(state) or not self._held.keys() & ids_of(entry_of(state))]
            return self._stored.ready(free, scheduler)

        return in_turn

    def _salted_search(self, search: Callable[..., int]) -> Callable[..., int]:
        config: Any = self.continuous_batching_config
        page = config.page_size if hasattr(config, "page_size") else config.block_size  # in older transformers

        def salted_search(request_id: Any, prompt_ids: list[int]) -> int:
            state = self._leaving.find(request_id)
            assert state is not None
            salted = self._prefixes.begin(state, prompt_ids)
            if salted is None or request_id in self._quarantine.suspects:  # which compute everything by themselves
                return 0
            if state.num_children:  # a token has to be left to run before it is forked, and one after
                salted = salted[: (len(salted) - 2) // page * page + 1]
            found = search(request_id, salted)
            self.prefix_hits += found
            return found

        return salted_search

    def _has_begun(self, ids: set[int]) -> bool:
        return self.is_running() and self.batch_processor is not None and self._leaving.has_begun(ids)

    def _fail_hopeless(self) -> None:
        """End requests that can't run, or can't any more, before they stop the loop."""
        failed, self._stored.failed = self._stored.failed, []
        for state, error in [*failed, *self._admission.hopeless(self._leaving.states())]:
            self._leaving.fail(state, error)

    # What is checked.

    def _resolve(self, adapter_id: Any) -> Entry:
        names = self._registry.names
        is_base = isinstance(adapter_id, (int, str)) and adapter_id in (BASE, BASE_NAME)
        if is_base and BASE_NAME not in names.ids:  # also where there are no adapters at all
            return BASE
        return resolve([adapter_id], names)[0]

    def _check_not_changing(self, method: str) -> None:
        if threading.get_ident() in self._changing:
            raise ModelStateError(
                f"{method} was called inside manager.changing(...), for whose end the loop waits: expected the change "
                f"to end first. Call {method} after that block."
            )
