"""Adapters that are in one kind of memory: which were used last, and who has to go when there is no room."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor

from peft_multibatch.adapters.store.arena import Arena
from peft_multibatch.adapters.store.version import Version


class Tier:
    """Adapters in memory, the one that was used last at the end. Not safe for threads: whoever calls holds a lock.

    Attributes:
        arena: the memory.
        evictions: adapters that had to go so far.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.evictions = 0
        self._kept: OrderedDict[Version, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, version: Version) -> bool:
        return version in self._kept

    def touch(self, version: Version) -> bool:
        """Whether an adapter is here; it counts as used now."""
        if version in self._kept:
            self._kept.move_to_end(version)
            return True
        return False

    def get(self, version: Version) -> Tensor | None:
        """An adapter's weights; None where they aren't here."""
        return self._kept.get(version)

    def get_all(self, versions: Iterable[Version]) -> dict[Version, Tensor]:
        """Weights of adapters that are all here."""
        return {version: self._kept[version] for version in versions}

    def pinned(self) -> list[Version]:
        """Adapters that don't go."""
        return [version for version in self._kept if version.is_pinned]

    def put(self, version: Version, memory: Tensor) -> None:
        """An adapter's weights are here."""
        self._kept[version] = memory
        self._kept.move_to_end(version)

    def drop(self, version: Version) -> None:
        """Nobody will ask for an adapter any more."""
        self._kept.pop(version, None)

    def take(self, size: int) -> tuple[Tensor, Any]:
        """As ``Arena.take``."""
        return self.arena.take(size)

    def make_room(self, sizes: Collection[int], stay: Collection[Version], let_go: Callable[[], None]) -> bool:
        """Let adapters go, those that weren't used for longest first, until there is room for all of these sizes.

        Args:
            sizes: bytes that are wanted.
            stay: adapters that don't go; nor do those that are pinned or in use.
            let_go: drops what is kept of calls that have ended, where they hold what has to go. The next call makes
                it anew, which costs more than a decode step does.

        Returns:
            Whether there is room now.
        """
        if self._drop_unused(sizes, stay):
            return True
        let_go()
        return self._drop_unused(sizes, stay)

    def _drop_unused(self, sizes: Collection[int], stay: Collection[Version]) -> bool:
        for version in list(self._kept):
            if self.arena.fits(sizes):
                return True
            if version.is_pinned or version in stay:
                continue
            memory = weakref.ref(self._kept[version])
            del self._kept[version]
            kept = memory()
            if kept is not None:  # a call reads it
                self._kept[version] = kept
            else:
                self.evictions += 1
        return self.arena.fits(sizes)
