"""Rows of the tables that kernels read: a few, which adapters take while they are in use, and give back."""

from __future__ import annotations

import threading
from collections import deque

import torch


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
        self._given_back: deque[int] = deque()  # whose rows kernels that were launched may still read

    def reserve(self, slots: int) -> None:
        """Have room for so many from now on, taken or not."""
        with self._lock:
            while self.capacity < slots:
                self._grow()

    def take(self) -> int:
        """A slot that nobody has, and that no running kernel reads."""
        with self._lock:
            if not self._free and self._given_back and _wait_for_kernels():
                self._free, self._given_back = self._given_back, deque()
            if not self._free:
                self._grow()
            return self._free.popleft()

    def _grow(self) -> None:
        self._free.extend(range(self.capacity, 2 * self.capacity))
        self.capacity *= 2

    def give_back(self, slot: int) -> None:
        """Nobody needs the slot any more."""
        with self._lock:
            self._given_back.append(slot)


def _wait_for_kernels() -> bool:
    """Wait until all kernels that were launched so far have ended; False where waiting isn't possible."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        if torch.cuda.is_current_stream_capturing():
            return False
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
    return True
