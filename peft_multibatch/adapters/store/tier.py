"""Adapters in host or device memory, with eviction of the least recently used."""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Set
from contextlib import suppress
from typing import Any

from torch import Tensor

from peft_multibatch.adapters.store.arena import Arena, size_class
from peft_multibatch.adapters.store.version import Version


class Tier:
    """Adapters in memory, in order of their last use. Not thread-safe: callers hold a lock.

    Attributes:
        arena: the memory.
        evictions: the number of evictions so far.
        used: adapters whose use was recorded without the lock, in order; see ``touch``.

    Args:
        arena: the memory.
        keeps_pinned: whether pinned adapters stay; they needn't where they are only on their way to a device.
    """

    def __init__(self, arena: Arena, keeps_pinned: bool = True) -> None:
        self.arena, self._keeps_pinned = arena, keeps_pinned
        self.evictions = 0
        self.used: deque[Version] = deque()
        self._kept: OrderedDict[Version, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, version: Version) -> bool:
        return version in self._kept

    def versions(self) -> list[Version]:
        """The adapters in memory. Needs no lock."""
        while True:
            with suppress(RuntimeError):  # others were added or dropped meanwhile
                return list(self._kept)

    def touch(self, version: Version) -> bool:
        """Mark an adapter as used; returns whether it is in memory."""
        self._touch_used()
        return self._move_to_end(version)

    def _touch_used(self) -> None:
        while self.used:
            self._move_to_end(self.used.popleft())

    def _move_to_end(self, version: Version) -> bool:
        if version in self._kept:
            self._kept.move_to_end(version)
            return True
        return False

    def get(self, version: Version) -> Tensor | None:
        """An adapter's weights, which are used then; None if they aren't in memory."""
        return self._kept[version] if self.touch(version) else None

    def get_all(self, versions: Iterable[Version]) -> dict[Version, Tensor]:
        """The weights of adapters, all of which must be in memory."""
        return {version: self._kept[version] for version in versions}

    def put(self, version: Version, memory: Tensor) -> None:
        """Add an adapter's weights."""
        self._kept[version] = memory
        self._kept.move_to_end(version)

    def drop(self, version: Version) -> None:
        """Remove an adapter that was unregistered or replaced."""
        self._kept.pop(version, None)

    def take(self, size: int) -> tuple[Tensor, Any]:
        """As ``Arena.take``."""
        return self.arena.take(size)

    def make_room(self, sizes: Collection[int], stay: Set[Version], let_go: Callable[[], None]) -> bool:
        """Evict adapters, least recently used first, until there is room for all of these sizes.

        Args:
            sizes: the requested sizes in bytes.
            stay: adapters that must not be evicted. Those in use, and pinned ones, aren't evicted either.
            let_go: called if there isn't enough room, to drop plans of calls that have ended, which may reference
                adapters. The next call makes its plan again, which takes longer than a decode step.

        Returns:
            Whether there is room now.
        """
        if self._drop_unused(sizes, stay):
            return True
        let_go()
        return self._drop_unused(sizes, stay)

    def _is_used(self, version: Version) -> bool:
        """Whether a call, a plan or a request has it, and so its memory."""
        adapter = version.adapter() if version.adapter is not None else None
        return adapter is not None and adapter.memory is self._kept[version]

    def _drop_unused(self, sizes: Collection[int], stay: Set[Version]) -> bool:
        self._touch_used()
        stay = {*stay}
        while (missing := self.arena.missing(sizes)) > 0:
            found = self._evictable(missing, stay)
            if not found:
                return False
            for version in found:
                memory = weakref.ref(self._kept.pop(version))
                kept = memory()
                if kept is None:
                    self.evictions += 1
                else:  # a call reads it
                    self._kept[version] = kept
                    stay.add(version)
        return True

    def _evictable(self, missing: int, stay: Set[Version]) -> list[Version]:
        """The least recently used adapters that have this many bytes together; none if all of them have less."""
        found, used = [], []
        for version in self._kept:
            if missing <= 0:
                break
            if self._is_used(version):
                used.append(version)
            elif version not in stay and not (version.is_pinned and self._keeps_pinned):
                found.append(version)
                missing -= size_class(version.layout.size)
        for version in used:
            self._move_to_end(version)
        return found if missing <= 0 else []
