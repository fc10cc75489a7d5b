"""Requests under stored adapters: one begins when its adapters are in memory, where they stay until it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Container, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers.generation.continuous_batching.requests import RequestState

from peft_multibatch.continuous.leaving import children_of
from peft_multibatch.continuous.scheduler import entry_of
from peft_multibatch.errors import MultibatchError
from peft_multibatch.plan.ids import Entry, ids_of


if TYPE_CHECKING:
    from peft_multibatch.adapters.registry import Registry
    from peft_multibatch.adapters.store.version import StoredAdapter


STARVED = 1.0
"""Seconds after which a request that finds no room for its adapters has others wait behind it."""


class Waiting(NamedTuple):
    """A request that waits.

    Attributes:
        state: transformers' own.
        ids: of its stored adapters.
        is_late: whether these aren't in memory, or had to be loaded for it.
    """

    state: RequestState
    ids: list[int]
    is_late: bool


class Lease(NamedTuple):
    """What keeps a request's adapters in memory.

    Attributes:
        adapters: these.
        names: of the request and of those into which it is forked: it is theirs as well.
    """

    adapters: list[StoredAdapter]
    names: list[Any]


class StoredRequests:
    """Holds back the requests whose adapters have yet to be loaded, and no others.

    While others can begin, requests whose adapters had to be loaded get half of the places in the batch, so that a
    tenant with thousands of cold adapters can't have them all; without others they get every place.

    Attributes:
        failed: requests whose adapters can't be loaded, and why.

    Args:
        registry: the model's adapters.
        wake_up: for which a loop without requests that may run waits; older transformers have none.
    """

    def __init__(self, registry: Registry, wake_up: threading.Event | None) -> None:
        self.failed: list[tuple[RequestState, MultibatchError]] = []
        self._registry, self._wake_up = registry, wake_up
        self._leases: dict[Any, Lease] = {}  # of requests that run, or are about to
        self._loaded: set[Any] = set()  # requests whose adapters had to be loaded
        self._early: set[Entry] = set()  # of requests that weren't seen yet, and whose adapters are loading
        self._short: tuple[Any, float] = None, 0.0  # the first request that finds no room, and since when

    def queued(self, entry: Entry, processor: Any, ahead: int) -> None:
        """A request came: its adapters begin to load at once, and not after the step that runs, if it may be next.

        Args:
            entry: what it runs under.
            processor: transformers', or None where nothing ran yet.
            ahead: requests of which it hasn't heard yet.
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
            self._early.add(entry)
            with suppress(MultibatchError):  # which the loop finds as well
                store.load(ids)

    def keep(self, there: Container[Any]) -> None:
        """Let go of the adapters of all requests but these: those that ended, or may not begin any more."""
        self._leases = {name: lease for name, lease in self._leases.items() if any(map(there.__contains__, lease.names))}
        self._loaded = {name for name in self._loaded if name in there}

    def ready(self, states: Sequence[RequestState], scheduler: Any) -> list[RequestState]:
        """Of requests in their order, those that may run now; adapters of the others begin to load.

        Adapters of no more requests are loaded than may begin, so that a long queue doesn't drive out those at its
        head; and none goes for one that is loaded while a request that may run now needs it.

        Args:
            states: the requests that wait.
            scheduler: transformers', which knows those that run.
        """
        store, active = self._registry.store, scheduler.active_requests
        if store is None:
            return list(states)
        self.keep(active.keys() | {state.request_id for state in states})
        places = max(scheduler.max_requests_per_batch - len(active), 0)
        waiting: list[Waiting] = []
        for state in states:
            ids = [each for each in ids_of(entry_of(state)) if store.has(each)]
            if entry_of(state) in self._early:
                self._early.discard(entry_of(state))
                self._loaded.add(state.request_id)
            is_late = state.request_id in self._loaded or not all(map(store.is_loaded, ids))
            waiting.append(Waiting(state, ids, is_late))
        late = [each for each in waiting if each.is_late]
        others = [each for each in waiting if not each.is_late]
        half = max(scheduler.max_requests_per_batch // 2, 1) - len(self._loaded & active.keys())
        late = late[: max(min(places, half), places - len(others), 0)]
        starved = self._starved(late)
        if starved is not None:
            late = late[: late.index(starved) + 1]
            others = [each for each in waiting[: waiting.index(starved)] if not each.is_late]
            others += [each for each in waiting[waiting.index(starved) :] if not each.ids]
        found = {each.state.request_id for each in others if not each.ids}
        for each in [each for each in others if each.ids][:places]:  # first, so that none goes for those to come
            if self._lease(each, []):
                found.add(each.state.request_id)
        ahead: list[int] = []
        for each in late:
            self._loaded.add(each.state.request_id)
            if self._lease(each, ahead):
                found.add(each.state.request_id)
            ahead += each.ids
        short = [each for each in late if not all(map(store.is_coming, each.ids))]
        if not short or short[0].state.request_id != self._short[0]:
            self._short = (short[0].state.request_id if short else None), time.monotonic()
        return [state for state in states if state.request_id in found]

    def _lease(self, waiting: Waiting, ahead: Sequence[int]) -> bool:
        """Whether a request may run now; its adapters begin to load where they aren't in memory."""
        store = self._registry.store
        assert store is not None
        try:
            adapters = store.lease(waiting.ids, ahead)
        except MultibatchError as error:
            self.failed.append((waiting.state, error))
            return False
        if adapters is not None:
            name, known = waiting.state.request_id, self._leases.get(waiting.state.request_id)
            if known is None:
                store.count(*((0, len(adapters)) if waiting.is_late else (len(adapters), 0)))
            names = [name, *children_of(name, waiting.state.num_children)] if known is None else known.names
            self._leases[name] = Lease(adapters, names)
        elif self._wake_up is not None:
            store.on_loaded(self._wake_up.set)
        return adapters is not None

    def _starved(self, late: Sequence[Waiting]) -> Waiting | None:
        """The request that has found no room for too long, behind which others wait until it has."""
        name, since = self._short
        if time.monotonic() - since < STARVED:
            return None
        return next((each for each in late if each.state.request_id == name), None)
