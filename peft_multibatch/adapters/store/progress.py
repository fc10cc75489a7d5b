"""A progress bar for slow operations, which uses transformers' settings for progress bars."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from transformers.utils import logging


PATIENCE = 2.0
"""Seconds before the bar is shown. ``transformers.utils.logging.disable_progress_bar`` turns it off."""


class Progress:
    """Progress of an operation. Costs nothing until the bar is shown.

    Args:
        what: a short description of the operation.
        total: the number of items.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._begin, self._done = time.monotonic(), 0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int) -> None:
        """Set the number of items that are done."""
        if self._bar is None:
            if time.monotonic() - self._begin < PATIENCE:
                return
            self._bar = logging.tqdm(total=self._total, desc=self._what, unit="adapter")
        self._bar.update(done - self._done)
        self._done = done


def tracked(what: str, items: Sequence[str]) -> Iterator[str]:
    """Iterate over items, with a progress bar."""
    with Progress(what, len(items)) as progress:
        for done, item in enumerate(items):
            progress.update(done)
            yield item
        progress.update(len(items))
