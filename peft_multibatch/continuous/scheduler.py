"""Decide which request starts next, fairly between adapters."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

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


class FairScheduler:
    """Picks the adapter that has been served least, among those with waiting requests.

    Every token that runs counts for its adapter; mixtures of the same adapters count as one, whatever their weights.
    An adapter without requests doesn't accumulate credit: when it returns, it starts at the count that equal service
    would have given each adapter, and at least at the lowest count. With the lowest count alone, an endless stream of
    new adapters would always go before one that was already served. Requests of the same adapter start in order of
    arrival.

    Source:
        Virtual token counters: Sheng et al., Fairness in Serving Large Language Models, OSDI 2024. Initial counts:
        virtual time, Parekh and Gallager, A Generalized Processor Sharing Approach to Flow Control, 1993.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[int, ...], float] = {}
        self._now = 0.0  # the count of each adapter if all had been served equally

    def charge(self, entry: Entry, tokens: int) -> None:
        """Add tokens to the count of an entry's adapters."""
        self._counts[ids_of(entry)] = self._counts.get(ids_of(entry), self._now) + tokens
        self._now += tokens / len(self._counts)

    def order(self, waiting: Sequence[RequestState], running: set[Entry]) -> list[RequestState]:
        """Sort requests by the order in which they should start; those that have already started come first.

        Args:
            waiting: requests in order of arrival.
            running: entries of the running requests.
        """
        begun = [state for state in waiting if has_begun(state)]
        queues: dict[tuple[int, ...], deque[RequestState]] = {}
        for state in waiting:
            if not has_begun(state):
                queues.setdefault(ids_of(entry_of(state)), deque()).append(state)
        busy = {*queues, *map(ids_of, running)}
        self._counts = {entry: count for entry, count in self._counts.items() if entry in busy}
        self._now = max(self._now, min(self._counts.values())) if self._counts else 0.0
        for entry in queues:
            self._counts.setdefault(entry, self._now)
        turns = [(self._counts[entry], place, queue) for place, (entry, queue) in enumerate(queues.items())]
        heapq.heapify(turns)
        while turns:
            count, place, queue = turns[0]
            begun.append(queue.popleft())
            if queue:
                heapq.heapreplace(turns, (count + len(begun[-1].initial_tokens), place, queue))
            else:
                heapq.heappop(turns)
        return begun
