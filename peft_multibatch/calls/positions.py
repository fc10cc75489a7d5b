"""The positions of adapters among the inputs of compiled graphs of ops."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor


if TYPE_CHECKING:
    from peft_multibatch.adapters.adapter import AnyAdapter
    from peft_multibatch.adapters.bank import Bank
    from peft_multibatch.calls.batch_plan import BatchPlan


FEWEST = 8
"""The smallest number of adapters that graphs take. It grows in powers of two."""


class Positions:
    """The positions of the active calls' adapters among the inputs of graphs.

    An adapter keeps its position after use until another one needs it, so recurring adapters keep their positions.
    """

    def __init__(self) -> None:
        self._adapters: list[AnyAdapter | None] = []
        self._of_slots: dict[int, int] = {}

    def fill(self, wanted: Iterable[AnyAdapter], live: Collection[AnyAdapter], banks: Iterable[Bank]) -> None:
        """Give every wanted adapter a position, and bring the banks up to date for graphs.

        Args:
            wanted: the adapters of all active calls.
            live: those of them that get gradients.
            banks: all banks that graphs read.
        """
        wanted = list(dict.fromkeys(wanted))
        adapters = list(self._adapters)
        adapters += [None] * ((1 << (max(len(wanted), FEWEST) - 1).bit_length()) - len(adapters))
        free = [position for position, each in enumerate(adapters) if each not in wanted]
        free.sort(key=lambda position: adapters[position] is not None)
        for adapter in wanted:
            if adapter not in adapters:
                adapters[free.pop(0)] = adapter
        # no inference tensors, even if the first call runs in inference mode
        with torch.inference_mode(False), torch.no_grad():
            for bank in banks:
                bank.sync(adapters, live)
        self._adapters = adapters
        self._of_slots = {each.slot: position for position, each in enumerate(adapters) if each is not None}

    def forget(self, in_use: Iterable[AnyAdapter], banks: Iterable[Bank]) -> None:
        """Drop all other adapters, and free the memory once none is in use."""
        kept, before = {*in_use}, self._adapters
        self._adapters = [each if each in kept else None for each in before]
        if not kept and any(before):
            self.fill((), (), banks)

    def packed(self, plan: BatchPlan) -> list[Tensor]:
        """The packed plans, with positions instead of slots."""
        of_slots, known = self._of_slots, plan.placed
        if known is None or known[0] is not of_slots:
            known = plan.placed = of_slots, plan.packed_at(of_slots)
        return known[1]
