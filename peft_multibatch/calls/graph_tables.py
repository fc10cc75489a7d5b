"""The banks whose tables are read by graphs of kernels, kept up to date with the adapters of a plan."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch

from peft_multibatch import streams
from peft_multibatch.errors import ModelStateError


if TYPE_CHECKING:
    from peft_multibatch.adapters.adapter import AnyAdapter
    from peft_multibatch.adapters.bank import Bank
    from peft_multibatch.adapters.tables import Tables
    from peft_multibatch.calls.batch_plan import BatchPlan
    from peft_multibatch.calls.captures import Captures


class GraphTables:
    """The banks that graphs of kernels read, and their devices. An update costs time only for new adapters.

    Banks are looked at one by one only for the first of the stored adapters that share a layout. The rows of others
    are written for all banks at once.

    Not thread-safe: callers hold a lock.

    Args:
        memory: all tables of the model.
    """

    def __init__(self, memory: Tables) -> None:
        self._memory = memory
        self._devices: dict[Bank, torch.device] = {}
        # the number of slots in all tables, and the adapters in all of them: serials, by slot
        self._slots, self._ready = 0, dict[int, int]()
        # the layouts for which graphs have tables in all banks, as of a certain state of these
        self._layouts: WeakSet[object] = WeakSet()
        self._changes = 0

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
        self._layouts.clear()

    def bring_up_to_date(self, plan: BatchPlan, captures: Captures) -> None:
        """Enter the adapters of a plan in all tables.

        Raises:
            ModelStateError: a user's captured graph can't run the plan.
        """
        captures.check(plan)
        reason = (plan.why_not_compiled(self) or captures.why_no_kernels(plan)) if captures.of_users else ""
        if reason:
            raise ModelStateError(
                f"a CUDA graph was captured, and {reason}, which graphs can't run: expected adapters that run "
                "segmented, without variants or dropout. Call disable and enable, and run it without CUDA graphs."
            )
        new = self._new_in(plan)
        if not new:
            return
        ready, others = self._ready if self._slots == plan.slots else {}, self._without_layout(new, plan)
        changes, self._slots = self._memory.changes, 0  # in case an exception leaves some tables without them
        with contextlib.ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
            for device in {*self._devices.values()}:
                stack.enter_context(streams.writing(device))
                with self._memory.lock:
                    self._memory.write(new, device)
            for bank, device in self._devices.items() if others else ():
                if not bank.has_rows(others, device, plan.slots):
                    bank.tables(others, device, plan.slots)
                if captures.extend(bank, others, device, captures.of_users):
                    for table in bank.graph_tables:
                        torch._dynamo.mark_static_address(table.rows)
        if changes != self._changes:
            self._layouts.clear()
            self._changes = changes
        self._layouts.update(each.layout for each in others.values() if each.layout is not None)
        self._slots, self._ready = plan.slots, {**ready, **{slot: each.serial for slot, each in new.items()}}

    def are_outgrown_by(self, plan: BatchPlan) -> bool:
        """Whether captured graphs can't run a plan, because its adapters have larger ranks or other dtypes."""
        new = self._without_layout(self._new_in(plan), plan)
        return bool(new) and not all(bank.serves(new, device, plan.slots) for bank, device in self._devices.items())

    def _new_in(self, plan: BatchPlan) -> dict[int, AnyAdapter]:
        ready = self._ready if self._slots == plan.slots else {}  # tables are rebuilt when the number of slots changes
        return {slot: each for slot, each in plan.adapters.items() if ready.get(slot) != each.serial}

    def _without_layout(self, adapters: dict[int, AnyAdapter], plan: BatchPlan) -> dict[int, AnyAdapter]:
        """Those of the adapters whose layouts graphs may not have tables for."""
        if self._slots != plan.slots or self._changes != self._memory.changes:
            return adapters
        return {slot: each for slot, each in adapters.items() if each.layout not in self._layouts}
