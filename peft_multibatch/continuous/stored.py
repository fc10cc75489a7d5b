"""Start requests of stored adapters once their adapters are in memory, and keep these there until the requests end."""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Callable, Collection, Container, Mapping, Sequence, Set
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers.generation.continuous_batching.requests import RequestState

from peft_multibatch.continuous.leaving import children_of
from peft_multibatch.continuous.scheduler import Adapters, Candidate, FairScheduler, entry_of
from peft_multibatch.errors import MultibatchError
from peft_multibatch.plan.ids import Entry, ids_of


if TYPE_CHECKING:
    from peft_multibatch.adapters.registry import Registry
    from peft_multibatch.adapters.store.loading import Turn
    from peft_multibatch.adapters.store.version import StoredAdapter


STARVED = 1.0
"""Seconds after which a request without memory for its adapters makes later ones wait."""

AHEAD = 4
"""Adapters are loaded ahead for as many requests as a batch holds, divided by this."""


SPARE = 32
"""Candidates besides those for free places, in case some don't fit into the cache or the step."""


class Waiting(NamedTuple):
    """A waiting request.

    Attributes:
        candidate: the request.
        ids: the ids of its stored adapters.
        is_late: whether these aren't in memory, or had to be loaded for it.
    """

    candidate: Candidate
    ids: list[int]
    is_late: bool

    @property
    def state(self) -> RequestState:
        """transformers' state of the request."""
        return self.candidate.state


class Lease(NamedTuple):
    """Keeps a request's adapters in memory.

    Attributes:
        adapters: the adapters.
        names: ids of the request and of its forks, which share the lease.
    """

    adapters: list[StoredAdapter]
    names: list[Any]


class StoredRequests:
    """Delays requests until their adapters are loaded, and no others.

    Requests whose adapters had to be loaded get at most half of the batch while others can start, so that a tenant
    with thousands of cold adapters can't take all of it; without others they get the whole batch.

    Attributes:
        failed: requests whose adapters can't be loaded, with their errors.

    Args:
        registry: the model's adapters.
        wake_up: wakes a loop that has no requests to run; not in older versions of transformers.
    """

    def __init__(self, registry: Registry, wake_up: threading.Event | None) -> None:
        self.failed: list[tuple[RequestState, MultibatchError]] = []
        self._registry, self._wake_up = registry, wake_up
        self._leases: dict[Any, Lease] = {}  # of requests that run, or are about to start
        self._loaded: dict[Any, float] = {}  # requests whose adapters had to be loaded, and since when they wait
        self._early: set[Adapters] = set()  # adapters that load before the loop sees their requests
        self._unseen: set[Adapters] = set()  # those of the turn before, which are forgotten after the next
        self._short: tuple[Any, float] = None, 0.0  # the first request without memory, and since when

    def queued(self, entry: Entry, processor: Any, ahead: int) -> None:
        """Start loading a new request's adapters without waiting for the running step, if it may be next.

        Args:
            entry: the request's adapters.
            processor: transformers' batch processor; None before the loop has started.
            ahead: number of earlier requests that the processor hasn't received yet.
        """
        store = self._registry.store
        if store is None or processor is None:
            return
        ids = [each for each in ids_of(entry) if store.has(each)]
        if all(map(store.is_coming, ids)):
            return
        scheduler = processor.scheduler
        ahead += len(scheduler.active_requests) + len(scheduler.waiting_requests)
        if ahead < scheduler.max_requests_per_batch:
            self._early.add(ids_of(entry))
            with suppress(MultibatchError):  # the loop reports it
                store.load(ids)

    def keep(self, active: Collection[Any], waiting: Container[Any]) -> None:
        """Release the adapters of all requests except these, because the others have ended or may no longer start."""
        store = self._registry.store
        for name in self._leases.keys() - active:  # few, in every step
            if not any(each in active or each in waiting for each in self._leases[name].names):
                if store is not None:
                    store.note_use(self._leases[name].adapters)
                del self._leases[name]
        for name in [name for name in self._loaded if name not in active and name not in waiting]:
            del self._loaded[name]

    def ready(self, queue: FairScheduler, held: Set[int], scheduler: Any) -> list[RequestState]:
        """Return the requests that may run now, in order; the adapters of others start to load.

        Adapters are loaded for the requests that may start now, and ahead for few of those that come next, so that a
        long queue doesn't evict the adapters of those at its head. Loading never evicts an adapter that a request that
        may run now needs.

        Args:
            queue: the waiting requests.
            held: ids of adapters whose requests may not start.
            scheduler: transformers' scheduler, which knows the running requests.
        """
        store, active = self._registry.store, scheduler.active_requests
        places = max(scheduler.max_requests_per_batch - len(active), 0)

        def is_held(adapters: Adapters) -> bool:
            return bool(held) and not held.isdisjoint(adapters)

        if store is None:
            return [each.state for each in [*queue.begun(), *queue.except_of(is_held, places + SPARE)]]
        self.keep(active.keys(), scheduler.waiting_requests)
        now = time.monotonic()
        self._note_early(queue, now)
        half = max(scheduler.max_requests_per_batch // 2, 1) - len(self._loaded.keys() & active.keys())
        ahead = max(scheduler.max_requests_per_batch // AHEAD, 1)
        late, others = self._candidates(queue, scheduler.waiting_requests, is_held, places, ahead)
        count = max(min(places, half), places - len(others), 0)
        late, later = late[:count], late[count:]
        starved = self._starved(late)
        if starved is not None:
            late = late[: late.index(starved) + 1]
            others = [each for each in others if _order(each) < _order(starved) or not each.ids]
        chosen = [each for each in others if not each.ids]
        turn = store.begin_turn()
        # first, so that loading doesn't evict their adapters
        chosen += [each for each in [each for each in others if each.ids][:places] if self._lease(each, turn)]
        for each in late:
            since = self._loaded.get(each.state.request_id)
            self._loaded.setdefault(each.state.request_id, now)
            if self._lease(each, turn, since):
                chosen.append(each)
        short = [each for each in late if not all(map(store.is_coming, each.ids))]
        if later and not short:
            later = later[:ahead]
            soon = [number for each in [*late, *others[: scheduler.max_requests_per_batch]] for number in each.ids]
            store.look_ahead([number for each in later for number in each.ids], soon)
            for each in later:
                if any(store.is_coming(number) and not store.is_loaded(number) for number in each.ids):
                    self._loaded.setdefault(each.state.request_id, now)
        if not short or short[0].state.request_id != self._short[0]:
            self._short = (short[0].state.request_id if short else None), now
        return [each.state for each in sorted(chosen, key=_order)]

    def _candidates(
        self,
        queue: FairScheduler,
        waiting: Mapping[Any, RequestState],
        is_held: Callable[[Adapters], bool],
        places: int,
        ahead: int,
    ) -> tuple[list[Waiting], list[Waiting]]:
        """The first requests that are late, and the first of the others, each in the order in which they should start.

        Args:
            queue: the waiting requests.
            waiting: the same by id.
            is_held: whether requests for adapters may not start.
            places: the number of requests that may start now.
            ahead: the number of late ones for which adapters may be loaded ahead.
        """
        store = self._registry.store
        assert store is not None
        there = {each for each in self._in_memory(queue) if not is_held(each)}
        found = [*queue.begun(), *queue.of(there, places + SPARE + len(self._loaded))]
        loaded = {ids_of(entry_of(waiting[name])) for name in self._loaded if name in waiting} & there
        firsts = {each.state.request_id: each for adapters in loaded if (each := queue.first(adapters)) is not None}
        found += [firsts[name] for name in firsts.keys() - {each.state.request_id for each in found}]
        found += queue.except_of(lambda adapters: adapters in there or is_held(adapters), places + ahead)
        late: list[Waiting] = []
        others: list[Waiting] = []
        for each in found:
            ids = [number for number in ids_of(entry_of(each.state)) if store.has(number)]
            is_late = bool(ids) and (each.state.request_id in self._loaded or not all(map(store.is_loaded, ids)))
            (late if is_late else others).append(Waiting(each, ids, is_late))
        return sorted(late, key=_order), sorted(others, key=_order)

    def _in_memory(self, queue: FairScheduler) -> set[Adapters]:
        """Adapters for which requests wait that don't have to be loaded."""
        store = self._registry.store
        assert store is not None
        numbers = [*store.loaded(), *self._registry.of_peft()]
        return queue.adapters & {(), *((number,) for number in numbers)} | {
            each for each in queue.mixtures if all(store.is_loaded(number) for number in each if store.has(number))
        }

    def _note_early(self, queue: FairScheduler, now: float) -> None:
        """Find the requests whose adapters began to load before the loop saw them."""
        early, self._early = self._early, set()  # other threads add to it
        known = {adapters for adapters in early | self._unseen if adapters in queue.adapters}
        for adapters in known:
            first = queue.first(adapters)
            if first is not None:
                self._loaded.setdefault(first.state.request_id, now)
        self._unseen = early - known

    def _lease(self, waiting: Waiting, turn: Turn, since: float | None = None) -> bool:
        """Whether a request may run now; starts to load its adapters if they aren't in memory."""
        store, name = self._registry.store, waiting.state.request_id
        assert store is not None
        known = self._leases.get(name)
        if known is not None and not all(map(operator.is_, known.adapters, map(store.current, waiting.ids))):
            del self._leases[name]  # of versions that were replaced
        if self._wake_up is not None:
            store.wake(self._wake_up)
        try:
            if name in self._leases:
                store.check(self._leases[name].adapters)
                return True
            adapters = store.lease(waiting.ids, turn, since)
        except MultibatchError as error:
            self.failed.append((waiting.state, error))
            self._loaded.pop(name, None)
            return False
        if adapters is None:
            return False
        if known is None:
            store.count(*((0, len(adapters)) if waiting.is_late else (len(adapters), 0)))
        names = [name, *children_of(name, waiting.state.num_children)] if known is None else known.names
        self._leases[name] = Lease(adapters, names)
        return True

    def _starved(self, late: Sequence[Waiting]) -> Waiting | None:
        """The request that has waited too long for memory, if any; later ones wait behind it."""
        name, since = self._short
        if time.monotonic() - since < STARVED:
            return None
        return next((each for each in late if each.state.request_id == name), None)


def _order(waiting: Waiting) -> tuple[float, int]:
    """What requests are sorted by, so that they start in turn."""
    return waiting.candidate[:2]
