"""Sum gradients and losses over the processes that train the same adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_multibatch.errors import ModelStateError


class Ranks:
    """The processes of a run, each with its own rows; or only this one.

    Args:
        group: a process group, or None for all processes.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1

    def check_same(self, names: list[str]) -> None:
        """Check that all processes train the same adapters.

        Raises:
            ModelStateError: they don't.
        """
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, names, self._group)
        if any(each != found[0] for each in found):
            raise ModelStateError(
                f"processes started runs of different adapters, {found}: expected the same adapters in the same "
                "order, because their gradients are summed. Pass process_group for processes that train independently."
            )

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Copy tensors from the first process to all others."""
        if self.size > 1:
            first = dist.get_global_rank(self._group, 0) if self._group is not None else 0
            for each in tensors:
                dist.broadcast(each.detach(), first, self._group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def sum_gradients(self, adapters: Sequence[Sequence[nn.Parameter]]) -> None:
        """Sum gradients over all processes; a parameter with a gradient in one process gets one in all.

        Args:
            adapters: the parameters of each adapter that has gradients in some process.
        """
        if self.size == 1 or not adapters:
            return
        every = [each for parameters in adapters for each in parameters]
        device = every[0].device
        present = self.sum(torch.tensor([each.grad is not None for each in every], dtype=torch.int32, device=device))
        found = iter(present.tolist())
        for parameters in adapters:
            wanted = [each for each in parameters if next(found)]
            for each in wanted:
                if each.grad is None:
                    each.grad = torch.zeros_like(each)
            for dtype in dict.fromkeys(each.dtype for each in wanted):  # the same order in all processes
                some = [each for each in wanted if each.dtype == dtype]
                flat = self.sum(torch.cat([each.grad.flatten() for each in some if each.grad is not None]))
                for each, part in zip(some, flat.split([each.numel() for each in some])):
                    each.grad = part.view_as(each)
