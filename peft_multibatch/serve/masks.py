"""Bit masks of the tokens that the requests' grammars allow next, computed on the host and applied on the device.

A mask depends on all tokens so far, so a request with a grammar can't take part in a step that is prepared before its
last token is known. With asynchronous batching it runs in every other step; other requests run in every step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.requests import RequestState

from peft_multibatch.continuous.leaving import on_stream
from peft_multibatch.serve.grammars import too_complex


MATCHER = "peft_multibatch_matcher"
"""Attribute of a request: its matcher, and the number of tokens that this has consumed."""


class Masks:
    """The masks of a step.

    Args:
        vocabulary: number of logits that the model returns.

    Attributes:
        failed: requests whose grammar can no longer be applied, with their errors; the caller that ends them removes
            them.
        rows: rows of the step that have a grammar.
    """

    def __init__(self, vocabulary: int) -> None:
        self.failed: list[tuple[RequestState, Exception]] = []
        self.rows: list[int] = []
        self._vocabulary = vocabulary
        self._masks = torch.full((1, -(-vocabulary // 32)), -1, dtype=torch.int32, device="cpu")
        self._stream: Any = None
        self._hosts: Iterator[Tensor] = iter(())
        self._under_way: dict[Any, tuple[RequestState, int]] = {}  # requests of the last step → tokens known then
        self._executor: Any = None

    def allocate(self, slots: int, device: torch.device, stream: Any) -> None:
        """Allocate masks for the requests of a step.

        Args:
            slots: maximum number of requests per step.
            device: the model's device.
            stream: the stream that it computes on, or None.
        """
        words = self._masks.shape[1]
        # row 0 allows everything, for all requests without a grammar
        self._masks = torch.full((slots + 1, words), -1, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        # two, because one may still be copied while the next step is prepared
        hosts = [torch.zeros(slots, words, dtype=torch.int32, device="cpu", pin_memory=pinned) for _ in range(2)]
        self._hosts, self._stream = itertools.cycle(hosts), stream

    def holds(self, state: RequestState) -> bool:
        """Whether the token that a request's mask depends on isn't known yet."""
        last = self._under_way.get(state.request_id)
        return last is not None and last[0] is state and last[1] == len(state.generated_tokens)

    def prepare(self, states: Sequence[RequestState]) -> list[int]:
        """Compute the masks for the next step; returns the slot of each request that gets a token, 0 without a
        mask."""
        self.rows = [row for row, state in enumerate(states) if "grammar" in state.logit_processor_kwargs]
        chosen = [states[row] for row in self.rows]
        self._under_way = {state.request_id: (state, len(state.generated_tokens)) for state in chosen}
        slots = [0] * len(states)
        if not chosen:
            return slots
        matchers = [_advanced(state) for state in chosen]
        host = next(self._hosts)
        self._fill(matchers, host)
        for place, (row, matcher) in enumerate(zip(self.rows, matchers)):
            slots[row] = place + 1
            if matcher.is_error():
                host[place] = -1  # this step's token is discarded
                self.failed.append((states[row], too_complex()))
        with on_stream(self._stream):
            self._masks[1 : len(chosen) + 1].copy_(host[: len(chosen)], non_blocking=True)
        return slots

    def apply(self, scores: Tensor, slots: Tensor) -> Tensor:
        """Set the scores of tokens that aren't allowed to minus infinity.

        Args:
            scores: [requests, vocabulary].
            slots: the slots from ``prepare``, [at least requests], int32.
        """
        words = self._masks[slots[: len(scores)].long()]
        bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
        return scores.masked_fill(bits.flatten(1)[:, : scores.shape[1]] == 0, -torch.inf)

    def _fill(self, matchers: list[Any], host: Tensor) -> None:
        from llguidance import LLExecutor
        from llguidance.numpy import fill_next_token_bitmask_par

        if self._executor is None:
            self._executor = LLExecutor()
        fill_next_token_bitmask_par(self._executor, list(zip(matchers, range(len(matchers)))), host.numpy())


def tokens_of(state: RequestState) -> list[int]:
    """All tokens that a request has generated, including those before an eviction."""
    before = state.initial_tokens[state._true_initial_tokens :] if state._true_initial_tokens else []
    return [*before, *state.generated_tokens]


def _advanced(state: RequestState) -> Any:
    """Return a request's matcher, advanced past all of its tokens."""
    held = state.__dict__.get(MATCHER)
    if held is None:
        held = state.__dict__[MATCHER] = [state.logit_processor_kwargs["grammar"].start(), 0]
    before = len(state.initial_tokens) - state._true_initial_tokens if state._true_initial_tokens else 0
    if held[1] < before + len(state.generated_tokens):
        new = state.generated_tokens[held[1] - before :] if held[1] >= before else tokens_of(state)[held[1] :]
        held[0].consume_tokens(new)
        held[1] += len(new)
    return held[0]
