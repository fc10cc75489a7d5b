"""The threads that read files. Those that hang, as on a network file system that went away, hold up no others."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


READERS = 4
"""The number of files that are read at the same time, besides those that hang."""

HANGING = 10.0
"""Seconds after which a read counts as one that hangs."""

MOST = 64
"""The most threads."""


class Readers:
    """Runs a few reads at the same time, in order."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: deque[Callable[[], object]] = deque()
        self._since: dict[Callable[[], object], float] = {}  # when the running reads began
        self._threads = ThreadPoolExecutor(MOST, "peft_multibatch_store")

    def submit(self, read: Callable[[], object]) -> None:
        """Run a function that reads a file, and whose errors are its own."""
        with self._lock:
            self._waiting.append(read)
            self._start()

    def start(self) -> None:
        """Start the reads for which it is time; called again and again by those who wait for one."""
        if self._waiting and self._lock.acquire(blocking=False):  # the thread that has it starts them
            try:
                self._start()
            finally:
                self._lock.release()

    def _start(self) -> None:
        while self._waiting and len(self._since) < MOST:
            now = time.monotonic()
            if sum(now - begin < HANGING for begin in self._since.values()) >= READERS:
                break
            read = self._waiting.popleft()
            self._since[read] = now
            self._threads.submit(self._run, read)

    def close(self) -> None:
        """Start nothing any more."""
        with self._lock:
            self._waiting.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, read: Callable[[], object]) -> None:
        try:
            read()
        finally:
            with self._lock:
                del self._since[read]
                self._start()
