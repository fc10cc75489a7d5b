"""Decide which request starts next, fairly between adapters."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from peft_multibatch.plan.ids import Entry, ids_of
from peft_multibatch.plan.segments import BASE


KEY = "adapter_id"
"""Key of a request's entry in its arguments for logits processors, which forks and evictions copy."""


def entry_of(state: RequestState) -> Entry:
    """The adapter entry of a request."""
    return state.logit_processor_kwargs.get(KEY, BASE)


def has_begun(state: RequestState) -> bool:
    """Whether a request has run: it is running, or was evicted."""
    return bool(
        state.status not in (RequestStatus.PENDING,)
        or state.generated_tokens
        or state._true_initial_tokens
        or getattr(state, "is_cpu_offloaded", False)
    )


class Candidate(NamedTuple):
    """A waiting request. Those with the fewest tokens start first, and among these, those with the lowest place.

    Attributes:
        tokens: the tokens counted for its adapters, once all requests before it have started.
        place: the same for all of an adapter's requests, and for no others.
        state: transformers' state of the request.
    """

    tokens: float
    place: int
    state: RequestState


class FairScheduler:
    """Picks the adapter that has been served least, among those with waiting requests.

    Every token that runs counts for its adapter; mixtures of the same adapters count as one, whatever their weights.
    An adapter without requests doesn't accumulate credit: when it returns, it starts at the count that equal service
    would have given each adapter, and at least at the lowest count. With the lowest count alone, an endless stream of
    new adapters would always go before one that was already served. Requests of the same adapter start in order of
    arrival.

    There is a queue for each adapter, so that a step takes no longer because many requests wait.

    Source:
        Virtual token counters: Sheng et al., Fairness in Serving Large Language Models, OSDI 2024. Initial counts:
        virtual time, Parekh and Gallager, A Generalized Processor Sharing Approach to Flow Control, 1993.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[int, ...], float] = {}
        self._now = 0.0  # the count of each adapter if all had been served equally
        self._waiting: Mapping[Any, RequestState] = {}
        self._begun: list[RequestState] = []
        # requests that haven't begun, by their adapters, in order of arrival; some may not be waiting any more
        self._queues: dict[tuple[int, ...], deque[tuple[int, RequestState]]] = {}
        self._places = itertools.count()

    def charge(self, entry: Entry, tokens: int) -> None:
        """Add tokens to the count of an entry's adapters."""
        self._counts[ids_of(entry)] = self._counts.get(ids_of(entry), self._now) + tokens
        self._now += tokens / len(self._counts)

    def queueing(self, add: Callable[[RequestState], None]) -> Callable[[RequestState], None]:
        """Wrap a scheduler's ``add_waiting_request`` to queue the request here, too."""

        def add_and_queue(state: RequestState) -> None:
            add(state)
            self.add(state)

        return add_and_queue

    def add(self, state: RequestState) -> None:
        """Queue a request that waits from now on."""
        if has_begun(state):
            self._begun.append(state)
        else:
            self._queues.setdefault(ids_of(entry_of(state)), deque()).append((next(self._places), state))

    def update(self, waiting: Mapping[Any, RequestState], running: Iterable[Entry]) -> None:
        """Forget requests that no longer wait, and the counts of adapters without requests.

        Args:
            waiting: the waiting requests, by id.
            running: entries of the running requests.
        """
        self._waiting = waiting
        self._begun = list(filter(self._waits, self._begun))
        total = 0
        for adapters, queue in list(self._queues.items()):
            while queue and not self._waits(queue[0][1]):
                queue.popleft()
            total += len(queue)
            if not queue:
                del self._queues[adapters]
        if total > 2 * len(waiting):  # many were cancelled behind others that wait
            self._queues = {
                adapters: deque(each for each in queue if self._waits(each[1]))
                for adapters, queue in self._queues.items()
            }
        busy = {*self._queues, *map(ids_of, running)}
        self._counts = {adapters: count for adapters, count in self._counts.items() if adapters in busy}
        self._now = max(self._now, min(self._counts.values())) if self._counts else 0.0
        for adapters in self._queues:
            self._counts.setdefault(adapters, self._now)

    @property
    def adapters(self) -> Iterable[tuple[int, ...]]:
        """Ids of the adapters for which requests wait that haven't begun."""
        return self._queues.keys()

    def begun(self) -> list[Candidate]:
        """Requests that have begun before, which start first."""
        return [Candidate(-math.inf, place, state) for place, state in enumerate(self._begun)]

    def first(self, adapters: tuple[int, ...]) -> RequestState:
        """The first waiting request for these adapters."""
        return self._queues[adapters][0][1]

    def in_turn(self, some: Iterable[tuple[int, ...]]) -> Iterator[Candidate]:
        """The requests for some of the adapters that haven't begun, in the order in which they should start.

        Args:
            some: ids of the adapters of a request, any number of times.
        """
        turns = []
        for adapters in some:
            queue = iter(self._queues[adapters])
            place, state = next(queue)
            turns.append((self._counts[adapters], place, state, queue))
        heapq.heapify(turns)
        while turns:
            count, place, state, queue = turns[0]
            if self._waits(state):
                yield Candidate(count, place, state)
                count += len(state.initial_tokens)
            following = next(queue, None)
            if following is None:
                heapq.heappop(turns)
            else:
                heapq.heapreplace(turns, (count, place, following[1], queue))

    def _waits(self, state: RequestState) -> bool:
        return self._waiting.get(state.request_id) is state
