"""The process: it listens, and when it is told to stop it lets requests end, for so long."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn

from peft_multibatch.serve.app import build_app
from peft_multibatch.serve.engine import Engine
from peft_multibatch.serve.logs import log_request


AFTER_GRACE = 5
"""Seconds in which clients may read the errors of requests that had no more time."""


MAX_HEADERS = 64 * 1024
"""Bytes of a request's line and headers."""


def configuration(app: Any, grace: float, host: str, port: int) -> uvicorn.Config:
    """How uvicorn listens.

    Args:
        app: of ``build_app``.
        grace: seconds that requests have to end when the server stops.
        host: address to listen at.
        port: to listen at; 0 takes one that is free.
    """
    return uvicorn.Config(
        app, host=host, port=port, log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=int(grace) + AFTER_GRACE, timeout_keep_alive=30,
        http="h11", h11_max_incomplete_event_size=MAX_HEADERS,  # httptools, where it is installed, has no such limit
    )  # fmt: skip


class Server(uvicorn.Server):
    """uvicorn's, which tells the engine when it is about to stop.

    Args:
        engine: that was started; it is stopped at the end.
        host: address to listen at.
        port: to listen at; 0 takes one that is free.
    """

    def __init__(self, engine: Engine, host: str, port: int) -> None:
        engine.settings.check_host(host)
        self._engine = engine
        super().__init__(configuration(build_app(engine, [log_request]), engine.settings.grace, host, port))

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal came: take no more requests, and after the time of grace end those that are left."""
        engine = self._engine
        if not engine.is_stopping:
            engine.is_stopping = True
            self._loop.call_soon_threadsafe(self._loop.call_later, engine.settings.grace, engine.cancel_all)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: Any = None) -> None:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
