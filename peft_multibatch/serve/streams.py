"""Answer clients that may disconnect at any time, with whole answers or server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from transformers.utils import logging

from peft_multibatch.serve.errors import ApiError, failed
from peft_multibatch.serve.gate import LEFT, Record


T = TypeVar("T")

Event = str | tuple[str, dict[str, Any]]

logger = logging.get_logger(__name__)


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine, and cancel it as soon as the client disconnects.

    Raises:
        ApiError: the client disconnected.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_has_left(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(LEFT, "The client disconnected.", "client_left")
        return task.result()
    finally:
        await _end(task, watch)


async def begun(deltas: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Wait for a generator's first element, so that earlier errors still determine the response's status."""
    first = await anext(deltas)

    async def rest() -> AsyncGenerator[T, None]:
        try:
            yield first
            async for each in deltas:
                yield each
        finally:
            await deltas.aclose()

    return rest()


class EventStream(Response):
    """Server-sent events, which end when the client disconnects.

    Args:
        events: lists of events to be sent together: the data of each as JSON, or its name and data.
        source: the generator behind the events, which is closed at the end.
        record: the request's record.
        timeout: maximum duration in seconds, for clients that don't read.
        last: the data of the last event, unless that is an error.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[Sequence[Event]],
        source: AsyncGenerator[Any, None],
        record: Record,
        timeout: float,
        last: str | None = "[DONE]",
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._source, self._record, self._timeout, self._last = events, source, record, timeout, last

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the response."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        task, watch = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_has_left(receive))
        try:
            await asyncio.wait({task, watch}, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._record.error = ApiError(LEFT, "The client disconnected, or didn't read.", "client_left")
        finally:
            await _end(task, watch)
            await self._source.aclose()
        if not task.cancelled():
            task.result()

    async def _send(self, send: Any) -> None:
        try:
            async for events in self._events:
                await send(_message(*events))
        except ApiError as error:
            self._record.error = error
            await send(_message(json.dumps(error.body()), is_last=True))
        except Exception as error:
            logger.error(f"request {self._record.request_id} failed: {error!r}", exc_info=True)
            self._record.error = failed()
            await send(_message(json.dumps(self._record.error.body()), is_last=True))
        else:
            await send(_message(*([] if self._last is None else [self._last]), is_last=True))


def _message(*events: Event, is_last: bool = False) -> dict[str, Any]:
    """Encode events as one part of a response's body, because each write costs a system call."""
    lines = []
    for event in events:
        if isinstance(event, tuple):
            name, data = event
            lines.append(f"event: {name}\ndata: {json.dumps(data)}\n\n")
        else:
            lines.append(f"data: {event}\n\n")
    return {"type": "http.response.body", "body": "".join(lines).encode(), "more_body": not is_last}


async def _has_left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
