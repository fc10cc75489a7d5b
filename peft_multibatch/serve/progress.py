"""Hand on what was generated, for all answers at once, because each handover costs the loop that runs the model time.

The first token of a streamed answer is handed on at once. After it, transformers builds no outputs until the answer
ends: its tokens are collected after steps, in rounds that are further apart the more streams there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState

from peft_multibatch.continuous.outputs import Outputs
from peft_multibatch.serve.errors import ApiError, failed
from peft_multibatch.serve.messages import Order, Output


PER_STREAM, LONGEST = 0.0005, 0.05
"""Seconds between two rounds, for each stream and at most. With a single stream, each token is handed on at once."""


class _Followed:
    """An answer, and how many of its tokens were handed on."""

    def __init__(self, order: Order) -> None:
        self.order, self.known = order, 0


class Progress(Outputs):
    """An output router that hands on what is new in answers; outputs of requests that it doesn't follow are dropped.

    Args:
        find: returns a running request by its id, or None.

    Attributes:
        hand_on: called with new outputs, in the thread of the model or of the caller whose request fails.
        explain: converts an exception to the error that is sent to the client.
    """

    def __init__(self, find: Callable[[Any], RequestState | None]) -> None:
        super().__init__()
        self.hand_on: Callable[[list[Output]], None] = lambda _: None
        self.explain: Callable[[Exception | None, Order], ApiError] = lambda *_: failed()
        self._find = find
        self._followed: dict[Any, _Followed] = {}
        self._streams: dict[Any, _Followed] = {}  # those whose tokens are collected in rounds
        self._causes: dict[Any, Exception] = {}  # exceptions by request; an output contains only the text
        self._last = 0.0  # time of the last round

    def __len__(self) -> int:
        return len(self._followed)

    def follow(self, order: Order) -> None:
        """Hand on the outputs of an answer, before its request is added."""
        self._followed[order.name] = _Followed(order)

    def forget(self, name: str) -> bool:
        """Drop further outputs of an answer; returns whether any were still expected."""
        with self._lock:
            self._streams.pop(name, None)
            return self._followed.pop(name, None) is not None

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """Hand on the outputs of a step."""
        with self._lock:
            found = []
            for output in outputs:
                followed = self._followed.get(output.request_id)
                if followed is None:
                    continue
                found.append(self._new(followed, output))
                if found[-1].is_finished:
                    self.forget(output.request_id)
                elif not followed.order.is_urgent and (state := self._find(output.request_id)) is not None:
                    state.streaming = False
                    self._streams[output.request_id] = followed
            if found:
                self.hand_on(found)

    def fail_and_deliver(self, state: RequestState, error: Exception) -> None:
        """End a request with an error."""
        self._causes[state.request_id] = error
        try:
            super().fail_and_deliver(state, error)
        finally:
            self._causes.pop(state.request_id, None)

    def step_ended(self) -> None:
        """Hand on the new tokens of all streams if a round is due; runs in the thread of the model."""
        now = time.perf_counter()
        if not self._streams or now - self._last < min(PER_STREAM * len(self._streams), LONGEST):
            return
        self._last = now
        with self._lock:
            found = []
            for name, followed in self._streams.items():
                state = self._find(name)
                if state is not None and not (output := state.to_generation_output()).is_finished():
                    found.append(self._new(followed, output))  # a last output is delivered
            if found := [each for each in found if each.tokens]:
                self.hand_on(found)

    def _new(self, followed: _Followed, output: GenerationOutput) -> Output:
        order, known = followed.order, followed.known
        tokens, logprobs = output.generated_tokens[known:], output.logprobs[known:]
        if "logprobs" in order.options:
            tokens = tokens[: len(logprobs)]  # the newest token's may not be known yet
        followed.known += len(tokens)
        cause = self._causes.get(output.request_id)
        is_failed = cause is not None or output.error is not None
        return Output(
            order.name,
            tokens,
            logprobs,
            output.is_finished() or is_failed,
            self.explain(cause, order) if is_failed else None,
            output.timestamps[0] if output.timestamps and not known else time.perf_counter(),
        )
