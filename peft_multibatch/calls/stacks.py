"""Copies of weights, side by side, for the steps of one ``generate`` on a CPU: see ``ops/torch_stacks.py``.

They belong to the call and end with it: a call goes on with the weights that it has begun with, and the next one reads
them anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_multibatch.ops.torch_stacks import Stack, make
from peft_multibatch.plan.segments import RUN


if TYPE_CHECKING:
    from peft_multibatch.adapters.bank import Bank
    from peft_multibatch.calls.batch_plan import BatchPlan

STEPS = 2
"""The step from which on weights are copied, which costs about what three steps save. Counted are steps of one size: a
prompt is none."""

MEMORY = 1 << 28
"""Bytes that the copies of one call take at most. Layers that come later do without."""


class Stacks:
    """Those of one call. For inference."""

    def __init__(self) -> None:
        self._steps: dict[Bank, tuple[int, int]] = {}  # rows, and how many steps had as many
        self._found: dict[Bank, tuple[BatchPlan, int, list[Stack]]] = {}
        self._left = MEMORY

    def take(self, bank: Bank, plan: BatchPlan, num_rows: int) -> list[Stack]:
        """The stacks of a plan's components in the layers of a bank; empty where there are none, or not yet.

        Args:
            bank: whose weights.
            plan: who serves which sample.
            num_rows: rows of this step.
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
