"""Stacked copies of weights for the steps of one ``generate`` on a CPU; see ``ops/torch_stacks.py``.

They belong to one call: a call finishes with the weights that it began with, and the next one copies them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_multibatch.ops.torch_stacks import Stack, make
from peft_multibatch.plan.segments import RUN


if TYPE_CHECKING:
    from peft_multibatch.adapters.bank import Bank
    from peft_multibatch.calls.batch_plan import BatchPlan

STEPS = 2
"""The step at which weights are copied, which costs about what three steps save. Only steps with the same number of
rows are counted, so a prompt isn't one of them."""

MEMORY = 1 << 28
"""The most bytes that the copies of one call may take. Layers beyond this limit don't use copies."""


class Stacks:
    """The copies of one call, for inference."""

    def __init__(self) -> None:
        self._steps: dict[Bank, tuple[int, int]] = {}  # rows of the last step, and how many steps in a row had as many
        self._found: dict[Bank, tuple[BatchPlan, int, list[Stack]]] = {}
        self._left = MEMORY

    def take(self, bank: Bank, plan: BatchPlan, num_rows: int) -> list[Stack]:
        """The stacks of a plan's components for a bank; empty if they don't exist, or not yet.

        Args:
            bank: the bank whose weights are copied.
            plan: the plan of the call.
            num_rows: the number of rows in this step.
        """
        found = self._found.get(bank)
        if found is None:
            if plan.segments.rows_per_entry(num_rows) >= RUN:
                return []
            rows, steps = self._steps.get(bank, (num_rows, 0))
            steps = steps + 1 if rows == num_rows else 1
            self._steps[bank] = num_rows, steps
            if steps < STEPS:
                return []
            found = self._found[bank] = plan, num_rows, self._make(bank, plan, num_rows)
        made_for, rows, stacks = found
        return stacks if made_for is plan and rows == num_rows else []

    def _make(self, bank: Bank, plan: BatchPlan, num_rows: int) -> list[Stack]:
        stacks: list[Stack] = []
        for segments in plan.components:
            stack = make(segments, plan.weights(bank), num_rows, self._left - sum(each.size for each in stacks))
            if stack is None:
                return []
            stacks.append(stack)
        self._left -= sum(each.size for each in stacks)
        return stacks
