"""What compiled code reads about the active calls of its own thread."""

from __future__ import annotations

import asyncio
import itertools
import threading
from weakref import WeakKeyDictionary


_task_numbers: WeakKeyDictionary[asyncio.Task, int] = WeakKeyDictionary()
_new_number = itertools.count(1)


class ThreadState:
    """The active calls of a thread, in all of its tasks.

    Attributes:
        active: whether there are any.
        samples: the number of entries of their plans; 0 if they differ, and inside ``generate``, which expands rows.
        has_disabled: whether adapters of any layer are disabled there.
        name: the thread's name, for messages.
    """

    def __init__(self) -> None:
        self.active = False
        self.samples = 0
        self.has_disabled = False
        self.name = threading.current_thread().name


class PerThread(threading.local):
    """The state of the current thread, also in compiled code."""

    def __init__(self) -> None:
        self.thread = ThreadState()


def current_task() -> int:
    """A number of the running asyncio task, which no other task gets after it; 0 if there is none."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return 0
    return _task_numbers.setdefault(task, next(_new_number)) if task is not None else 0
