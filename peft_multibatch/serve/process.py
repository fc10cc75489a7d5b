"""A core in a process of its own, so that HTTP and the loop that runs the model don't share a GIL.

Messages are pickled and sent through a pipe. Each is a tuple that begins with its kind:

    from the engine     "add", order     "cancel", names     "stop"
                        "call", number, method, args     "drop", the number of a call that nobody awaits any more
    from the core       "outputs", outputs     "value" or "error", number, what a call returned or raised
    once, in the beginning     "started", what the engine must know     or "failed", kind, message
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any

from transformers.utils import logging

from peft_multibatch.serve.core import Core
from peft_multibatch.serve.errors import ApiError, broken, failed
from peft_multibatch.serve.logs import set_up
from peft_multibatch.serve.messages import Order, Output, State, Target
from peft_multibatch.serve.settings import Settings


logger = logging.get_logger(__name__)

STOPS = 5.0
"""Seconds for a core's process to end, after which it is killed; it has nothing to save."""


class CoreProcess:
    """A ``Core`` in a process of its own, with the same methods.

    Args:
        load: loads the model and its tokenizer, in that process; it is pickled.
        settings: the server's limits.
        log_format: ``"text"`` or ``"json"``, or None to leave logging as it is.

    Attributes:
        tokenizer: the model's tokenizer; like the other attributes, known once the core has started.
        ends: tokens that end a text.
        vocabulary: size of the model's vocabulary.
        max_model_len: maximum number of tokens of a prompt and its answer.
        pid: the process's id.
    """

    tokenizer: Any
    ends: list[int]
    vocabulary: int
    max_model_len: int

    def __init__(self, load: Callable[[], tuple[Any, Any]], settings: Settings, log_format: str | None = None) -> None:
        self.settings, self.is_running = settings, False
        self._listener: Callable[[list[Output]], None] = lambda _: None
        self._calls: dict[int, Future[Any]] = {}
        self._orders: set[str] = set()  # names of answers that haven't ended
        self._numbers = 0
        self._is_stopping = False
        self._lock = threading.Lock()
        self._outgoing: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
        context = multiprocessing.get_context("spawn")
        self._pipe, self._other = context.Pipe()
        args = self._other, load, settings, log_format
        self._process = context.Process(target=_run, args=args, name="peft-multibatch-core")

    def start(self) -> None:
        """Load the model; returns once the core can run requests.

        Raises:
            RuntimeError: the model could not be loaded, or the process ended.
            ValueError: the settings don't fit the model.
        """
        with _interrupts_blocked():
            self._process.start()
        self._other.close()
        Finalize(self, _kill, (self._process,), exitpriority=100)  # or exiting would wait for it
        try:
            kind, *found = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            self._process.join(STOPS)
            code = self._process.exitcode
            raise RuntimeError(
                f"the model's process ended with code {code} before the model was loaded: expected it to run. Its "
                "output has the reason."
            ) from None
        if kind == "failed":
            _kill(self._process)  # threads that it started could keep it running
            error, message = found
            raise error(message)
        self.tokenizer, self.ends, self.vocabulary, self.max_model_len = found
        self.is_running = True
        for function in (self._read, self._write):
            threading.Thread(target=function, name=f"core{function.__name__}", daemon=True).start()
        gc.collect()
        gc.freeze()  # a collection of all libraries' objects would stop every stream for half a second

    def stop(self) -> None:
        """End the process."""
        if self._process.pid is None:
            return
        gc.unfreeze()
        self._is_stopping = True
        if self.is_running:
            self._outgoing.put(("stop",))
            self._process.join(STOPS)
        _kill(self._process)

    @property
    def pid(self) -> int | None:
        """The process's id."""
        return self._process.pid

    def listen(self, listener: Callable[[list[Output]], None]) -> None:
        """Set the function that gets new outputs; see ``Core.listen``."""
        self._listener = listener

    def add(self, order: Order) -> None:
        """Start to generate an answer. If that isn't possible, the answer's output has an error."""
        with self._lock:
            self._orders.add(order.name)
            is_running = self.is_running
        if is_running:
            self._outgoing.put(("add", order))
        else:
            self._fail([order.name])

    def cancel(self, names: Iterable[str]) -> None:
        """Stop generating answers."""
        with self._lock:
            names = self._orders.intersection(names)
            self._orders -= names
        if names:
            self._outgoing.put(("cancel", names))

    async def find(self, model: str, mixture: dict[str, float] | None = None) -> Target:
        """Look up the adapters that a request names; see ``Catalog.find``."""
        return await self._call("find", model, mixture)

    async def names(self) -> list[tuple[str, int]]:
        """The names of all adapters, with the modification times of their files; see ``Catalog.names``."""
        return await self._call("names")

    async def load(self, name: str, folder: str, in_place: bool) -> None:
        """Register an adapter; see ``Catalog.load``."""
        await self._call("load", name, folder, in_place)

    async def unload(self, name: str) -> None:
        """Unregister an adapter; see ``Catalog.unload``."""
        await self._call("unload", name)

    async def grammar(self, schema: str) -> None:
        """Compile a JSON schema; see ``Core.grammar``."""
        await self._call("grammar", schema)

    async def state(self) -> State:
        """The current state."""
        return await self._call("state")

    async def _call(self, method: str, *args: Any) -> Any:
        result: Future[Any] = Future()
        with self._lock:
            if not self.is_running:
                raise broken()
            number = self._numbers = self._numbers + 1
            self._calls[number] = result
        try:
            self._outgoing.put(("call", number, method, args))
            return await asyncio.wrap_future(result)
        finally:
            if self._calls.pop(number, None) is not None:  # cancelled before there was an answer
                self._outgoing.put(("drop", number))

    def _write(self) -> None:
        """Send messages, which would block the event loop while the pipe is full."""
        while (message := self._outgoing.get()) is not None:
            try:
                self._pipe.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
            except OSError:  # the process has ended
                return

    def _read(self) -> None:
        """Take messages until the process ends."""
        while True:
            try:
                kind, *found = pickle.loads(self._pipe.recv_bytes())
            except (EOFError, OSError):
                break
            if kind == "outputs":
                with self._lock:
                    self._orders.difference_update(each.name for each in found[0] if each.is_finished)
                self._listener(found[0])
            elif (result := self._calls.pop(found[0], None)) is not None and result.set_running_or_notify_cancel():
                (result.set_result if kind == "value" else result.set_exception)(found[1])
        if not self._is_stopping:
            self._process.join(1)
            logger.error(f"the model's process ended with code {self._process.exitcode}")
        with self._lock:
            self.is_running = False
            calls, self._calls, orders = list(self._calls.values()), {}, list(self._orders)
        self._outgoing.put(None)
        for result in calls:
            if result.set_running_or_notify_cancel():
                result.set_exception(broken())
        self._fail(orders)

    def _fail(self, names: list[str]) -> None:
        with self._lock:
            self._orders.difference_update(names)
        now = time.perf_counter()
        self._listener([Output(name, [], [], True, broken(), now) for name in names])


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Keep Ctrl-C from processes that are started in the block, which would be importing libraries, until ``_run``."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    resource_tracker.ensure_running()  # which would unblock it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(process: Any) -> None:
    process.kill()
    process.join()


def _run(pipe: Connection, load: Callable[[], tuple[Any, Any]], settings: Settings, log_format: str | None) -> None:
    """Run a core until the engine stops it, or the engine's process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which the engine gets as well
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if log_format is not None:
        set_up(log_format)
    try:
        model, tokenizer = load()
        core = Core(model, tokenizer, settings)
        core.start()
        started = pickle.dumps(("started", tokenizer, core.ends, core.vocabulary, core.max_model_len))
    except Exception as error:
        is_known = isinstance(error, ValueError)
        if not is_known:
            logger.error(f"the model could not be loaded: {error!r}", exc_info=True)
        message = f"{error}" if is_known else f"the model could not be loaded: {error}"
        pipe.send_bytes(pickle.dumps(("failed", ValueError if is_known else RuntimeError, message)))
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # requests may finish after a signal to the process group
    pipe.send_bytes(started)
    asyncio.run(_Served(core, pipe).run())
    if not core.is_running:
        os._exit(1)  # the device may be unusable, and `stop` could wait for it
    core.stop()


def _end_with_parent() -> None:
    """End this process, whatever it is doing, as soon as the engine's process has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Served:
    """A core's side of the pipe."""

    def __init__(self, core: Core, pipe: Connection) -> None:
        self._core, self._pipe = core, pipe
        self._lock = threading.Lock()  # outputs come from another thread than what calls return
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._has_stopped = asyncio.Event()

    async def run(self) -> None:
        """Do what the engine asks for until it stops, or the loop that runs requests has ended."""
        self._core.listen(lambda outputs: self._send("outputs", outputs))
        threading.Thread(target=self._read, args=(asyncio.get_running_loop(),), daemon=True).start()
        while self._core.is_running and not self._has_stopped.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._has_stopped.wait()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            try:
                message = pickle.loads(self._pipe.recv_bytes())
            except (EOFError, OSError):  # the engine's process has ended, and so will this one
                return
            kind, *args = message
            if kind == "add":
                self._core.add(*args)
            elif kind == "cancel":
                self._core.cancel(*args)
            else:
                loop.call_soon_threadsafe(self._take, kind, *args)
                if kind == "stop":
                    return

    def _take(self, kind: str, *args: Any) -> None:
        if kind == "call":
            number = args[0]
            self._calls[number] = task = asyncio.create_task(self._call(*args))
            task.add_done_callback(lambda _: self._calls.pop(number))
        elif kind == "drop":
            if (found := self._calls.get(*args)) is not None:
                found.cancel()
        else:
            self._has_stopped.set()

    async def _call(self, number: int, method: str, args: tuple) -> None:
        try:
            self._send("value", number, await getattr(self._core, method)(*args))
        except ApiError as error:
            self._send("error", number, error)
        except Exception as error:
            logger.error(f"{method} failed: {error!r}", exc_info=True)
            self._send("error", number, failed())

    def _send(self, *message: Any) -> None:
        found = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with self._lock, contextlib.suppress(OSError):  # the engine's process has ended, and so will this one
            self._pipe.send_bytes(found)
