"""What compiled code asks about the calls in force on its own thread."""

from __future__ import annotations

import asyncio
import threading


class InForce:
    """What compiled code asks about the calls in force on its thread, on all tasks of it.

    Attributes:
        active: whether there are any.
        samples: entries of their plans; 0 where these differ, and inside ``generate``, which multiplies rows.
    """

    def __init__(self) -> None:
        self.active = False
        self.samples = 0


class Here(threading.local):
    """Gives every thread, compiled code included, what is in force on that thread."""

    def __init__(self) -> None:
        self.thread = InForce()


def current_task() -> int:
    """Which asyncio task runs; 0 where none does."""
    try:
        return id(asyncio.current_task())
    except RuntimeError:
        return 0
