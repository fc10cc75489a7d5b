"""Requests that leave before their time: those that fail or are cancelled, and those that begin again."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from peft_multibatch.continuous.pages import clear_pages
from peft_multibatch.continuous.scheduler import entry_of, has_begun
from peft_multibatch.errors import ModelStateError
from peft_multibatch.plan.ids import ids_of


LEFT = RequestStatus.FINISHED, RequestStatus.PENDING
"""States in which a request of a batch that is still under way isn't part of it any more."""

CANCELLED = "_multibatch_cancelled"
"""Attribute of a request that was cancelled before the loop had it."""


def children_of(name: Any, number: int) -> list[str]:
    """Ids of the sequences into which transformers forks a request."""
    return [f"{name}__child#{index}" for index in range(number)]


def on_stream(stream: Any) -> AbstractContextManager:
    """A block on a stream, or on none."""
    return torch.cuda.stream(stream) if stream is not None else nullcontext()


def cancel_in(requests: queue.Queue[RequestState], name: Any) -> None:
    """Let those who wait for the loop be cancelled when it takes them.

    It takes requests first, and cancellations afterwards: those of a request that came in between would find nobody.
    """
    with requests.mutex:
        for state in requests.queue:
            if state.request_id == name:
                state.__dict__[CANCELLED] = True


class Leaving:
    """Takes requests out of the loop, between two steps, wherever they are in it.

    Args:
        processor: transformers' batch processor.
        copies: sequences for every prompt.
    """

    def __init__(self, processor: Any, copies: int) -> None:
        self._processor = processor
        self._scheduler = processor.scheduler
        self._io = processor.inputs_and_outputs
        self._copies = copies
        processor._handle_request_error = self._tell
        self._scheduler.clear_cancelled_requests = self._with_outputs(self._scheduler.clear_cancelled_requests)

    def states(self) -> Iterator[RequestState]:
        """All requests that are under way or wait."""
        return itertools.chain(self._scheduler.active_requests.values(), self._scheduler.waiting_requests.values())

    def has_begun(self, ids: set[int]) -> bool:
        """Whether a request that has begun needs one of these adapters."""
        active, waiting = self._scheduler.active_requests, self._scheduler.waiting_requests
        begun = itertools.chain(active.values(), filter(has_begun, waiting.values()))
        return any(ids & {*ids_of(entry_of(state))} for state in begun)

    def find(self, name: Any) -> RequestState | None:
        """The request of this id."""
        return self._scheduler.active_requests.get(name) or self._scheduler.waiting_requests.get(name)

    def fail(self, state: RequestState, error: Exception, clears: bool = False) -> None:
        """End a request with an error, and the sequences that it would have been forked into.

        Args:
            state: the request.
            error: what its output tells.
            clears: whether its pages may hold what isn't finite.
        """
        self._take_out([state], clears)
        self._tell(error, state)
        state._status = RequestStatus.FINISHED  # which every batch under way skips

    def _tell(self, error: Exception, state: RequestState) -> None:
        router = self._processor.output_router
        router.fail_and_deliver(state, error)
        for name in children_of(state.request_id, state.num_children):  # somebody may be waiting for them
            router.fail_and_deliver(RequestState(name, state.initial_tokens), error)

    def restart(self, states: Iterable[RequestState]) -> None:
        """Compute requests anew from their prompts and the tokens that they have, in other pages."""
        states = list(states)
        again = [state.create_equivalent_initial_request() for state in states]
        self._take_out(states, clears=True)
        for state, new in zip(states, again):
            new.created_time, new._timestamps = state.created_time, state._timestamps
            self._scheduler.add_waiting_request(new)

    def _take_out(self, states: list[RequestState], clears: bool) -> None:
        scheduler, processor = self._scheduler, self._processor
        names = [state.request_id for state in states]
        for state, name in zip(states, names):
            state._status = RequestStatus.FINISHED  # for a batch that is still under way
            if hasattr(processor, "offloading_manager"):
                processor.offloading_manager.free_request_cpu_cache(state)
            scheduler.active_requests.pop(name, None)
            if scheduler.waiting_requests.pop(name, None) is not None:
                scheduler.waiting_requests_order.remove(name)
            if not clears:
                processor.cache.free_blocks(name)
        if clears:
            with on_stream(self._io.compute_stream):  # behind the steps that still write there
                clear_pages(processor.cache, names)
        scheduler._requests_to_fork = [
            each for each in scheduler._requests_to_fork if not any(each is state for state in states)
        ]
        # a later request of the same id isn't the one whose token a batch under way is about to hand on
        for pair in getattr(self._io, "io_pairs", ()):
            known = pair.host_io.req_id_to_new_token_position
            pair.host_io.req_id_to_new_token_position = {
                object() if name in names else name: position for name, position in known.items()
            }
        if not scheduler.active_requests:
            scheduler.block_new_requests = False  # until somebody ends, of whom there is none

    def _with_outputs(self, clear: Callable[[], list[RequestState]]) -> Callable[[], list[RequestState]]:
        """What lets go of cancelled requests, with a last output for each, and for the children of each."""

        def clear_cancelled_requests() -> list[RequestState]:
            with self._scheduler._cancellation_lock:
                asked = list(self._scheduler._requests_to_cancel)
            for name in asked:
                for each in (name, *children_of(name, self._copies - 1)):
                    state = self.find(each)
                    if state is not None:
                        error = ModelStateError(
                            f"request {each!r} was cancelled, by cancel_request({name!r}): expected it to be left "
                            "alone until its end. Add it again to have all of its tokens."
                        )
                        self.fail(state, error)
            return clear()

        return clear_cancelled_requests
