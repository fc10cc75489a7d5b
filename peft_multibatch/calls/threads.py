"""What compiled code asks about the calls that are active on its own thread."""

from __future__ import annotations

import asyncio
import threading


class ThreadState:
    """What compiled code asks about the active calls of its thread, on all tasks of it.

    Attributes:
        active: whether there are any.
        samples: entries of their plans; 0 where these differ, and inside ``generate``, which multiplies rows.
        name: the thread's name, for messages.
    """

    def __init__(self) -> None:
        self.active = False
        self.samples = 0
        self.name = threading.current_thread().name


class PerThread(threading.local):
    """Gives every thread, compiled code included, the state of that thread."""

    def __init__(self) -> None:
        self.thread = ThreadState()


def current_task() -> int:
    """Which asyncio task runs; 0 where none does."""
    try:
        return id(asyncio.current_task())
    except RuntimeError:
        return 0
