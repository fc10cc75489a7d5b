"""The banks whose tables are read by graphs of kernels, kept up to date with the adapters of a plan."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from peft_multibatch import streams
from peft_multibatch.errors import ModelStateError


if TYPE_CHECKING:
    from peft_multibatch.adapters.adapter import AnyAdapter
    from peft_multibatch.adapters.bank import Bank
    from peft_multibatch.calls.batch_plan import BatchPlan
    from peft_multibatch.calls.captures import Captures


class GraphTables:
    """The banks that graphs of kernels read, and their devices. An update costs time only for new adapters.

    Not thread-safe: callers hold a lock.
    """

    def __init__(self) -> None:
        self._devices: dict[Bank, torch.device] = {}
        # the number of slots in all tables, and the adapters in all of them: serials, by slot
        self._slots, self._ready = 0, dict[int, int]()

    def __iter__(self) -> Iterator[Bank]:
        return iter(self._devices)

    def __len__(self) -> int:
        return len(self._devices)

    def add(self, bank: Bank, device: torch.device) -> bool:
        """Record that graphs read a bank on this device.

        Returns:
            Whether this is new.
        """
        is_new = self._devices.get(bank) != device
        if is_new:
            self._devices[bank] = device
        return is_new

    def forget(self) -> None:
        """Check all tables again before they are read next."""
        self._slots = 0

    def bring_up_to_date(self, plan: BatchPlan, captures: Captures) -> None:
        """Enter the adapters of a plan in all tables.

        Raises:
            ModelStateError: a user's captured graph can't run the plan.
        """
        captures.check(plan)
        reason = plan.why_not_compiled(self) if captures.of_users else ""
        if reason:
            raise ModelStateError(
                f"a CUDA graph was captured, and {reason}, which graphs can't run: expected adapters that run "
                "segmented, without variants or dropout. Call disable and enable, and run it without CUDA graphs."
            )
        new = self._new_in(plan)
        if not new:
            return
        ready = self._ready if self._slots == plan.slots else {}
        self._slots = 0  # in case an exception leaves some tables without them
        with contextlib.ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
            for device in {*self._devices.values()}:
                stack.enter_context(streams.writing(device))
            for bank, device in self._devices.items():
                if not bank.has_rows(new, device, plan.slots):
                    bank.tables(new, device, plan.slots)
                if captures.extend(bank, new, device, captures.of_users):
                    for table in bank.graph_tables:
                        torch._dynamo.mark_static_address(table.rows)
        self._slots, self._ready = plan.slots, {**ready, **{slot: each.serial for slot, each in new.items()}}

    def are_outgrown_by(self, plan: BatchPlan) -> bool:
        """Whether captured graphs can't run a plan, because its adapters have larger ranks or other dtypes."""
        new = self._new_in(plan)
        return bool(new) and not all(bank.serves(new, device, plan.slots) for bank, device in self._devices.items())

    def _new_in(self, plan: BatchPlan) -> dict[int, AnyAdapter]:
        ready = self._ready if self._slots == plan.slots else {}  # tables are rebuilt when the number of slots changes
        return {slot: each for slot, each in plan.adapters.items() if ready.get(slot) != each.serial}
