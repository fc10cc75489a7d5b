"""A pool of slots: rows in the tables that kernels read, which adapters occupy while they are in use."""

from __future__ import annotations

import threading
from collections import deque


FEWEST = 16
"""The initial number of slots."""


class Slots:
    """A pool of slots, which doubles when all are taken.

    Attributes:
        capacity: the number of slots, taken or not; a power of two.
    """

    def __init__(self) -> None:
        self.capacity = FEWEST
        self._lock = threading.RLock()  # reentrant, because the garbage collector may give slots back at any time
        self._free = deque(range(FEWEST))

    def reserve(self, slots: int) -> None:
        """Grow to at least this many slots."""
        with self._lock:
            while self.capacity < slots:
                self._grow()

    def take(self) -> int:
        """Take a free slot. Running kernels may still read its row; writes to the row wait for them."""
        with self._lock:
            if not self._free:
                self._grow()
            return self._free.popleft()

    def _grow(self) -> None:
        self._free.extend(range(self.capacity, 2 * self.capacity))
        self.capacity *= 2

    def give_back(self, slot: int) -> None:
        """Return a slot to the pool."""
        with self._lock:
            self._free.append(slot)
