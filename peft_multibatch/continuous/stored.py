"""Requests under stored adapters: one begins when its adapters are in memory, where they stay until it ends."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers.generation.continuous_batching.requests import RequestState

from peft_multibatch.continuous.scheduler import entry_of
from peft_multibatch.errors import MultibatchError
from peft_multibatch.plan.ids import ids_of


if TYPE_CHECKING:
    from peft_multibatch.adapters.registry import Registry
    from peft_multibatch.adapters.store.version import StoredAdapter


class StoredRequests:
    """Holds back the requests whose adapters have yet to be loaded, and no others.

    Attributes:
        failed: requests whose adapters can't be loaded, and why.

    Args:
        registry: the model's adapters.
        wake_up: for which a loop without requests that may run waits; older transformers have none.
    """

    def __init__(self, registry: Registry, wake_up: threading.Event | None) -> None:
        self.failed: list[tuple[RequestState, MultibatchError]] = []
        self._registry, self._wake_up = registry, wake_up
        self._leases: dict[Any, list[StoredAdapter]] = {}  # of requests that run, or are about to

    def ready(self, states: Sequence[RequestState], scheduler: Any) -> list[RequestState]:
        """Of requests in their order, those that may run now; adapters of the others begin to load.

        Adapters of no more requests are loaded than may begin, so that a long queue doesn't drive out those at its
        head.

        Args:
            states: the requests that wait.
            scheduler: transformers', which knows those that run.
        """
        store, active = self._registry.store, scheduler.active_requests
        if store is None:
            return list(states)
        there = active.keys() | {state.request_id for state in states}
        self._leases = {name: adapters for name, adapters in self._leases.items() if name in there}
        places = scheduler.max_requests_per_batch - len(active)
        found: list[RequestState] = []
        ahead: list[int] = []
        for state in states:
            ids = [number for number in ids_of(entry_of(state)) if store.has(number)]
            if not ids:
                found.append(state)
            elif places > 0:
                places -= 1
                try:
                    adapters = store.lease(ids, ahead)
                except MultibatchError as error:
                    self.failed.append((state, error))
                    continue
                ahead += ids
                if adapters is not None:
                    self._leases[state.request_id] = adapters
                    found.append(state)
                elif self._wake_up is not None:
                    store.on_loaded(self._wake_up.set)
        return found
