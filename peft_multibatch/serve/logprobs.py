"""Log-probabilities of the model's own distribution, before temperature, penalties and other processing.

They are copied to the host with the tokens, as rows of the same tensor, and replace transformers' log-probabilities,
which are those of the processed distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position.

    Attributes:
        chosen: log-probability of the generated token.
        top: the most likely tokens and their log-probabilities, in descending order; as many as requested.
    """

    chosen: float
    top: list[tuple[int, float]]


class Logprobs:
    """Computes log-probabilities in steps with a request that needs them.

    Args:
        most: maximum number of top tokens per position; 0 turns them off.

    Attributes:
        rows: number of rows that they take in the output tensor.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.rows = 1 + 2 * most if most else 0
        self._wanted: list[int | None] = []
        self._logits: Tensor | None = None

    def prepare(self, options: Sequence[dict[str, Any]]) -> None:
        """Set the options of the next step's requests."""
        self._wanted = [each.get("logprobs") for each in options]

    @property
    def are_wanted(self) -> bool:
        """Whether a request of the step needs them."""
        return bool(self.most) and any(each is not None for each in self._wanted)

    def look_at(self, logits: Tensor) -> None:
        """Keep a step's logits until its tokens are chosen, if a request needs them."""
        self._logits = logits if self.are_wanted else None

    def wrap_sample(self, sample: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor, Tensor], None]:
        """Wrap the choice of tokens so that their log-probabilities are written after them."""

        def sample_with_logprobs(scores: Tensor, output_ids: Tensor) -> None:
            sample(scores, output_ids)
            logits, self._logits = self._logits, None
            if logits is None:
                return
            count = len(logits)
            total = logits.logsumexp(-1, keepdim=True)
            chosen = logits.gather(1, output_ids[0, :count, None].long())
            values, tokens = logits.topk(min(self.most, logits.shape[1]), -1)
            found = torch.cat([chosen - total, values - total], 1).float().T.contiguous()
            output_ids[1 : 1 + len(found), :count] = found.view(torch.int32)
            output_ids[1 + len(found) : 1 + len(found) + tokens.shape[1], :count] = tokens.T

        return sample_with_logprobs

    def wrap_update(self, io: Any, update: Callable[[], tuple]) -> Callable[[], tuple]:
        """Wrap the reading of a step's tokens to include the log-probabilities that were requested."""

        def update_with_logprobs() -> tuple:
            futures, tokens, _ = update()
            states = [future.state for future in futures if future.has_new_token]
            wanted = [state.logit_processor_kwargs.get("logprobs") for state in states]
            if not self.most or not any(each is not None for each in wanted):
                return futures, tokens, None
            packed = io.io_pairs[io.current_pair].host_io if hasattr(io, "io_pairs") else io
            count = len(states)
            written = packed.output_ids[1 : 1 + self.rows, :count].T.contiguous().cpu()
            values = written[:, : 1 + self.most].contiguous().view(torch.float32).tolist()
            likeliest = written[:, 1 + self.most :].tolist()
            found = [
                None if number is None else TokenLogprobs(row[0], list(zip(names, row[1:]))[:number])
                for number, row, names in zip(wanted, values, likeliest)
            ]
            return futures, tokens, found + [None] * (len(tokens) - count)

        return update_with_logprobs
