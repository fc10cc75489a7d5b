"""Run the endpoints' jobs on a core, and stream back the text that it generates."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from peft_multibatch.serve.core import Core
from peft_multibatch.serve.errors import ApiError, broken, busy, invalid, took_too_long, unavailable
from peft_multibatch.serve.jobs import Delta, Inbox, Job, Sequence
from peft_multibatch.serve.messages import Output, State, Target
from peft_multibatch.serve.process import CoreProcess


ANSWERS = 5.0
"""Seconds that a core may take to report its state."""


class Engine:
    """Runs jobs, in one event loop at a time.

    Args:
        core: a core that hasn't been started.

    Attributes:
        core: the core.
        settings: the server's limits.
        running: number of accepted answers that haven't finished, by adapter label.
        is_stopping: whether new jobs are rejected because the server is shutting down.
    """

    def __init__(self, core: Core | CoreProcess) -> None:
        self.core, self.settings = core, core.settings
        self.is_stopping = False
        self.running: Counter[str] = Counter()
        self._used: Counter[str] = Counter()  # as running, by the names of all adapters instead of labels
        self._ids = itertools.count()
        self._jobs: dict[int, Inbox] = {}
        self._places: dict[str, Inbox] = {}  # of each answer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._prepared = 0  # number of requests that aren't jobs yet
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")  # tokenizers aren't thread-safe
        core.listen(self._receive)

    def start(self) -> None:
        """Start the core; returns once it can run jobs.

        Raises:
            RuntimeError: the core could not be started.
            ValueError: the settings don't fit the model.
        """
        self.core.start()

    def stop(self) -> None:
        """Stop the core."""
        self.is_stopping = True
        self.core.stop()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.core.tokenizer

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of a prompt and its answer."""
        return self.core.max_model_len

    async def state(self) -> State | None:
        """The core's state; None if it doesn't report it in time."""
        with contextlib.suppress(TimeoutError, ApiError):
            async with asyncio.timeout(ANSWERS):
                return await self.core.state()
        return None

    async def problem(self) -> str | None:
        """Return the reason why requests can't run, or None if they can."""
        state = await self.state()
        if state is not None:
            return state.problem
        return "the model's process doesn't answer" if self.core.is_running else "the model's process has ended"

    def check(self) -> None:
        """Check that jobs are accepted.

        Raises:
            ApiError: 503 if they aren't.
        """
        if self.is_stopping:
            raise unavailable("The server is shutting down: try again later, or on another server.", "stopping")
        if not self.core.is_running:
            raise broken()

    async def tokenize(self, function: Any, *args: Any) -> Any:
        """Call a function with the tokenizer and further arguments, outside the event loop's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function, self.tokenizer, *args)

    def cancel_all(self) -> None:
        """End all jobs with an error that says that the server is shutting down."""
        error = unavailable("The server shut down before this request had finished: send it again.", "stopping")
        for inbox in list(self._jobs.values()):
            inbox.fail(error)

    async def run(self, job: Job) -> AsyncGenerator[Delta, None]:
        """Run a job and yield its output as it is generated. Closing the generator cancels the job.

        Raises:
            ApiError: the job can't run, or failed before its end.
            RuntimeError: jobs of another event loop are running.
        """
        self.check()
        loop = asyncio.get_running_loop()
        if self._jobs and loop is not self._loop:
            raise RuntimeError("jobs of another event loop are running: expected the same one. Run this job there.")
        inbox, self._loop = Inbox(), loop
        under_way: dict[str, Sequence] = {}
        number = next(self._ids)
        left = job.arrived + self.settings.request_timeout - time.perf_counter()
        timer = loop.call_later(left, inbox.fail, took_too_long(self.settings.request_timeout))
        ends = [] if job.ignore_eos else self.core.ends
        with self._place(job.target, len(job.prompts) * job.n):
            self._jobs[number] = inbox
            try:
                for sequence in job.sequences(self.tokenizer):
                    name = f"{number}-{sequence.index}"
                    order = job.order(sequence, name, self.max_model_len)
                    under_way[name], self._places[name] = sequence, inbox
                    self.core.add(order)
                while under_way:
                    for output in await inbox.take():
                        found = under_way.get(output.name)
                        if found is None:
                            continue  # it already ended at a stop string
                        if output.error is not None:
                            raise output.error
                        delta = found.take(output, ends)
                        if delta.reason is not None:
                            del under_way[output.name], self._places[output.name]
                            if not output.is_finished:
                                self.core.cancel([output.name])
                        job.count(delta, output)
                        yield delta
            finally:
                timer.cancel()
                del self._jobs[number]
                for name in under_way:
                    del self._places[name]
                self.core.cancel([*under_way])

    @contextlib.asynccontextmanager
    async def preparing(self) -> AsyncIterator[None]:
        """Count a request while it is converted to a job; the limit is that of running and waiting sequences.

        Raises:
            ApiError: 429 if there are too many, 504 if it takes too long.
        """
        limit = self.settings.request_timeout
        if self._prepared >= self.settings.max_batch + self.settings.max_queue:
            raise busy("The server has reached its limit of requests: try again later.", "queue_full")
        self._prepared += 1
        try:
            async with asyncio.timeout(limit):
                yield
        except TimeoutError:
            raise took_too_long(limit) from None
        finally:
            self._prepared -= 1

    @contextlib.contextmanager
    def _place(self, target: Target, count: int) -> Iterator[None]:
        limit, own = self.settings.max_batch + self.settings.max_queue, self.settings.max_requests_per_adapter
        most = limit if own is None else min(limit, own)
        if count > most:
            raise invalid(f"The request asks for {count} answers: expected at most {most} here. Request fewer.", "n")
        if self.running.total() + count > limit:
            raise busy("The server has reached its limit of requests: try again later.", "queue_full")
        names = target.names or (target.label,)
        full = next((name for name in names if own is not None and self._used[name] + count > own), None)
        if full is not None:
            raise busy(f"The model `{full}` has reached its limit of requests: try again later.", "adapter_busy")
        counts = [(self.running, target.label), *((self._used, name) for name in names)]
        for counter, name in counts:
            counter[name] += count
        try:
            yield
        finally:
            for counter, name in counts:
                counter[name] -= count
                if not counter[name]:
                    del counter[name]

    def _receive(self, outputs: list[Output]) -> None:
        """Take the core's outputs, in any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the event loop was closed, and its jobs with it
                self._loop.call_soon_threadsafe(self._put, outputs)

    def _put(self, outputs: list[Output]) -> None:
        for output in outputs:
            if (inbox := self._places.get(output.name)) is not None:
                inbox.put(output)
