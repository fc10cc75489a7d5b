"""Middleware for every request: request ids, authentication, size limits and the record for logs and metrics.

It is plain ASGI, because Starlette's BaseHTTPMiddleware hides disconnects from the endpoints.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

from peft_multibatch.serve.errors import ApiError
from peft_multibatch.serve.jobs import Job
from peft_multibatch.serve.settings import Settings


OPEN = ("/", "/page.css", "/page.js", "/health", "/ready")
"""Paths that need no key: health checks, and a page without data."""

ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Paths that need the admin key."""

SHARED = ("/metrics",)
"""Paths that accept either key."""

REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)

LEFT = 499
"""Status in logs and metrics of requests whose client disconnected."""


@dataclass
class Record:
    """The record of a request, for logs and metrics.

    Attributes:
        request_id: given by the client, or generated.
        method: the HTTP method.
        path: the path without the query.
        status: the HTTP status; also set by errors after the response has started.
        job: the job, if the request got that far.
        user: the ``user`` of the request.
        error: the error sent to the client.
        prompt: the prompt, only if prompts are logged.
        began: start time, by ``time.perf_counter``.
        seconds: duration.
    """

    request_id: str
    method: str
    path: str
    status: int = 0
    job: Job | None = None
    user: str | None = None
    error: ApiError | None = None
    prompt: Any = None
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0


class Gate:
    """ASGI middleware around the whole application.

    Args:
        app: the application.
        settings: keys and limits.
        on_end: called with the record of each finished request.
    """

    def __init__(self, app: Any, settings: Settings, on_end: Sequence[Callable[[Record], None]] = ()) -> None:
        self._app, self._settings, self._on_end = app, settings, on_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or reject it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        record = Record(request_id, scope["method"], scope["path"])
        scope.setdefault("state", {})["record"] = record

        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                record.status = record.status or message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            try:
                self._authorize(scope["path"], headers)
                receive = _replayed(await self._body(receive, headers), receive)
            except ApiError as error:
                record.error = error
                await respond(error)(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        finally:
            record.seconds = time.perf_counter() - record.began
            if record.error is not None:
                record.status = record.error.status
            for call in self._on_end:
                call(record)

    def _authorize(self, path: str, headers: Headers) -> None:
        settings = self._settings
        if path in OPEN:
            return
        keys: tuple[str, ...] = settings.api_keys
        if path in ADMIN:
            keys = (settings.admin_key or "",)  # an empty key never matches
        elif path in SHARED and keys and settings.admin_key:
            keys = (*keys, settings.admin_key)
        elif not keys:
            return
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        if not keys and path in SHARED:
            return
        # compares all, so that timing reveals nothing
        matches = [hmac.compare_digest(sent.encode(), key.encode()) for key in keys]
        if scheme.lower() != "bearer" or not sent or not any(matches):
            which = "the admin key" if path in ADMIN else "an API key"
            message = f"The request has no valid key: expected {which} as 'Authorization: Bearer ...'."
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, receive: Any, headers: Headers) -> bytes:
        limit = int(self._settings.max_body_mb * 1e6)
        large = ApiError(413, f"The request's body is too large: expected at most {self._settings.max_body_mb:g} MB.",
                         "body_too_large")  # fmt: skip
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise large
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(LEFT, "The client disconnected.", "client_left")
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, f"The request's body took longer than {self._settings.body_timeout:g} s to arrive.",
                           "body_timeout", headers={"Connection": "close"}) from None  # fmt: skip


def respond(error: ApiError) -> Response:
    """Convert an error to a response; JSON escapes quoted input that UTF-8 can't encode."""
    return Response(json.dumps(error.body()), error.status, error.headers, "application/json")


def _replayed(body: bytes, receive: Any) -> Any:
    """A ``receive`` that replays a body already read, followed by the client's further messages."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Any:
        return waiting.pop() if waiting else await receive()

    return replayed
