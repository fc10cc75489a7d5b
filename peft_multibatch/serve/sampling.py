"""Sampling options per request in continuous batching, on top of transformers' logits processors.

transformers samples with one global generator, so that a seed per request has no effect, and uses either greedy search
or sampling for all requests. Here every step ends in an argmax. To sample, Gumbel noise is added first, which makes
the argmax a draw from the softmax. The noise depends only on the request's seed and the token's position, so a request
gets the same tokens whatever else is in the batch, and even if it is evicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopKLogitsWarper,
    ContinuousBatchingTopPLogitsWarper,
)
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from peft_multibatch.serve.grammars import Grammar
from peft_multibatch.serve.logprobs import Logprobs
from peft_multibatch.serve.masks import Masks
from peft_multibatch.serve.penalties import Penalties


OPTIONS = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "seed": int,
    "presence_penalty": float,
    "frequency_penalty": float,
    "logprobs": int,
    "grammar": Grammar,
}
"""Sampling options of a request, and their types. A request without a temperature is greedy."""

WARPERS = ("temperature", "top_k", "top_p")
KEY, SLOT, PRESENCE, FREQUENCY, MASK = range(len(WARPERS), len(WARPERS) + 5)
"""Rows of the tensor that carries the arguments to the device, after those of the warpers."""

PLAIN, CHOSEN, SORTED = range(3)
"""What a captured step does for all of its rows, because one row needs it: only an argmax; everything except sorting;
everything. Log-probabilities are independent of it."""


class Sampling(ContinuousBatchingLogitsProcessorList):
    """The processors of all requests, each with its own arguments.

    Only the rows that need a processor pass through it, so that a greedy request doesn't pay for the sampling of
    others. In steps captured in CUDA graphs, all rows pass through the processors that any row needs, and neutral
    arguments leave the others unchanged.

    Args:
        vocabulary: number of logits.
        max_logprobs: maximum number of top log-probabilities per position.

    Attributes:
        logprobs: log-probabilities of the model's own distribution.
        masks: masks of requests with a grammar.
        vocabulary: number of logits.
        is_static: whether steps are captured, so that only ``kind`` may depend on their requests.
        level: what the step's rows need: one of ``PLAIN``, ``CHOSEN`` and ``SORTED``.
    """

    def __init__(self, vocabulary: int, max_logprobs: int) -> None:
        neutral = [
            ContinuousBatchingTemperatureLogitsWarper(TemperatureLogitsWarper(1.0)),
            ContinuousBatchingTopKLogitsWarper(TopKLogitsWarper(vocabulary)),
            ContinuousBatchingTopPLogitsWarper(TopPLogitsWarper(1.0)),
        ]
        super().__init__(LogitsProcessorList(neutral))
        self.tensors_required = MASK + 1
        self.supported_keys.update(OPTIONS)
        self.logprobs = Logprobs(max_logprobs)
        self.penalties = Penalties(vocabulary)
        self.masks = Masks(vocabulary)
        self.is_static = False
        self.level = PLAIN
        self.vocabulary = vocabulary
        self._noise: Tensor | None = None
        self._rows: dict[str, list[int]] = {}  # rows of the step that use an option, by option

    @property
    def kind(self) -> tuple[int, bool]:
        """The kind of sampling of a step; steps of the same kind can use the same captured graph."""
        return self.level, self.logprobs.are_wanted

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Write neutral arguments."""
        super().fill_defaults(int32_tensor)
        int32_tensor[KEY:] = 0

    def prepare_tensor_args(self, requests_in_batch: list[FutureRequestState], arg_storage: Tensor) -> Tensor:
        """Write the arguments of a step's requests to the tensor that is copied to the device."""
        states = [future.state for future in requests_in_batch if future.has_new_token]
        super().prepare_tensor_args(requests_in_batch, arg_storage)
        options = [state.logit_processor_kwargs for state in states]
        self._rows = {name: _rows_with(name, options) for name in (*WARPERS, "seed")}
        self.logprobs.prepare(options)
        slots, presence, frequency = self.penalties.prepare(states)
        keys = [_key(each["seed"], state.position_offset) if "seed" in each else 0
                for each, state in zip(options, states)]  # fmt: skip
        sorts = self._rows["top_k"] or self._rows["top_p"]
        chooses = any(OPTIONS.keys() & each.keys() - {"logprobs"} for each in options)
        self.level = SORTED if sorts else CHOSEN if chooses else PLAIN
        arg_storage[KEY:] = 0  # padding must not count tokens in a request's slot
        written = [keys, slots, _bits(presence), _bits(frequency), self.masks.prepare(states)]
        arg_storage[KEY:, : len(states)] = torch.tensor(written, dtype=torch.int32, device="cpu").to(
            arg_storage.device
        )
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Process the scores; the highest one is the next token.

        Args:
            input_ids: the last token of every request, [requests].
            scores: the model's logits, [requests, vocabulary], float32.
            logits_processor_args: the tensor from ``prepare_tensor_args``, [rows, at least requests], int32.
        """
        args = logits_processor_args
        self.logprobs.look_at(scores)
        if self.is_static and self.level == PLAIN:
            return scores
        before = scores
        if self.is_static or self.penalties.are_wanted:
            scores = self.penalties.apply(scores, input_ids, args[SLOT], args[PRESENCE], args[FREQUENCY])
        if self.is_static:
            scores = self.masks.apply(scores, args[MASK])
        elif self.masks.rows:
            scores = scores.clone() if scores is before else scores
            scores[self.masks.rows] = self.masks.apply(scores[self.masks.rows], args[MASK][self.masks.rows])
        for index, name in enumerate(WARPERS):
            warper: Any = self.logits_processor[index]
            rows = self._rows.get(name, [])
            if self.is_static and (name == "temperature" or self.level == SORTED):
                scores = warper(scores, args[index])
            elif rows and not self.is_static:
                scores = scores.clone() if scores is before else scores
                scores[rows] = warper(scores[rows], args[index][rows])
        return self._with_noise(scores, args[KEY])

    def _with_noise(self, scores: Tensor, keys: Tensor) -> Tensor:
        rows = self._rows.get("seed", [])
        if self._noise is None:
            self._noise = _mixed(torch.arange(self.vocabulary, dtype=torch.int64, device=scores.device))
        if self.is_static:
            keys = keys[: len(scores)]
            return torch.where(keys[:, None] != 0, scores + _gumbel(keys, self._noise), scores)
        if rows:
            scores[rows] += _gumbel(keys[rows], self._noise)
        return scores


def _rows_with(name: str, options: Sequence[dict]) -> list[int]:
    return [row for row, each in enumerate(options) if name in each]


def _bits(values: Sequence[float]) -> list[int]:
    """Reinterpret the bits of float32 numbers as int32."""
    return torch.tensor(values, dtype=torch.float32, device="cpu").view(torch.int32).tolist()


def _key(seed: int, position: int) -> int:
    """Hash a seed and a position to 31 bits, never 0 (splitmix64)."""
    x = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return ((x ^ (x >> 31)) & 0x7FFFFFFF) or 1


def _mixed(x: Tensor) -> Tensor:
    """Hash 32 bits to 32 bits, computed in int64 with products truncated to 32 bits."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _gumbel(keys: Tensor, noise: Tensor) -> Tensor:
    """Noise from the standard Gumbel distribution, [keys, vocabulary]."""
    uniform = (_mixed(keys[:, None].long() ^ noise).float() + 0.5) / 2**32
    # log1p keeps all bits of small exponentials, which win the argmax; large ones may be inexact
    return -(-torch.log1p(-uniform.clamp(max=1 - 2**-24))).log()
