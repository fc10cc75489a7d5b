"""Rows of the tables that kernels read: a few, which adapters take while they are in use, and give back."""

from __future__ import annotations

import threading
from collections import deque


FEWEST = 16
"""Slots that a pool begins with."""


class Slots:
    """A pool of slots. It grows by doubling, and only when all of them are taken.

    Attributes:
        capacity: how many slots there are, taken or not; a power of two.
    """

    def __init__(self) -> None:
        self.capacity = FEWEST
        self._lock = threading.RLock()  # slots are given back whenever Python collects an adapter
        self._free = deque(range(FEWEST))

    def reserve(self, slots: int) -> None:
        """Have room for so many from now on, taken or not."""
        with self._lock:
            while self.capacity < slots:
                self._grow()

    def take(self) -> int:
        """A slot that nobody has. Kernels that were launched may still read its row, for which its writer waits."""
        with self._lock:
            if not self._free:
                self._grow()
            return self._free.popleft()

    def _grow(self) -> None:
        self._free.extend(range(self.capacity, 2 * self.capacity))
        self.capacity *= 2

    def give_back(self, slot: int) -> None:
        """Nobody needs the slot any more."""
        with self._lock:
            self._free.append(slot)
