"""OpenAI's presence and frequency penalties: what a request has generated so far is less likely to come again.

Tokens are counted on the device, each when it is read as input. So a step may be prepared before the host knows the
token of the one before (asynchronous batching), and graphs may be captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.requests import RequestState

from peft_multibatch.continuous.leaving import on_stream
from peft_multibatch.serve.masks import tokens_of


class Penalties:
    """Counts of generated tokens, a row ("slot") for each request that runs with penalties.

    Args:
        vocabulary: how many tokens the model knows.

    Attributes:
        are_wanted: whether a request of the step has penalties.
    """

    def __init__(self, vocabulary: int) -> None:
        self.are_wanted = False
        self._vocabulary = vocabulary
        self._counts = torch.zeros(
            0, dtype=torch.float32, device="cpu"
        )  # [slots, vocabulary]; slot 0 is that of all requests without penalties
        self._stream: Any = None
        self._held: dict[Any, tuple[int, RequestState]] = {}  # slots of the requests of the last step

    def allocate(self, slots: int, device: torch.device, stream: Any) -> None:
        """Make room for as many requests as there may be in a step.

        Args:
            slots: how many.
            device: where the model computes.
            stream: on which it does, or None.
        """
        self._counts = torch.zeros(slots + 1, self._vocabulary, dtype=torch.int32, device=device)
        self._stream = stream

    def prepare(self, states: Sequence[RequestState]) -> tuple[list[int], list[float], list[float]]:
        """Slots and penalties of the requests that get a token in the next step.

        A slot is negative where no generated token comes in: the prompt ends there.
        """
        options = [state.logit_processor_kwargs for state in states]
        presence = [each.get("presence_penalty", 0.0) for each in options]
        frequency = [each.get("frequency_penalty", 0.0) for each in options]
        with_any = {state.request_id: state for state, one, two in zip(states, presence, frequency) if one or two}
        self.are_wanted = bool(with_any)
        # whoever wasn't in the last step, or began anew, is counted by the host, which knows all of its tokens
        self._held = {name: held for name, held in self._held.items() if with_any.get(name) is held[1]}
        free = iter({*range(1, len(self._counts))} - {slot for slot, _ in self._held.values()})
        slots = dict.fromkeys(with_any, 0)
        for name, state in with_any.items():
            if name in self._held:
                slots[name] = self._held[name][0]
                continue
            slot = next(free)
            self._held[name] = slot, state
            generated = tokens_of(state)
            self._write(slot, generated[:-1])  # the last one comes in with the step
            slots[name] = slot if generated else -slot
        return [slots.get(state.request_id, 0) for state in states], presence, frequency

    def apply(self, scores: Tensor, last: Tensor, slots: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
        """Scores, less what their tokens were generated for.

        Args:
            scores: [requests, vocabulary].
            last: the token that came in, [requests].
            slots: what ``prepare`` gave, [at least requests], int32.
            presence: penalties, the bits of float32 in int32, as long.
            frequency: penalties, the same.
        """
        count = len(scores)
        signed = slots[:count].long()
        rows = signed.abs()
        self._counts.index_put_((rows, last.long()), (signed > 0).int(), accumulate=True)
        counts = self._counts[rows]
        per_token, once = (each[:count].view(torch.float32)[:, None] for each in (frequency, presence))
        return scores - counts * per_token - (counts > 0) * once

    def _write(self, slot: int, tokens: list[int]) -> None:
        with on_stream(self._stream):
            counted = torch.bincount(torch.tensor(tokens, dtype=torch.int64, device="cpu"), minlength=self._vocabulary)
            self._counts[slot] = counted.to(self._counts)
