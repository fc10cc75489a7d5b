"""Threads that run jobs in order. Those that hang, as on a network file system that went away, hold up no others."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress


logger = logging.getLogger(__name__)

HANGING = 10.0
"""Seconds after which a job counts as one that hangs."""


class Workers:
    """Runs a few jobs at the same time, in order.

    A thread takes the next job by itself, so a job that was handed over runs once, also if the executor can't
    start a thread for it.

    Args:
        name: the prefix of the threads' names.
        count: the number of jobs that run at the same time, besides those that hang.
        most: the most threads.
    """

    def __init__(self, name: str, count: int, most: int) -> None:
        self._count, self._most = count, most
        self._lock = threading.RLock()
        self._waiting: deque[Callable[[], object]] = deque()
        self._since: dict[object, float] = {}  # when each thread began its job
        self._threads = ThreadPoolExecutor(most, name)

    def submit(self, job: Callable[[], object]) -> None:
        """Run a function, whose errors are its own.

        Raises:
            RuntimeError: no thread runs, and none can be started; the function won't run.
        """
        with self._lock:
            try:
                self._waiting.append(job)
                self._start()
            except BaseException as error:  # such as Ctrl-C's
                if not (isinstance(error, RuntimeError) and self._since):
                    with suppress(ValueError):
                        self._waiting.remove(job)
                    raise

    def start(self) -> None:
        """Start a thread in place of one that hangs; called again and again by those who wait for a job."""
        if self._waiting and self._lock.acquire(blocking=False):  # the thread that has it will see to it
            try:
                with suppress(RuntimeError):  # no thread can be started at the moment
                    self._start()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Start nothing any more."""
        with self._lock:
            self._waiting.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        if not (self._waiting and self._has_room()):
            return
        worker = object()
        self._since[worker] = time.monotonic()
        try:
            self._threads.submit(self._run, worker)
        except BaseException:
            del self._since[worker]
            raise

    def _has_room(self) -> bool:
        now = time.monotonic()
        running = sum(now - begin < HANGING for begin in self._since.values())
        return running < self._count and len(self._since) < self._most

    def _run(self, worker: object) -> None:
        while (job := self._next(worker)) is not None:
            try:
                job()
            except Exception:
                logger.exception("a job of an adapter store failed")

    def _next(self, worker: object) -> Callable[[], object] | None:
        """The job that a thread runs next; None if it ends, because there is none or others do them."""
        with self._lock:
            # gone already if the executor couldn't start a thread and runs this later
            is_known = self._since.pop(worker, None) is not None
            if not (is_known and self._waiting and self._has_room()):
                return None
            self._since[worker] = time.monotonic()
            return self._waiting.popleft()
