"""The server's continuous batching manager, with sampling options per request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import RequestState

from peft_multibatch.continuous.admission import vocabulary_of
from peft_multibatch.continuous.manager import AdapterBatchingManager
from peft_multibatch.serve.sampling import Sampling


MAX_LOGPROBS = 20
"""OpenAI's limit for the top tokens per position."""


class SamplingManager(ContinuousBatchingManager):
    """transformers' manager with sampling options per request; see ``Sampling``."""

    logit_processor: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logit_processor = Sampling(logits_of(self.model), MAX_LOGPROBS)

    def _create_batch_processor(self) -> Any:
        is_new = self.batch_processor is None
        processor = super()._create_batch_processor()
        if is_new:
            runner, io, sampling = processor.model_runner, processor.inputs_and_outputs, self.logit_processor
            sampling.is_static = runner.pad_inputs
            most = self.continuous_batching_config.max_requests_per_batch
            for each in (sampling.penalties, sampling.masks):
                each.allocate(most, self.model.device, io.compute_stream)
            pairs = getattr(io, "io_pairs", ())
            for each in [part for pair in pairs for part in (pair.host_io, pair.device_io)] or [io]:
                old = each.output_ids
                shape = len(old) + sampling.logprobs.rows, old.shape[1]
                each.output_ids = torch.zeros(shape, dtype=old.dtype, device=old.device, pin_memory=old.is_pinned())
                each._get_graph_key = _with_kind(each._get_graph_key, sampling)
            runner._sample = sampling.logprobs.wrap_sample(runner._sample)
            io.prepare_batch_update = sampling.logprobs.wrap_update(io, io.prepare_batch_update)
        return processor


class ServingManager(AdapterBatchingManager, SamplingManager):
    """A manager with an adapter and sampling options per request.

    ``add_request`` also accepts ``temperature``, ``top_k``, ``top_p``, ``seed``, ``presence_penalty``,
    ``frequency_penalty``, ``logprobs`` and ``grammar``. Requests without a seed and a temperature are greedy.

    Attributes:
        has_failed: whether an error ended the loop.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.current_batch = 0  # transformers sets it only when the loop starts
        self.has_failed = False

    def _handle_critical_error(self, *args: Any) -> None:
        self.has_failed = True  # before the errors of its requests are handed on
        super()._handle_critical_error(*args)

    def _create_batch_processor(self) -> Any:
        is_new = self.batch_processor is None
        processor = super()._create_batch_processor()
        if is_new:
            self._steps.holds = self.logit_processor.masks.holds
            processor.update_batch = self._with_progress(processor.update_batch)
        return processor

    def _with_progress(self, update: Callable[[], None]) -> Callable[[], None]:
        """Wrap the reading of a step's tokens to tell the output router when it has ended."""

        def update_with_progress() -> None:
            update()
            self.output_router.step_ended()

        return update_with_progress

    def find_running(self, request_id: Any) -> RequestState | None:
        """Return a running request by its id, or None."""
        processor = self.batch_processor
        return None if processor is None else processor.scheduler.active_requests.get(request_id)

    def _fail_hopeless(self) -> None:
        masks = self.logit_processor.masks
        failed, masks.failed = masks.failed, []
        for state, error in failed:
            if self._leaving.find(state.request_id) is state:
                self._leaving.fail(state, error)
        super()._fail_hopeless()

    @property
    def vocabulary(self) -> int:
        """Size of the model's vocabulary."""
        return vocabulary_of(self.model)

    @property
    def longest(self) -> int:
        """Length in tokens of the longest request that fits into the cache."""
        return self._admission._longest


def _with_kind(key: Callable[[], tuple], sampling: Sampling) -> Callable[[], tuple]:
    """Extend the key of captured graphs by the kind of sampling."""
    return lambda: (*key(), *sampling.kind)


def logits_of(model: Any) -> int:
    """Return the number of logits that a model returns."""
    head = model.get_output_embeddings()
    return head.weight.shape[0] if head is not None else vocabulary_of(model)
