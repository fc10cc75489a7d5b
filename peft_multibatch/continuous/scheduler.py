"""Decide which request starts next, fairly between adapters."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping
from typing import Any, NamedTuple

from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from peft_multibatch.plan.ids import Entry, ids_of
from peft_multibatch.plan.segments import BASE


KEY = "adapter_id"
"""Key of a request's entry in its arguments for logits processors, which forks and evictions copy."""


SLACK = 64
"""The number of forgotten requests and turns that are kept at least, so that they are removed many at once."""

Adapters = tuple[int, ...]
"""The ids of a request's adapters: several for a mixture, none for the base model."""


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
    An adapter without waiting requests doesn't accumulate credit: when one waits again, it starts at the count that
    equal service would have given each adapter, and at least at the lowest count of those that wait. With the lowest
    count alone, an endless stream of new adapters would always go before one that was already served; without it, one
    that used what nobody else wanted would have to wait for as long. Requests of the same adapter start in order of
    arrival.

    There is a queue for each adapter, and a heap of their turns, so that a step takes no longer because many wait.

    Attributes:
        mixtures: adapters of mixtures for which requests wait, which are also in ``adapters``.

    Source:
        Virtual token counters: Sheng et al., Fairness in Serving Large Language Models, OSDI 2024. Initial counts:
        virtual time, Parekh and Gallager, A Generalized Processor Sharing Approach to Flow Control, 1993.
    """

    def __init__(self) -> None:
        self.mixtures: set[Adapters] = set()
        self._counts: dict[Adapters, float] = {}  # of adapters with requests
        self._now = 0.0  # the count of each adapter if all had been served equally
        self._running: set[Adapters] = set()
        self._waiting: Mapping[Any, RequestState] = {}
        self._begun: list[RequestState] = []
        # requests that haven't begun, in order of arrival; some may not be waiting any more
        self._queues: dict[Adapters, deque[tuple[int, RequestState]]] = {}
        self._places = itertools.count()
        self._size = 0  # of all queues together
        self._added: dict[Adapters, None] = {}  # for which requests came since the last update, in order
        self._seen = 0  # the place of the first of these requests
        self._turns: list[tuple[float, int, Adapters]] = []  # a heap; those that are out of date come up too early
        self._turn_of: dict[Adapters, tuple[float, int, Adapters]] = {}

    def charge(self, entry: Entry, tokens: int) -> None:
        """Add tokens to the count of an entry's adapters."""
        adapters = ids_of(entry)
        self._running.add(adapters)  # or its count would stay
        self._counts[adapters] = self._counts.get(adapters, self._now) + tokens
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
            return
        adapters = ids_of(entry_of(state))
        if adapters not in self._queues:
            self._queues[adapters] = deque()
            if len(adapters) > 1:
                self.mixtures.add(adapters)
        self._queues[adapters].append((next(self._places), state))
        self._added[adapters] = None
        self._size += 1

    def left(self, state: RequestState, waiting: Mapping[Any, RequestState]) -> None:
        """Forget a request that was cancelled or failed, and its adapters' count if it was the last one for them.

        Args:
            state: the request.
            waiting: the requests that still wait, by id.
        """
        self._waiting = waiting
        self._head(ids_of(entry_of(state)))
        if self._size > 2 * len(self._waiting) + SLACK:  # many left that were behind others
            for adapters, queue in list(self._queues.items()):
                self._queues[adapters] = deque(each for each in queue if self._waits(each[1]))
                self._head(adapters)
            self._size = sum(map(len, self._queues.values()))

    def update(self, waiting: Mapping[Any, RequestState], running: Iterable[Entry]) -> None:
        """Note which requests wait and run.

        Args:
            waiting: the waiting requests, by id.
            running: entries of the running requests.
        """
        self._waiting = waiting
        self._begun = list(filter(self._waits, self._begun))
        before, self._running = self._running, {*map(ids_of, running)}
        for adapters in before - self._running:
            if adapters not in self._queues:
                self._counts.pop(adapters, None)
        if len(self._turns) > 2 * len(self._turn_of) + SLACK:
            self._turns = list(self._turn_of.values())
            heapq.heapify(self._turns)
        # those for which no request has waited before
        new = [each for each in self._added if (head := self._head(each)) is not None and head[0] >= self._seen]
        self._added, self._seen = {}, next(self._places)
        for adapters in new:
            self._turn_of.pop(adapters, None)
        first = self._first_turn()
        counts = [self._counts[each] for each in self._running if each in self._counts]
        self._now = max(self._now, min(counts, default=0.0) if first is None else first[0])
        for adapters in new:
            self._counts[adapters] = max(self._counts.get(adapters, 0.0), self._now)
            self._turn_of[adapters] = turn = self._counts[adapters], self._queues[adapters][0][0], adapters
            heapq.heappush(self._turns, turn)

    @property
    def adapters(self) -> KeysView[Adapters]:
        """Adapters for which requests wait that haven't begun; maybe also some whose last request left just now."""
        return self._queues.keys()

    def begun(self) -> list[Candidate]:
        """Requests that have started before, which start first."""
        return [Candidate(-math.inf, place, state) for place, state in enumerate(self._begun)]

    def first(self, adapters: Adapters) -> Candidate | None:
        """The first request for these adapters that hasn't begun."""
        head = self._head(adapters)
        return None if head is None else Candidate(self._counts[adapters], *head)

    def of(self, some: Iterable[Adapters], most: int) -> list[Candidate]:
        """The first requests for some of the adapters, in the order in which they should start."""
        coming = [self._requests(adapters) for adapters in some if self._head(adapters) is not None]
        heapq.heapify(coming)
        found: list[Candidate] = []
        while coming and len(found) < most:
            self._take(coming, found)
        return found

    def except_of(self, others: Callable[[Adapters], bool], most: int) -> list[Candidate]:
        """The first requests for all adapters but those for which a function returns True."""
        coming: list[tuple] = []
        found: list[Candidate] = []
        taken = []
        try:
            while len(found) < most:
                while (turn := self._first_turn()) is not None and (not coming or turn[:2] < coming[0][:2]):
                    taken.append(heapq.heappop(self._turns))
                    if not others(turn[2]):
                        heapq.heappush(coming, self._requests(turn[2]))
                if not coming:
                    break
                self._take(coming, found)
        finally:
            for turn in taken:
                heapq.heappush(self._turns, turn)
        return found

    def _requests(self, adapters: Adapters) -> tuple[float, int, RequestState, Iterator[tuple[int, RequestState]]]:
        queue = iter(self._queues[adapters])
        place, state = next(queue)
        return self._counts[adapters], place, state, queue

    def _take(self, coming: list[tuple], found: list[Candidate]) -> None:
        """Take the next request from a heap of results of ``_requests``."""
        tokens, place, state, queue = heapq.heappop(coming)
        if self._waits(state):
            found.append(Candidate(tokens, place, state))
            tokens += len(state.initial_tokens)
        following = next(queue, None)
        if following is not None:
            heapq.heappush(coming, (tokens, place, following[1], queue))

    def _first_turn(self) -> tuple[float, int, Adapters] | None:
        """The adapters that have the first turn, with their count and the place of their first request."""
        while self._turns:
            turn = self._turns[0]
            adapters = turn[2]
            head = self._head(adapters)
            if head is None or self._turn_of.get(adapters) is not turn:  # there are no requests, or a newer turn
                heapq.heappop(self._turns)
                continue
            now = self._counts[adapters], head[0], adapters
            if now == turn:
                return turn
            self._turn_of[adapters] = now
            heapq.heapreplace(self._turns, now)
        return None

    def _head(self, adapters: Adapters) -> tuple[int, RequestState] | None:
        """The first request of a queue, and its place; forgets those that no longer wait, and a queue without any."""
        queue = self._queues.get(adapters)
        if queue is None:
            return None
        while queue and not self._waits(queue[0][1]):
            queue.popleft()
            self._size -= 1
        if queue:
            return queue[0]
        del self._queues[adapters]
        self._turn_of.pop(adapters, None)
        self.mixtures.discard(adapters)
        if adapters not in self._running:
            self._counts.pop(adapters, None)
        return None

    def _waits(self, state: RequestState) -> bool:
        return self._waiting.get(state.request_id) is state
