"""Everything that needs the model: adapters, schemas and continuous batching.

A core may run in the process of its engine or in one of its own (``CoreProcess``), so its methods take and return only
what can be pickled.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.utils import logging

import peft_multibatch
from peft_multibatch.compat import check_serving
from peft_multibatch.errors import MultibatchError
from peft_multibatch.serve.catalog import Catalog
from peft_multibatch.serve.errors import ApiError, broken, failed, from_adapter, unknown_model
from peft_multibatch.serve.grammars import Grammars
from peft_multibatch.serve.manager import ServingManager
from peft_multibatch.serve.messages import Order, Output, State, Target
from peft_multibatch.serve.progress import Progress
from peft_multibatch.serve.settings import Settings


logger = logging.get_logger(__name__)

STALLED = 120.0
"""Seconds without a step, while answers are expected, after which the core reports a problem."""

CPU_CACHE, CPU_STEP = 8192, 256
"""Sizes in tokens of the cache and of a step on a CPU, where transformers would use all available memory."""


class Core:
    """Generates answers.

    Args:
        model: a model in eval mode, not enabled yet.
        tokenizer: the model's tokenizer.
        settings: the server's limits.

    Attributes:
        ends: tokens that end a text.
        vocabulary: size of the model's vocabulary.
        max_model_len: maximum number of tokens of a prompt and its answer; known once the core has started.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        check_serving()
        self.tokenizer, self.settings = tokenizer, settings
        self._compiling = ThreadPoolExecutor(2, thread_name_prefix="schemas")
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
        self.vocabulary = self.manager.vocabulary
        self._grammars = Grammars(tokenizer, self.ends, self.manager.logit_processor.vocabulary)
        self.manager.output_router = self._progress = Progress(self.manager.find_running)
        self._progress.explain = self._explain
        self.max_model_len = settings.max_model_len or 0
        self._positions = getattr(config, "max_position_embeddings", None)
        self._last_step = 0, time.monotonic()

    def start(self) -> None:
        """Start the loop; returns once it can run requests.

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
        gc.unfreeze()
        if self.manager.is_running():
            self.manager.stop(hard_stop=True)
        self.manager.destroy()
        self.catalog.close()
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self._mb.disable()

    def listen(self, listener: Callable[[list[Output]], None]) -> None:
        """Set the function that gets new outputs; it is called in other threads, and must return at once."""
        self._progress.hand_on = listener

    @property
    def is_running(self) -> bool:
        """Whether answers can be generated."""
        return not self.manager.has_failed and self.manager.is_running()

    def add(self, order: Order) -> None:
        """Start to generate an answer. If that isn't possible, the answer's output has an error."""
        options = dict(order.options)
        self._progress.follow(order)
        try:
            if "grammar" in options:
                options["grammar"] = self._grammars.get(options["grammar"])
            added = self.manager.add_request(
                order.prompt,
                order.name,
                order.max_tokens,
                streaming=order.is_streamed,
                record_timestamps=not order.is_streamed,
                eos_token_id=[-1] if order.ignore_eos else self.ends or [-1],
                adapter_id=order.target.entry,
                **options,
            )
            if added is None or not self.is_running:  # the loop may have ended while the request was added
                raise broken()
        except Exception as error:
            if self._progress.forget(order.name):
                told = self._explain(error, order)
                self._progress.hand_on([Output(order.name, [], [], True, told, time.perf_counter())])

    def cancel(self, names: Iterable[str]) -> None:
        """Stop generating answers; there are no further outputs of them."""
        for name in names:
            if self._progress.forget(name):
                self.manager.cancel_request(name)

    async def find(self, model: str, mixture: dict[str, float] | None = None) -> Target:
        """Look up the adapters that a request names; see ``Catalog.find``."""
        return await self.catalog.find(model, mixture)

    async def names(self) -> list[tuple[str, int]]:
        """The names of all adapters, with the modification times of their files; see ``Catalog.names``."""
        return await self.catalog.names()

    async def load(self, name: str, folder: str, in_place: bool) -> None:
        """Register an adapter; see ``Catalog.load``."""
        await self.catalog.load(name, folder, in_place)

    async def unload(self, name: str) -> None:
        """Unregister an adapter; see ``Catalog.unload``."""
        await self.catalog.unload(name)

    async def grammar(self, schema: str) -> None:
        """Compile a JSON schema, so that orders may contain it as an option.

        Raises:
            ApiError: 400 if it can't be compiled.
        """
        await self._grammars.compile(schema, self._compiling)

    async def state(self) -> State:
        """The current state."""
        processor = self.manager.batch_processor
        active = len(processor.scheduler.active_requests) if processor is not None else 0
        return State(self._problem(), active, self.manager.prefix_hits, self.store.stats())

    def _problem(self) -> str | None:
        if not self.is_running:
            return "the loop that runs requests has ended"
        now, steps = time.monotonic(), self.manager.current_batch
        if steps != self._last_step[0] or not len(self._progress):
            self._last_step = steps, now
        if now - self._last_step[1] > STALLED:
            return f"no step has finished for {now - self._last_step[1]:.0f} s"
        return None

    def _explain(self, cause: Exception | None, order: Order) -> ApiError:
        """Convert an exception to the error that is sent to the client, and log it."""
        if isinstance(cause, ApiError):
            return cause
        target = order.target
        logger.error(f"request {order.request_id} under {target.label!r} failed: {cause!r}")
        if not self.is_running:
            return broken()
        gone = [name for name in target.names if name not in self.store]
        if gone:
            return unknown_model(gone[0])
        return from_adapter(cause, target.label) if isinstance(cause, MultibatchError) else failed()

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
