"""What every request passes before an endpoint sees it: its id, who may come in, how large it may be; and its record.

Plain ASGI: Starlette's BaseHTTPMiddleware would hide from endpoints that a client has left.
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
"""Paths for which nobody needs a key: what load balancers ask, and a page without data."""

ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Paths for which the API's key isn't enough."""

SHARED = ("/metrics",)
"""Paths that either key opens."""

REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)

LEFT = 499
"""Status, in logs and metrics, of requests whose client didn't wait for the end."""


@dataclass
class Record:
    """What is known of a request when it has ended, for logs and metrics.

    Attributes:
        request_id: which the client gave, or was made up.
        method: of HTTP.
        path: without the query.
        status: of HTTP; what went wrong later than that counts as well.
        job: what it asked the engine for, if it got that far.
        user: whom the client says it asks for.
        error: what the client was told.
        prompt: what was asked, only where prompts are logged.
        began: by ``time.perf_counter``.
        seconds: how long it took.
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
    """ASGI middleware around everything.

    Args:
        app: what is behind it.
        settings: keys and limits.
        on_end: called with each request's record when it has ended.
    """

    def __init__(self, app: Any, settings: Settings, on_end: Sequence[Callable[[Record], None]] = ()) -> None:
        self._app, self._settings, self._on_end = app, settings, on_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let a request in, or answer it here."""
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
            keys = (settings.admin_key or "",)  # an empty one is nobody's
        elif path in SHARED and keys and settings.admin_key:
            keys = (*keys, settings.admin_key)
        elif not keys:
            return
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        if not keys and path in SHARED:
            return
        matches = [hmac.compare_digest(sent.encode(), key.encode()) for key in keys]  # all of them, whichever it is
        if scheme.lower() != "bearer" or not sent or not any(matches):
            which = "the admin key" if path in ADMIN else "an API key"
            message = f"The request has no key that is known: expected {which} as 'Authorization: Bearer ...'."
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, receive: Any, headers: Headers) -> bytes:
        limit = int(self._settings.max_body_mb * 1e6)
        large = ApiError(413, f"The request's body is too large: expected {self._settings.max_body_mb:g} MB at most.",
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
                        raise ApiError(LEFT, "The client left.", "client_left")
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, f"The request's body took longer than {self._settings.body_timeout:g} s.",
                           "body_timeout", headers={"Connection": "close"}) from None  # fmt: skip


def respond(error: ApiError) -> Response:
    """An error as a response; what clients wrote may be no text that UTF-8 has."""
    return Response(json.dumps(error.body()), error.status, error.headers, "application/json")


def _replayed(body: bytes, receive: Any) -> Any:
    """What gives a body that was read already, and afterwards what else there is to hear from the client."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Any:
        return waiting.pop() if waiting else await receive()

    return replayed
