"""The line of those that wait for room in a store's memory: batches, and managers of continuous batching."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable


STARVED = 1.0
"""Seconds after which the first one in line makes all others wait, also those whose adapters are in memory."""

LAPSED = 5.0
"""Seconds after which a manager that takes no steps, such as a paused one, loses its place."""


class Place:
    """A place in line, as long as it is referenced and, if it lapses, renewed.

    Attributes:
        since: when the wait began.

    Args:
        lapses: whether it has to be renewed.
    """

    def __init__(self, lapses: bool) -> None:
        self.since = self._renewed = time.monotonic()
        self._lapses = lapses

    def renew(self) -> None:
        """Keep the place."""
        self._renewed = time.monotonic()

    def has_lapsed(self) -> bool:
        """Whether the place was lost, because it wasn't renewed."""
        return self._lapses and time.monotonic() - self._renewed > LAPSED


class Line:
    """Those that wait for room, in the order in which they came. The store's lock guards it.

    Args:
        is_nested: whether a batch would begin inside another one, which may hold what those that wait are waiting for.
    """

    def __init__(self, is_nested: Callable[[], bool]) -> None:
        self._places: deque[weakref.ref[Place]] = deque()
        self._is_nested = is_nested

    def join(self, lapses: bool = False) -> Place:
        """A place at the end, as long as the caller references it."""
        place = Place(lapses)
        self._places.append(weakref.ref(place))
        return place

    def first(self) -> Place | None:
        """The first place, or None if nobody waits."""
        while self._places:
            place = self._places[0]()
            if place is not None and not place.has_lapsed():
                return place
            self._places.popleft()
        return None

    def has_turn(self, place: Place | None) -> bool:
        """Whether nobody waits before a place, or the caller must not wait."""
        first = self.first()
        return first is None or first is place or self._is_nested()

    def is_starved(self, place: Place | None = None) -> bool:
        """Whether the first one has waited for so long that the holder of a place has to wait behind it."""
        first = self.first()
        if first is None or first is place or time.monotonic() - first.since < STARVED:
            return False
        return not self._is_nested()
