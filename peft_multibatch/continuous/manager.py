"""Continuous batching with an adapter per request, on top of transformers' own manager.

transformers schedules requests, keeps their cache in pages and runs them packed: one row that holds the tokens of all
requests. Here every request has its adapter, and what depends on it:

- the packed row runs under one entry per token;
- cached prefixes are shared under one adapter, and one version of it, alone;
- requests wait in the order of what their adapters were served, so that a flood for one doesn't starve the others;
- adapters change between steps, when no request that began with the old weights is under way.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from peft_multibatch.continuous.admission import Admission, vocabulary_of
from peft_multibatch.continuous.prefixes import Prefixes
from peft_multibatch.continuous.scheduler import KEY, FairScheduler, entry_of, has_begun
from peft_multibatch.errors import ModelStateError, MultibatchError, UnsupportedError
from peft_multibatch.plan.ids import BASE_NAME, Entry, check_keywords, check_requests, ids_of, label_of, resolve
from peft_multibatch.plan.segments import BASE


if TYPE_CHECKING:
    from peft_multibatch.model.handle import Handle


CHECKS = 1
"""Adapters that a step compares with what PEFT holds, in turns: to compare dozens takes a millisecond."""


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
        self.served: defaultdict[str, int] = defaultdict(int)
        self.prefix_hits = 0
        self._handle = handle
        self._router = handle._router
        self._waiting_ids = waiting_ids  # of `generate_batch`, whose requests are added without them
        self._queue = FairScheduler()
        self._registry = handle._registry
        self._prefixes = Prefixes(vocabulary_of(self.model), self._registry)
        self._admission = Admission(handle, self.model, self._prefixes)
        self._gate = threading.Condition(threading.RLock())  # a step of the loop, or a change
        self._changes = 0
        self._changing: list[int] = []  # threads inside `changing`
        self._held: Counter[int] = Counter()  # ids whose requests may not begin, and how many changes wait for them

    # What users call.

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        *args: Any,
        adapter_id: Any = BASE,
        **kwargs: Any,
    ) -> str | None:
        """Add a request.

        Args:
            input_ids: the prompt's tokens.
            request_id: a name for it, made up where it isn't given.
            *args: as in transformers' ``ContinuousBatchingManager.add_request``.
            adapter_id: an id, a name or a mixture such as ``{"sql": 0.7, "poet": 0.3}``; the base model alone where it
                isn't given.
            **kwargs: as in transformers.

        Returns:
            The request's id. A request that can't run (a prompt that is empty, too long or has tokens which the model
            doesn't know; an adapter that isn't there) gives an output with an error, and no tokens.
        """
        check_keywords("add_request", kwargs, takes="adapter_id")
        error: Exception | None = None
        entry: Entry = BASE
        try:
            self._handle._refresh()
            entry = self._resolve(adapter_id)
            self._admission.check_entry(entry)
            self._admission.check_prompt(input_ids, kwargs.get("max_new_tokens", args[0] if args else None))
        except MultibatchError as caught:
            error = caught
        if error is None:
            return super().add_request(input_ids, request_id, *args, **kwargs, **{KEY: entry})
        if request_id is None:
            with self._request_lock:
                request_id = f"req_{self._request_counter}"
                self._request_counter += 1
        state = RequestState(request_id, list(input_ids), num_children=self.num_return_sequences - 1)
        self.output_router.fail_and_deliver(state, error)
        self._fail_children(state, error)
        return request_id

    def add_requests(self, inputs: list[list[int]], *args: Any, adapter_ids: Any = None, **kwargs: Any) -> list[str]:
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
            order = sorted(order, key=lambda index: inputs[index], reverse=True)
        for index in order:
            self.add_request(inputs[index], names[index], *args, adapter_id=entries[index], **kwargs)
        return names

    @contextmanager
    def changing(self, *adapter_ids: Any) -> Iterator[None]:
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
                    while not self._gate.wait_for(lambda: not (self.is_running() and self._has_begun(ids)), 0.1):
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

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; not inside ``changing``, for whose end the loop waits."""
        self._check_not_changing("stop")
        super().stop(*args, **kwargs)

    def pause(self) -> AbstractContextManager[None]:
        """As in newer transformers; not inside ``changing``, where no step runs anyway."""
        self._check_not_changing("pause")
        return super().pause()

    # What runs in the loop's thread.

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        with self._gate:
            if self._changes:
                self._gate.notify_all()
                self._gate.wait(0.001)  # a lock that is let go of and taken again at once is nobody else's
            self._fail_hopeless(batch_processor)
            return super()._generation_loop_body(batch_processor, bootstrapping)

    def _create_batch_processor(self) -> Any:
        is_new = self.batch_processor is None
        processor = super()._create_batch_processor()
        if is_new:
            self._admission.prepare(processor)
            runner = processor.model_runner
            scheduler, cache = processor.scheduler, processor.cache
            runner.compute_batch = self._with_ids(processor, runner.compute_batch)
            scheduler.add_waiting_request = self._admission.once(scheduler, scheduler.add_waiting_request)
            scheduler._get_waiting_candidates = self._in_turn(scheduler, scheduler._get_waiting_candidates)
            cache.search_prefix_match = self._salted_search(scheduler, cache.search_prefix_match)
            for name in ("mark_complete_blocks", "mark_shareable_blocks_as_complete"):  # newer and older transformers
                if hasattr(cache, name):
                    setattr(cache, name, self._prefixes.salted_mark(getattr(cache, name)))
        return processor

    def _with_ids(self, processor: Any, compute: Callable[..., None]) -> Callable[..., None]:
        io = processor.inputs_and_outputs

        def compute_batch(model: Any, batch_data: dict) -> None:
            packed = io.io_pairs[io.current_pair].host_io if hasattr(io, "io_pairs") else io
            entries: list[Entry] = []
            begin: set[int] = set()
            for future in packed.requests_in_batch:
                entry = entry_of(future.state)
                entries += [entry] * future.query_length
                if future.state.position_offset == future.query_length:
                    begin.update(ids_of(entry))
                if not future.state.request_id.startswith("__warmup"):  # transformers' own, to capture graphs
                    self._queue.charge(entry, future.query_length)
                    self.served[label_of(entry, self._registry.names)] += future.query_length
            entries += [BASE] * (batch_data["input_ids"].shape[1] - len(entries))  # padding
            self._registry.adapters(sorted(begin))  # compared whoever's turn it is, because a prompt is read once
            if self._router.graph.outgrown_by(self._router.plan(entries, checks=0)):
                self._forget_graphs()
            while True:
                # plans are copied in the order of the stream that computes
                routing = self._router.routing(entries, expands=False, packed=True, checks=CHECKS)
                with _on(io.compute_stream), routing as call:
                    if not (self._admission.uses_graphs and self._router.graph.contended):
                        call.begin_model()
                        call.for_graphs = self._admission.uses_graphs
                        return compute(model, batch_data)
                time.sleep(0.001)  # graphs read their plan at one place, which a call on another thread has now

        return compute_batch

    def _in_turn(self, scheduler: Any, candidates: Callable[[], list[RequestState]]) -> Callable[[], list]:
        def in_turn() -> list[RequestState]:
            if len(scheduler.active_requests) >= scheduler.max_requests_per_batch:
                return []  # nobody's turn
            running = {entry_of(state) for state in scheduler.active_requests.values()}
            there = [state for state in candidates() if self._admission.why_not(state) is None]
            found = self._queue.order(there, running)
            return [state for state in found if has_begun(state) or not self._held.keys() & ids_of(entry_of(state))]

        return in_turn

    def _salted_search(self, scheduler: Any, search: Callable[..., int]) -> Callable[..., int]:
        def salted_search(request_id: str, prompt_ids: list[int]) -> int:
            state = scheduler.waiting_requests.get(request_id) or scheduler.active_requests[request_id]
            self._registry.adapters(ids_of(entry_of(state)))  # so that their versions are known
            found = search(request_id, self._prefixes.salted(prompt_ids, entry_of(state)))
            self.prefix_hits += found
            return found

        return salted_search

    def _has_begun(self, ids: set[int]) -> bool:
        """Whether a request that has begun needs one of these adapters."""
        if self.batch_processor is None:
            return False
        scheduler = self.batch_processor.scheduler
        states = itertools.chain(
            scheduler.active_requests.values(), filter(has_begun, scheduler.waiting_requests.values())
        )
        return any(ids & {*ids_of(entry_of(state))} for state in states)

    def _fail_hopeless(self, processor: Any) -> None:
        """End requests that can't run, or can't any more, before they stop the loop."""
        scheduler = processor.scheduler
        states = [*scheduler.active_requests.values(), *scheduler.waiting_requests.values()]
        for state, error in self._admission.hopeless(states):
            scheduler.set_request_cancellation(state.request_id)
            processor._handle_request_error(error, state)
            self._fail_children(state, error)
            state.status = RequestStatus.FINISHED  # for a batch that is still under way

    def _fail_children(self, state: RequestState, error: Exception) -> None:
        """End the sequences that a request would have been forked into, which somebody may be waiting for."""
        for index in range(state.num_children):
            child = RequestState(f"{state.request_id}__child#{index}", state.initial_tokens)
            self.output_router.fail_and_deliver(child, error)

    def _forget_graphs(self) -> None:
        """Have CUDA graphs captured anew: they have constants that depend on what the adapters look like."""
        if self.batch_processor is None or not self._router.graph.is_captured:
            return
        io = self.batch_processor.inputs_and_outputs
        pairs = [pair.device_io for pair in io.io_pairs] if hasattr(io, "io_pairs") else [io]
        for each in pairs:
            each.graphs = type(each.graphs)()
        self._router.graph.is_captured = False

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


def _on(stream: Any) -> AbstractContextManager:
    return torch.cuda.stream(stream) if stream is not None else nullcontext()
