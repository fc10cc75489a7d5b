"""Sums over processes that train the same adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_multibatch.errors import ModelStateError


class Ranks:
    """Processes, each with rows of its own; or this one alone.

    Args:
        group: a process group, or None for all processes.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1

    def check_same(self, names: list[str]) -> None:
        """Raise where processes train different adapters.

        Raises:
            ModelStateError: they do.
        """
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, names, self._group)
        if any(each != found[0] for each in found):
            raise ModelStateError(
                f"processes began runs of different adapters, {found}: expected the same ones in the same order, "
                "whose gradients are added up. Pass process_group for processes that train by themselves."
            )

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Have everywhere what the first process has."""
        if self.size > 1:
            first = dist.get_global_rank(self._group, 0) if self._group is not None else 0
            for each in tensors:
                dist.broadcast(each.detach(), first, self._group)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of one tensor over all processes, in place."""
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def sum_gradients(self, adapters: Sequence[Sequence[nn.Parameter]]) -> None:
        """Add up gradients; a parameter that has one in any process has one in all.

        Args:
            adapters: the parameters of each adapter, of which some process has gradients.
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
            for dtype in dict.fromkeys(each.dtype for each in wanted):  # in the same order everywhere
                some = [each for each in wanted if each.dtype == dtype]
                flat = self.sum(torch.cat([each.grad.flatten() for each in some if each.grad is not None]))
                for each, part in zip(some, flat.split([each.numel() for each in some])):
                    each.grad = part.view_as(each)
