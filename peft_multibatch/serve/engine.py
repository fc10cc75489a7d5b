"""Run the endpoints' jobs with continuous batching and stream back the text that they generate."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.utils import logging

import peft_multibatch
from peft_multibatch.compat import check_serving
from peft_multibatch.errors import MultibatchError
from peft_multibatch.serve.catalog import Catalog
from peft_multibatch.serve.errors import (
    ApiError,
    busy,
    failed,
    from_adapter,
    took_too_long,
    unavailable,
    unknown_model,
)
from peft_multibatch.serve.grammars import Grammar, Grammars
from peft_multibatch.serve.jobs import Delta, Inbox, Job, Sequence
from peft_multibatch.serve.manager import ServingManager
from peft_multibatch.serve.settings import Settings


logger = logging.get_logger(__name__)

STALLED = 120.0
"""Seconds without a step, while requests are waiting, after which the server reports itself as unhealthy."""

CPU_CACHE, CPU_STEP = 8192, 256
"""Sizes in tokens of the cache and of a step on a CPU, where transformers would use all available memory."""


class Engine:
    """Runs jobs.

    Args:
        model: a model in eval mode, not enabled yet.
        tokenizer: the model's tokenizer.
        settings: the server's limits.

    Attributes:
        max_model_len: maximum number of tokens of a prompt and its answer.
        running: number of accepted sequences that haven't finished, by adapter label.
        is_stopping: whether new jobs are rejected because the server is shutting down.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        check_serving()
        self.tokenizer, self.settings = tokenizer, settings
        self.is_stopping = False
        self.running: Counter[str] = Counter()
        self._ids = itertools.count()
        self._jobs: dict[int, Inbox] = {}
        self._prepared = 0  # number of requests that aren't jobs yet
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")  # tokenizers aren't thread-safe
        self._compiling = ThreadPoolExecutor(2, thread_name_prefix="grammars")
        self._mb = peft_multibatch.enable(model)
        roots = [each for each in (settings.adapters_dir, *settings.adapters.values()) if each is not None]
        self.store = self._mb.adapter_store(
            max_host_memory=settings.adapter_memory,
            max_device_memory=settings.adapter_memory,
            max_rank=settings.max_rank,
            slots=max(64, settings.max_batch),
            roots=roots or None,
        )
        self.catalog = Catalog(self.store, settings, self._log_refused)
        config, own = model.config.get_text_config(), model.generation_config
        ends = own.eos_token_id if own.eos_token_id is not None else config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = sorted({each for each in (*ends, tokenizer.eos_token_id) if each is not None})
        self.manager = ServingManager(
            self._mb,
            mixtures=settings.max_mixture,
            generation_config=GenerationConfig(do_sample=False, eos_token_id=self.ends or -1),
            continuous_batching_config=_batching(settings, model.device),
        )
        self.grammars = Grammars(tokenizer, self.ends, self.manager.logit_processor.vocabulary)
        self.max_model_len = settings.max_model_len or 0
        self._positions = getattr(config, "max_position_embeddings", None)
        self._progress = 0, time.monotonic()

    def start(self) -> None:
        """Start the loop; returns once it can run jobs.

        Raises:
            RuntimeError: the loop ended before it started to run requests.
            ValueError: requests of ``--max-model-len`` tokens don't fit.
        """
        self.manager.warmup()
        self.manager.start()
        while self.manager.batch_processor is None:
            if not self.manager.is_running():
                raise RuntimeError("continuous batching did not start: expected a running loop. See the log.")
            time.sleep(0.01)
        longest = min(self.manager.longest, self._positions or self.manager.longest)
        if self.max_model_len > longest:
            self.stop()
            raise ValueError(
                f"--max-model-len is {self.max_model_len}, but the model and its cache have room for {longest} "
                "tokens: expected no more. Raise --max-cache-tokens, or leave out --max-model-len."
            )
        self.max_model_len = self.max_model_len or longest
        gc.collect()
        gc.freeze()  # a collection of the million objects of model and libraries would take half a second

    def stop(self) -> None:
        """Stop the loop and restore the model."""
        self.is_stopping = True
        gc.unfreeze()
        if self.manager.is_running():
            self.manager.stop(hard_stop=True)
        self.manager.destroy()
        self.catalog.close()
        for each in (self._tokenizing, self._compiling):
            each.shutdown(wait=False, cancel_futures=True)
        self._mb.disable()

    def problem(self) -> str | None:
        """Return the reason why requests can't run, or None if they can."""
        status = self.manager.background_thread_status
        if status.fatal_error is not None or not self.manager.is_running():
            return "the loop that runs requests has ended"
        now, steps = time.monotonic(), self.manager.current_batch
        if steps != self._progress[0] or not self.running:
            self._progress = steps, now
        if now - self._progress[1] > STALLED:
            return f"no step has finished for {now - self._progress[1]:.0f} s"
        return None

    def check(self) -> None:
        """Check that jobs are accepted.

        Raises:
            ApiError: 503 if they aren't.
        """
        if self.is_stopping:
            raise unavailable("The server is shutting down: try again later, or on another server.", "stopping")
        if self.manager.background_thread_status.fatal_error is not None or not self.manager.is_running():
            raise unavailable("The server can't run requests: its operator should check the log.", "broken")

    async def tokenize(self, function: Any, *args: Any) -> Any:
        """Run a function that needs the tokenizer outside the event loop's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function, *args)

    async def grammar(self, schema: dict[str, Any]) -> Grammar:
        """Compile a JSON schema outside the event loop's thread.

        Raises:
            ApiError: 400 if it can't be compiled.
        """
        return await self.grammars.compile(schema, self._compiling)

    def cancel_all(self) -> None:
        """End all jobs with an error that says that the server is shutting down."""
        error = unavailable("The server shut down before this request had finished: send it again.", "stopping")
        for inbox in list(self._jobs.values()):
            inbox.fail(error)

    async def run(self, job: Job) -> AsyncGenerator[Delta, None]:
        """Run a job and yield its output as it is generated. Closing the generator cancels the job.

        Raises:
            ApiError: the job can't run, or failed before its end.
        """
        self.check()
        inbox = Inbox()
        under_way: dict[str, Sequence] = {}
        progress = self.manager.output_router.progress
        number = next(self._ids)
        left = job.arrived + self.settings.request_timeout - time.perf_counter()
        timer = asyncio.get_running_loop().call_later(left, inbox.fail, took_too_long(self.settings.request_timeout))
        with self._place(job.target.label, len(job.prompts) * job.n):
            self._jobs[number] = inbox
            try:
                for sequence in job.sequences(self.tokenizer):
                    name = f"{number}-{sequence.index}"
                    self._add(name, job, sequence, inbox)
                    under_way[name] = sequence
                while under_way:
                    for output, cause in await inbox.take():
                        found = under_way.get(output.request_id)
                        if found is None:
                            continue  # it already ended at a stop string
                        if output.error is not None:
                            raise self._as_api_error(cause, job)
                        delta = found.take(output, [] if job.ignore_eos else self.ends)
                        if delta.reason is not None:
                            del under_way[output.request_id]
                            progress.forget(output.request_id)
                            if not output.is_finished():
                                self.manager.cancel_request(output.request_id)
                        job.count(delta, output)
                        yield delta
            finally:
                timer.cancel()
                del self._jobs[number]
                for name in under_way:
                    progress.forget(name)
                    self.manager.cancel_request(name)

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Count a request while it is converted to a job; the limit is that of running and waiting sequences.

        Raises:
            ApiError: 429 if there are too many.
        """
        if self._prepared >= self.settings.max_batch + self.settings.max_queue:
            raise busy("The server has reached its limit of requests: try again later.", "queue_full")
        self._prepared += 1
        try:
            yield
        finally:
            self._prepared -= 1

    @contextmanager
    def _place(self, label: str, count: int) -> Iterator[None]:
        limit, own = self.settings.max_batch + self.settings.max_queue, self.settings.max_requests_per_adapter
        if self.running.total() + count > limit:
            raise busy("The server has reached its limit of requests: try again later.", "queue_full")
        if own is not None and self.running[label] + count > own:
            raise busy(f"The model `{label}` has reached its limit of requests: try again later.", "adapter_busy")
        self.running[label] += count
        try:
            yield
        finally:
            self.running[label] -= count
            if not self.running[label]:
                del self.running[label]

    def _add(self, name: str, job: Job, sequence: Sequence, inbox: Inbox) -> None:
        causes, progress = self.manager.output_router.causes, self.manager.output_router.progress

        def hand_on(output: Any) -> None:
            inbox.put(output, causes.pop(output.request_id, None))

        if job.is_streamed and not job.stops:  # a stop string should end its request at once
            progress.follow(name, hand_on)
        added = self.manager.add_request(
            sequence.prompt,
            name,
            job.max_tokens_of(sequence.prompt, self.max_model_len),
            streaming=job.is_streamed or bool(job.stops),
            record_timestamps=not job.is_streamed,
            eos_token_id=[-1] if job.ignore_eos else self.ends or [-1],
            adapter_id=job.target.entry,
            **sequence.options,
        )
        if added is None:
            progress.forget(name)
            raise unavailable("The server can't run requests: its operator should check the log.", "broken")
        self.manager.register_result_handler(name, hand_on)

    def _as_api_error(self, cause: Exception | None, job: Job) -> ApiError:
        if isinstance(cause, ApiError):
            return cause
        logger.error(f"request {job.request_id} under {job.target.label!r} failed: {cause!r}")
        if self.manager.background_thread_status.fatal_error is not None:
            return unavailable("The server can't run requests: its operator should check the log.", "broken")
        gone = [name for name in job.target.names if name not in self.store]
        if gone:
            return unknown_model(gone[0])
        return from_adapter(cause, job.target.label) if isinstance(cause, MultibatchError) else failed()

    def _log_refused(self, name: str, error: Exception) -> None:
        logger.warning(f"adapter {name!r} was refused: {error}")


def _batching(settings: Settings, device: torch.device) -> ContinuousBatchingConfig:
    options: dict[str, Any] = {"max_requests_per_batch": settings.max_batch}
    cache, step = settings.max_cache_tokens, settings.max_batch_tokens
    if device.type == "cpu":
        cache, step = cache or CPU_CACHE, step or CPU_STEP
        options |= {"page_size": 32, "use_cuda_graph": False}
    else:
        options["max_memory_percent"] = 0.8  # transformers' default for sampling
    if cache is not None:
        options["num_blocks"] = -(-cache // options.get("page_size", 256))
    if step is not None:
        options["max_batch_tokens"] = max(step, settings.max_batch)
    return ContinuousBatchingConfig(**options)
