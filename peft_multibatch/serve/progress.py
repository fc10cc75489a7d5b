"""Pass the tokens of running requests on to their streams, for all streams at once.

The server and the loop that runs the model share the GIL, so each chunk that is sent delays the next step. The first
token of a request is delivered at once. After it, the loop builds no outputs until the request ends: the event loop
reads the tokens itself, in rounds that are further apart the more streams there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState


PER_STREAM, LONGEST = 0.0005, 0.05
"""Seconds between two rounds, for each stream and at most. With a single stream, each token is sent at once."""


class Progress:
    """Reads the new tokens of requests that are streamed, in one event loop at a time.

    Args:
        find: returns a running request by its id, or None.
    """

    def __init__(self, find: Callable[[Any], RequestState | None]) -> None:
        self._find = find
        self._followed: dict[Any, Callable[[GenerationOutput], None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_due = False  # whether a round was requested that hasn't begun
        self._last = 0.0  # time of the last round, by the event loop's clock

    def follow(self, request_id: Any, callback: Callable[[GenerationOutput], None]) -> None:
        """Call a function with the request's output so far, again and again while it runs.

        Args:
            request_id: the request's id.
            callback: called in the thread of the running event loop; not for the request's last output.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._is_due = loop, False  # a closed loop may have left a round that never began
        self._followed[request_id] = callback

    def forget(self, request_id: Any) -> None:
        """Stop following a request, if it is followed."""
        self._followed.pop(request_id, None)

    def delivered(self, outputs: Iterable[GenerationOutput]) -> None:
        """Stop delivering the outputs of followed requests after their first; runs in the thread of the model."""
        for output in outputs:
            if output.request_id in self._followed and (state := self._find(output.request_id)) is not None:
                state.streaming = False

    def step_ended(self) -> None:
        """Request a round, if there isn't one already; runs in the thread of the model."""
        if self._is_due or not self._followed:
            return
        assert self._loop is not None
        self._is_due = True
        try:
            self._loop.call_soon_threadsafe(self._wait)
        except RuntimeError:  # the event loop was closed, so nobody reads the streams
            self._followed.clear()
            self._is_due = False

    def _wait(self) -> None:
        assert self._loop is not None
        due = self._last + min(PER_STREAM * len(self._followed), LONGEST)
        if due > self._loop.time():
            self._loop.call_at(due, self._round)
        else:
            self._round()

    def _round(self) -> None:
        assert self._loop is not None
        self._is_due, self._last = False, self._loop.time()
        for request_id, callback in list(self._followed.items()):
            state = self._find(request_id)
            if state is None or state.streaming:
                continue
            output = state.to_generation_output()
            if not output.is_finished():  # that output is delivered, with the exception behind its error
                callback(output)
