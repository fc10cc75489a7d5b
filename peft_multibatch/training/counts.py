"""Count the losses and items that completed backward passes have turned into gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_multibatch.compat import after_backward


class Counts:
    """Sums over the samples of each adapter, and over the backward passes since ``take``.

    Args:
        adapters: number of adapters.
    """

    def __init__(self, adapters: int) -> None:
        self._adapters = adapters
        self._done: list[Tensor] = []
        self._begun = 0

    @property
    def was_interrupted(self) -> bool:
        """Whether a backward pass began and didn't end, so that the gradients are incomplete."""
        return self._begun > 0

    def add(self, total: Tensor, losses: Tensor, items: Tensor, places: Tensor) -> None:
        """Count these samples once ``backward`` of their sum has run, multiplied by the factor it ran with.

        Args:
            total: the sum of the losses.
            losses: the loss of each sample; ``[samples]``.
            items: number of items of each sample; ``[samples]``.
            places: index of each sample's adapter; ``[samples]``, int64.
        """
        values = torch.stack([losses.detach(), items.to(losses), torch.ones_like(losses)])
        sums = values.new_zeros(3, self._adapters).index_add_(1, places, values)

        def begin(factor: Tensor) -> None:
            counted = torch.cat([sums[:2] * factor, sums[1:]])
            if torch.compiler.is_compiling():  # compiled autograd calls nothing at the end, and isn't interrupted
                self._done.append(counted)
                return
            self._begun += 1
            after_backward(lambda: end(counted))

        def end(counted: Tensor) -> None:
            self._begun -= 1
            self._done.append(counted)

        total.register_hook(begin)

    def take(self, device: torch.device) -> Tensor:
        """Return the sums and begin again.

        Returns:
            For each adapter, losses and items multiplied by the factor, items, and number of rows; ``[4, adapters]``,
            in float64 where the device has it.
        """
        dtype = torch.float32 if device.type == "mps" else torch.float64
        found = [each.to(device, dtype) for each in self._done]
        self.clear()
        none = torch.zeros(4, self._adapters, dtype=dtype, device=device)
        return torch.stack(found).sum(0) if found else none

    def clear(self) -> None:
        """Forget what was counted."""
        self._done, self._begun = [], 0
