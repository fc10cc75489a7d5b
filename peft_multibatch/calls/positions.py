"""Which adapters compiled graphs of ops take as inputs, however many there are."""

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
"""Adapters that graphs take at least; a power of two that is as many as batches have, when they have more."""


class Positions:
    """Where the adapters of the active calls are among the inputs of graphs.

    An adapter that isn't in use any more stays until its position is needed, so that the same adapters, coming again,
    are at the same positions.
    """

    def __init__(self) -> None:
        self._adapters: list[AnyAdapter | None] = []
        self._of_slots: dict[int, int] = {}

    def fill(self, wanted: Iterable[AnyAdapter], live: Collection[AnyAdapter], banks: Iterable[Bank]) -> None:
        """Give every wanted adapter a position, and bring what graphs read of the banks up to date.

        Args:
            wanted: of all calls that are active.
            live: those of them to which gradients go.
            banks: all that graphs read.
        """
        wanted = list(dict.fromkeys(wanted))
        adapters = list(self._adapters)
        adapters += [None] * ((1 << (max(len(wanted), FEWEST) - 1).bit_length()) - len(adapters))
        free = [position for position, each in enumerate(adapters) if each not in wanted]
        free.sort(key=lambda position: adapters[position] is not None)
        for adapter in wanted:
            if adapter not in adapters:
                adapters[free.pop(0)] = adapter
        # normal tensors even if the first call happens to run in inference mode
        with torch.inference_mode(False), torch.no_grad():
            for bank in banks:
                bank.sync(adapters, live)
        self._adapters = adapters
        self._of_slots = {each.slot: position for position, each in enumerate(adapters) if each is not None}

    def forget(self, in_use: Iterable[AnyAdapter], banks: Iterable[Bank]) -> None:
        """Let go of all others, and of their memory as soon as none is in use."""
        kept, before = {*in_use}, self._adapters
        self._adapters = [each if each in kept else None for each in before]
        if not kept and any(before):
            self.fill((), (), banks)

    def packed(self, plan: BatchPlan) -> list[Tensor]:
        """The packed plans, with positions in the place of slots."""
        of_slots, known = self._of_slots, plan.placed
        if known is None or known[0] is not of_slots:
            known = plan.placed = of_slots, plan.packed_at(of_slots)
        return known[1]
