"""Whose request begins next in continuous batching."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from peft_multibatch.plan.ids import Entry, ids_of
from peft_multibatch.plan.segments import BASE


KEY = "adapter_id"
"""Where a request's entry travels: among its arguments for logits processors, which forks and evictions copy."""


def entry_of(state: RequestState) -> Entry:
    """What a request runs under."""
    return state.logit_processor_kwargs.get(KEY, BASE)


def has_begun(state: RequestState) -> bool:
    """Whether a request ran before: it is under way, or was evicted."""
    return bool(
        state.status not in (RequestStatus.PENDING,)
        or state.generated_tokens
        or state._true_initial_tokens
        or getattr(state, "is_cpu_offloaded", False)
    )


class FairScheduler:
    """Whose request begins next: that of the adapter which was served least, among those that have requests.

    Every token that runs counts for its adapter; mixtures of the same adapters count as one, whatever their weights.
    One that had no requests for a while doesn't accumulate credit: it begins with what each of the others would have
    had if all had been served alike, and at least with the count of the least served one. With that count alone, new
    adapters that come without end would always go before one that was served. Within an adapter, requests begin in
    the order in which they came.

    Source:
        Virtual token counters: Sheng et al., Fairness in Serving Large Language Models, OSDI 2024. Where new ones
        begin: virtual time, Parekh and Gallager, A Generalized Processor Sharing Approach to Flow Control, 1993.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[int, ...], float] = {}
        self._now = 0.0  # what each had been served if all had been served alike

    def charge(self, entry: Entry, tokens: int) -> None:
        """Count tokens that run for an entry."""
        self._counts[ids_of(entry)] = self._counts.get(ids_of(entry), self._now) + tokens
        self._now += tokens / len(self._counts)

    def order(self, waiting: Sequence[RequestState], running: set[Entry]) -> list[RequestState]:
        """Requests in the order in which they should begin; those that have begun already come first.

        Args:
            waiting: requests in the order in which they came.
            running: entries of the requests that are under way.
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
