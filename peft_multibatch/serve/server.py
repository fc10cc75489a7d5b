"""Run uvicorn, and let requests finish for a grace period on shutdown."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn

from peft_multibatch.serve.app import build_app
from peft_multibatch.serve.connections import Connection
from peft_multibatch.serve.engine import Engine
from peft_multibatch.serve.logs import log_request


AFTER_GRACE = 5
"""Seconds for clients to read the errors of requests that were cut off after the grace period."""


def configuration(app: Any, grace: float, host: str, port: int) -> uvicorn.Config:
    """Build uvicorn's configuration.

    Args:
        app: the application from ``build_app``.
        grace: seconds for requests to finish on shutdown.
        host: address to listen on.
        port: port to listen on; 0 picks a free one.
    """
    return uvicorn.Config(
        app, host=host, port=port, log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=int(grace) + AFTER_GRACE, timeout_keep_alive=30,
        http=Connection,
    )  # fmt: skip


class Server(uvicorn.Server):
    """uvicorn's server, which tells the engine when it is shutting down, and shuts down when its core has ended.

    Args:
        engine: a started engine; it is stopped on shutdown.
        host: address to listen on.
        port: port to listen on; 0 picks a free one.

    Attributes:
        has_failed: whether it shut down because the core has ended.
    """

    def __init__(self, engine: Engine, host: str, port: int) -> None:
        engine.settings.check_host(host)
        self._engine, self.has_failed = engine, False
        super().__init__(configuration(build_app(engine, [log_request]), engine.settings.grace, host, port))

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Handle a signal: accept no more requests, and cancel those left after the grace period."""
        engine = self._engine
        if not engine.is_stopping:
            engine.is_stopping = True
            self._loop.call_soon_threadsafe(self._loop.call_later, engine.settings.grace, engine.cancel_all)
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Return whether to shut down: also when no request can run any more, so that a supervisor starts it again."""
        if not self._engine.is_stopping and not self._engine.core.is_running:
            self._engine.is_stopping = self.has_failed = self.should_exit = True
        return await super().on_tick(counter)

    async def startup(self, sockets: Any = None) -> None:
        """Start listening."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
