"""Loading stored adapters: room for all adapters of a batch at once, and timeouts."""

from __future__ import annotations

import gc
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence, Set

import torch
from torch import Tensor

from peft_multibatch.adapters.store.arena import Arena, size_class
from peft_multibatch.adapters.store.progress import Progress
from peft_multibatch.adapters.store.streams import Streams
from peft_multibatch.adapters.store.tier import Tier
from peft_multibatch.adapters.store.transfers import POLL, READERS, Load, Transfers, late
from peft_multibatch.adapters.store.version import Version
from peft_multibatch.errors import StoreFullError


STARVED = 1.0
"""Seconds after which a batch that waits for room makes later ones wait behind it."""


class Ticket:
    """A batch's place in the queue for memory, as long as its thread references this."""

    def __init__(self) -> None:
        self.since = time.monotonic()


class Turn:
    """Loads that are asked for at once, as by the requests that wait for a step of continuous batching.

    Attributes:
        stay: adapters that must not be evicted for others.
        too_large: the smallest size for which there was no room.
    """

    def __init__(self, stay: Iterable[Version] = ()) -> None:
        self.stay = {*stay}
        self.too_large = math.inf


class Loader:
    """Loads adapters into memory.

    Attributes:
        lock: guards all of a store's state.
        host: adapters in host memory.
        final: adapters on the device where calls compute; on a CPU, the same as ``host``.
        pinned: the pinned adapters, in memory or not.
        transfers: reads and copies them.

    Args:
        device: the device where calls compute.
        host: the most bytes of host memory.
        final: the most bytes of device memory.
        timeout: the most seconds that a batch waits.
        streams: the device's streams.
        let_go: called when memory runs out, to drop plans of calls that have ended.
        is_nested: whether a batch would begin inside another one, which may hold what those that wait are waiting for.
    """

    def __init__(
        self,
        device: torch.device,
        host: int,
        final: int,
        timeout: float,
        streams: Streams,
        let_go: Callable[[], None],
        is_nested: Callable[[], bool],
    ) -> None:
        self.lock = threading.Condition(threading.RLock())
        in_host = Arena(host, torch.device("cpu"), streams.has_memory, streams)
        self.host = self.final = Tier(in_host, keeps_pinned=not streams.has_memory)
        if streams.has_memory:
            self.final = Tier(Arena(final, device, False, streams))
        self.transfers = Transfers(self.lock, self.host, self.final, streams, timeout)
        self.pinned: set[Version] = set()
        self._timeout, self._let_go, self._is_nested = timeout, let_go, is_nested
        self._queue: deque[weakref.ref[Ticket]] = deque()

    def close(self) -> None:
        """Stop loading; batches that wait get an error. The caller holds the lock."""
        self.transfers.close()
        self.lock.notify_all()

    def check_size(self, version: Version) -> None:
        """Check that an adapter fits into the store's memory.

        Raises:
            StoreFullError: it is larger than all of the memory.
        """
        size = size_class(version.layout.size)
        limit = min(self.host.arena.limit, self.final.arena.limit)
        if size > limit:
            raise StoreFullError(
                f"adapter {version.name!r} needs {size} bytes, and the store has {limit}: expected a smaller adapter. "
                "Pass a larger max_host_memory or max_device_memory to adapter_store."
            )

    def pin(self, version: Version, is_pinned: bool) -> None:
        """Keep an adapter in memory once it was loaded, or not any more. The caller holds the lock."""
        version.is_pinned = is_pinned
        if is_pinned:
            self.pinned.add(version)
        else:
            self.pinned.discard(version)

    def check_pins(self, versions: Sequence[Version]) -> None:
        """Check that all of these adapters can be pinned together.

        Raises:
            StoreFullError: they don't fit into memory.
        """
        wanted = sum(size_class(version.layout.size) for version in versions)
        if wanted > self.final.arena.limit:
            raise StoreFullError(
                f"adapter {versions[-1].name!r} can't be pinned along with {len(versions) - 1} others, because they "
                f"need {wanted} bytes together, and the store has {self.final.arena.limit}: expected room for all "
                "pinned adapters. Unpin others, or pass more memory to adapter_store."
            )

    def prefetch(self, version: Version, turn: Turn) -> None:
        """Start loading an adapter, if there is room that no batch waits for. The caller holds the lock."""
        if version.loading is None and version not in self.final and not self._is_awaited():
            self._try(version, turn)

    def _try(self, version: Version, turn: Turn) -> bool:
        """Start loading an adapter, unless there is no room for its size."""
        if version.layout.size < turn.too_large and self._begin([version], turn.stay) is not None:
            return True
        turn.too_large = min(turn.too_large, version.layout.size)
        return False

    def look_ahead(self, versions: Sequence[Version], turn: Turn) -> None:
        """Start loading adapters that will be needed next, in this order.

        Into the memory where calls compute if there is room that no batch waits for, otherwise into host memory, and
        with at most half of the threads. The caller holds the lock.
        """
        missing = [each for each in dict.fromkeys(versions) if each not in self.final]
        free = READERS // 2 - len(self.transfers.ahead) - sum(each.loading is not None for each in missing)
        for version in missing:
            if free <= 0:
                return
            if version.loading is not None or version in self.transfers.ahead:
                continue
            try:
                is_begun = not self._is_awaited() and self._try(version, turn)
            except StoreFullError:  # the device has less memory than the limit; the load for its request says so
                return
            if not is_begun:
                if self.final is self.host or version in self.host:
                    continue
                if not self.host.make_room([version.layout.size], turn.stay, lambda: None):
                    continue
                self.transfers.read_ahead(version, turn.stay)
            free -= 1

    def check_time(self, version: Version, since: float) -> None:
        """Check that nobody waits for longer than the timeout while an adapter is loaded.

        Args:
            version: the adapter.
            since: when the caller began to wait for it, for room or for the load.

        Raises:
            StoreFullError: the caller does.
        """
        load = version.loading
        if load is not None and time.monotonic() - max(load.since, since) > self._timeout:
            raise late([version], self._timeout, "they weren't loaded")

    def fetch(self, versions: Sequence[Version]) -> dict[Version, Tensor]:
        """The weights of adapters, which are loaded if needed. Waits until there is room for all of them at once.

        Raises:
            AdapterFileError: files can't be read any more.
            StoreFullError: there is no room, or loading took too long.
            NotEnabledError: the model was disabled in the meantime.
        """
        with Progress("loading adapters", len(versions)) as progress:
            return self._fetch(versions, progress)

    def _fetch(self, versions: Sequence[Version], progress: Progress) -> dict[Version, Tensor]:
        deadline = time.monotonic() + self._timeout
        held: dict[Version, Tensor] = {}
        loads: dict[Version, Load] = {}
        ticket: Ticket | None = None
        is_reserved = was_collected = False
        try:
            while True:
                with self.lock:
                    self.transfers.check_open()
                    self.transfers.readers.start()
                    self.check_possible(versions)
                    if not is_reserved and (self._is_first(ticket) or (ticket is None and not self.is_starved())):
                        found = self._reserve(versions)
                        if found is not None:
                            held, loads = found
                            is_reserved, ticket = True, None
                    if not is_reserved and ticket is None:
                        ticket = Ticket()
                        self._queue.append(weakref.ref(ticket))
                    error = next((load.error for load in loads.values() if load.error is not None), None)
                    if error is not None:  # a new exception for each batch: a shared traceback would keep memory alive
                        raise type(error)(*error.args)
                    missing = sum(not load.has_ended for load in loads.values())
                    if is_reserved and not missing:
                        return held
                    left = deadline - time.monotonic()
                    if left > 0:
                        self.lock.wait(min(left, POLL))
                if left > 0:
                    progress.update(len(versions) - missing if is_reserved else 0)
                    continue
                if not was_collected:  # tracebacks and reference cycles may keep adapters alive
                    was_collected = True
                    gc.collect()
                    continue
                used = f"running calls used all {self.final.arena.limit} bytes"
                raise late(versions, self._timeout, "they weren't loaded" if is_reserved else used)
        except BaseException:  # whose traceback keeps this frame, and would keep the memory and the place in the queue
            held.clear()
            loads.clear()
            ticket = None
            raise

    def _reserve(self, versions: Sequence[Version]) -> tuple[dict[Version, Tensor], dict[Version, Load]] | None:
        """Reserve memory for all of these, and start loading those that aren't there; None if there is no room."""
        missing = [each for each in versions if each.loading is None and each not in self.final]
        started = self._begin(missing, {*versions})
        if started is None:
            return None
        held, loads = {}, {}
        for version in versions:
            load = started.get(version, version.loading)
            memory = None
            if load is not None:
                loads[version], memory = load, load.memory
            if memory is None:  # it may have ended already
                memory = self.final.get(version)
            if memory is not None:
                held[version] = memory
        return held, loads

    def _begin(self, versions: Sequence[Version], stay: Set[Version]) -> dict[Version, Load] | None:
        """Start loading adapters, which may have failed already; None if there is no room for all of them."""
        sizes = [version.layout.size for version in versions]
        if versions and not self.final.make_room(sizes, stay, self._let_go):
            return None
        started = {version: Load(version, *self.final.take(version.layout.size)) for version in versions}
        for version, load in started.items():
            if version.loading is None:
                self.transfers.start(load)  # its threads wait for the lock
            else:  # a signal handler has started it meanwhile
                started[version] = version.loading
        return started

    def _is_awaited(self) -> bool:
        while self._queue and self._queue[0]() is None:
            self._queue.popleft()
        return bool(self._queue)

    def _is_first(self, ticket: Ticket | None) -> bool:
        return not self._is_awaited() or self._queue[0]() is ticket or self._is_nested()

    def is_starved(self) -> bool:
        """Whether a batch on this thread has to wait behind one that waits for room. The caller holds the lock."""
        first = self._queue[0]() if self._is_awaited() else None
        return first is not None and time.monotonic() - first.since >= STARVED and not self._is_nested()

    def check_possible(self, versions: Sequence[Version]) -> None:
        """Check that the adapters of a batch fit into memory together.

        Raises:
            StoreFullError: they don't, besides those that are pinned.
        """
        arena = self.final.arena
        wanted = sum(size_class(version.layout.size) for version in versions)
        others = [each for each in self.pinned if each in self.final and each not in versions]
        pinned = sum(size_class(each.layout.size) for each in others)
        if wanted + pinned > arena.limit:
            raise StoreFullError(
                f"a batch names {len(versions)} stored adapters of {wanted} bytes together, and the store has "
                f"{arena.limit}, of which {pinned} are pinned for others: expected fewer adapters in one batch. Pass "
                f"a larger {'max_host_memory' if self.final is self.host else 'max_device_memory'} to adapter_store."
            )
