"""OpenAI's presence and frequency penalties, which make tokens less likely that a request has already generated.

Each token is counted on the device when it is read as input. So a step can be prepared before the host knows the
previous step's tokens (asynchronous batching), and captured in a graph.
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
    """Counts of generated tokens, with a row ("slot") for each running request that has penalties.

    Args:
        vocabulary: size of the model's vocabulary.

    Attributes:
        are_wanted: whether a request of the step has penalties.
    """

    def __init__(self, vocabulary: int) -> None:
        self.are_wanted = False
        self._vocabulary = vocabulary
        self._counts = torch.zeros(
            0, dtype=torch.float32, device="cpu"
        )  # [slots, vocabulary]; slot 0 is shared by all requests without penalties
        self._stream: Any = None
        self._held: dict[Any, tuple[int, RequestState]] = {}  # slots of the requests of the last step

    def allocate(self, slots: int, device: torch.device, stream: Any) -> None:
        """Allocate counts for the requests of a step.

        Args:
            slots: maximum number of requests per step.
            device: the model's device.
            stream: the stream that it computes on, or None.
        """
        self._counts = torch.zeros(slots + 1, self._vocabulary, dtype=torch.int32, device=device)
        self._stream = stream

    def prepare(self, states: Sequence[RequestState]) -> tuple[list[int], list[float], list[float]]:
        """Return slots, presence and frequency penalties of the requests that get a token in the next step.

        A slot is negative if the input token isn't a generated one, but the end of the prompt.
        """
        options = [state.logit_processor_kwargs for state in states]
        presence = [each.get("presence_penalty", 0.0) for each in options]
        frequency = [each.get("frequency_penalty", 0.0) for each in options]
        with_any = {state.request_id: state for state, one, two in zip(states, presence, frequency) if one or two}
        self.are_wanted = bool(with_any)
        # requests that weren't in the last step or restarted are counted on the host, which knows all their tokens
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
            self._write(slot, generated[:-1])  # the step itself counts the last one
            slots[name] = slot if generated else -slot
        return [slots.get(state.request_id, 0) for state in states], presence, frequency

    def apply(self, scores: Tensor, last: Tensor, slots: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
        """Subtract the penalties from the scores.

        Args:
            scores: [requests, vocabulary].
            last: the input token of each request, [requests].
            slots: the slots from ``prepare``, [at least requests], int32.
            presence: presence penalties, float32 bits in int32, of the same length.
            frequency: frequency penalties, in the same format.
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
