"""Take requests out of the loop early: those that fail, are cancelled or restart."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from peft_multibatch.continuous.pages import clear_pages
from peft_multibatch.continuous.scheduler import entry_of, has_begun
from peft_multibatch.errors import ModelStateError
from peft_multibatch.plan.ids import ids_of


LEFT = RequestStatus.FINISHED, RequestStatus.PENDING
"""States of a request that no longer belongs to the batch that is still running."""

CANCELLED = "_multibatch_cancelled"
"""Attribute of a request that was cancelled before the loop received it."""


def children_of(name: Any, number: int) -> list[str]:
    """Ids of the sequences into which transformers forks a request."""
    return [f"{name}__child#{index}" for index in range(number)]


def on_stream(stream: Any) -> AbstractContextManager:
    """Return a context that runs on ``stream``, or a null context if it is None."""
    return torch.cuda.stream(stream) if stream is not None else nullcontext()


def cancel_in(requests: queue.Queue[RequestState], name: Any) -> None:
    """Mark queued requests as cancelled, so that the loop cancels them when it takes them from the queue.

    The loop reads requests first and cancellations afterwards, so it would miss a request queued in between.
    """
    with requests.mutex:
        for state in requests.queue:
            if state.request_id == name:
                state.__dict__[CANCELLED] = True


class Leaving:
    """Takes requests out of the loop between two steps, whatever their state.

    Args:
        processor: transformers' batch processor.
        copies: number of sequences per prompt.
        left: called for each request that was taken out, with those that still wait, by id.
    """

    def __init__(
        self, processor: Any, copies: int, left: Callable[[RequestState, Mapping[Any, RequestState]], None]
    ) -> None:
        self._processor = processor
        self._scheduler = processor.scheduler
        self._io = processor.inputs_and_outputs
        self._copies, self._left = copies, left
        processor._handle_request_error = self._tell
        self._scheduler.clear_cancelled_requests = self._with_outputs(self._scheduler.clear_cancelled_requests)

    def has_begun(self, ids: set[int]) -> bool:
        """Whether a request that has started uses one of these adapters."""
        active, waiting = self._scheduler.active_requests, self._scheduler.waiting_requests
        begun = itertools.chain(active.values(), filter(has_begun, waiting.values()))
        return any(ids & {*ids_of(entry_of(state))} for state in begun)

    def find(self, name: Any) -> RequestState | None:
        """The request with this id."""
        return self._scheduler.active_requests.get(name) or self._scheduler.waiting_requests.get(name)

    def fail(self, state: RequestState, error: Exception, clears: bool = False) -> None:
        """End a request, and the sequences it would have been forked into, with an error.

        Args:
            state: the request.
            error: the error of its output.
            clears: whether its cache pages may contain non-finite values and must be cleared.
        """
        self.fail_all([(state, error)], clears)

    def fail_all(self, errors: Sequence[tuple[RequestState, Exception]], clears: bool = False) -> None:
        """As ``fail``, for several requests."""
        self._take_out([state for state, _ in errors], clears)
        for state, error in errors:
            self._tell(error, state)
            state._status = RequestStatus.FINISHED  # batches that are still running skip it

    def _tell(self, error: Exception, state: RequestState) -> None:
        router = self._processor.output_router
        router.fail_and_deliver(state, error)
        for name in children_of(state.request_id, state.num_children):  # a caller may be waiting for them
            router.fail_and_deliver(RequestState(name, state.initial_tokens), error)

    def restart(self, states: Iterable[RequestState]) -> None:
        """Recompute requests from their prompts and the tokens generated so far, in other pages."""
        states = list({id(state): state for state in states}.values())
        again = [state.create_equivalent_initial_request() for state in states]
        self._take_out(states, clears=True)
        for state, new in zip(states, again):
            new.created_time, new._timestamps = state.created_time, state._timestamps
            self._scheduler.add_waiting_request(new)

    def _take_out(self, states: list[RequestState], clears: bool) -> None:
        scheduler, processor = self._scheduler, self._processor
        names = {state.request_id: state for state in states}
        gone = {name for name in names if name in scheduler.waiting_requests}
        if gone:  # once, because there may be thousands
            kept = [name for name in scheduler.waiting_requests_order if name not in gone]
            scheduler.waiting_requests_order.clear()
            scheduler.waiting_requests_order.extend(kept)
        for name, state in names.items():
            state._status = RequestStatus.FINISHED  # a batch that is still running skips it
            if hasattr(processor, "offloading_manager"):
                processor.offloading_manager.free_request_cpu_cache(state)
            scheduler.active_requests.pop(name, None)
            scheduler.waiting_requests.pop(name, None)
            self._left(state, scheduler.waiting_requests)
            if not clears:
                processor.cache.free_blocks(name)
        if clears:
            with on_stream(self._io.compute_stream):  # after the steps that still write there
                clear_pages(processor.cache, list(names))
        scheduler._requests_to_fork = [
            each for each in scheduler._requests_to_fork if each is not names.get(each.request_id)
        ]
        # a token of the running batch must not go to a later request with the same id
        for pair in getattr(self._io, "io_pairs", ()):
            known = pair.host_io.req_id_to_new_token_position
            pair.host_io.req_id_to_new_token_position = {
                object() if name in names else name: position for name, position in known.items()
            }
        if not scheduler.active_requests:
            scheduler.block_new_requests = False  # it would wait for a request to finish, but none is running

    def _with_outputs(self, clear: Callable[[], list[RequestState]]) -> Callable[[], list[RequestState]]:
        """Wrap the clearing of cancelled requests so that they and their children get a final output."""

        def clear_cancelled_requests() -> list[RequestState]:
            with self._scheduler._cancellation_lock:
                asked = list(self._scheduler._requests_to_cancel)
            cancelled: list[tuple[RequestState, Exception]] = []
            for name in asked:
                for each in (name, *children_of(name, self._copies - 1)):
                    state = self.find(each)
                    if state is not None:
                        error = ModelStateError(
                            f"request {each!r} was cancelled by cancel_request({name!r}): expected it to run until "
                            "its end. Add it again to get all of its tokens."
                        )
                        cancelled.append((state, error))
            if cancelled:
                self.fail_all(cancelled)
                with self._scheduler._cancellation_lock:  # for each, `clear` searches all that wait
                    self._scheduler._requests_to_cancel -= {state.request_id for state, _ in cancelled}
            return clear()

        return clear_cancelled_requests
