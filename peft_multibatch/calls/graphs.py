"""The state of the active calls that compiled and captured code reads: whether there is one, and its plan."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo.convert_frame import compile_lock

from peft_multibatch.calls.batch_plan import BatchPlan
from peft_multibatch.calls.buffers import PlanBuffers
from peft_multibatch.calls.call import Call
from peft_multibatch.calls.captures import Captures
from peft_multibatch.calls.graph_tables import GraphTables
from peft_multibatch.calls.positions import Positions
from peft_multibatch.calls.take_plan import number
from peft_multibatch.calls.threads import PerThread, ThreadState, current_task
from peft_multibatch.errors import ModelStateError, NotEnabledError, UnsupportedError
from peft_multibatch.plan.segment_buffer import packed_size
from peft_multibatch.plan.segments import BASE, Segments


if TYPE_CHECKING:
    from peft_multibatch.adapters.adapter import AnyAdapter
    from peft_multibatch.adapters.bank import Bank
    from peft_multibatch.adapters.tables import TableRows, Tables


class Graph:
    """Replaces a ``Call`` in compiled and captured code.

    Attributes:
        key: the number by which ``take_plan`` finds this object.
        active: whether a call is active on any thread; code is compiled once for each value.
        here: whether a call is active on the current thread.
        contended: whether calls with different plans are active at the same time, on several threads or tasks, so that
            the fixed address can't have the plan of all.
        apart: why compiled code can't run the active calls (an adapter runs PEFT's own modules), or the empty string.
        no_kernels: why graphs of kernels can't run them, or the empty string.
        components: the number of plans that graphs read, the most adapters that a sample has had in any call.
        plans: the number of plans so far, a tensor on the CPU. Graphs of ops that recompute in ``backward`` save it,
            so autograd raises an error if the plan has changed since.
        buffers: plans at fixed addresses for kernels, by device, one per component.
        sibling_outputs: as in ``Call``; filled and emptied within one graph.
        banks: all banks of the model.
        captures: the CUDA graphs that were captured.
        is_traced: whether code was compiled that reads attributes of this object.
        packed, base_layers: as in ``Call``; always False and empty.

    Args:
        active: returns the active call of the current thread or task, and raises if it has ended.
        note: called with the call that compiled code runs under, and whether the code was compiled with gradients.
        tables: all tables of the model.
    """

    packed = False
    base_layers: frozenset = frozenset()

    def __init__(self, active: Callable[[], Call | None], note: Callable[[Call, bool], None], tables: Tables) -> None:
        self.key = number(self)
        self.active = self.contended = False
        self.here = PerThread()
        self.apart = self.no_kernels = ""
        self.components = 1
        with torch.inference_mode(False):
            self.plans = torch.zeros((), dtype=torch.int32, device="cpu")
        self._buffers = PlanBuffers()
        self.buffers = self._buffers.by_device
        self.sibling_outputs: dict[Any, tuple[Tensor, int, list[Tensor | None]]] = {}
        self.banks: list[Bank] = []
        self._active_call, self._note = active, note
        self._calls: dict[Call, None] = {}  # the active calls
        self._innermost: list[Call] = []  # the innermost active call of each task
        # the plan and adapters that graphs of ops are ready for, and which of their parameters are trained
        self._synced: tuple[BatchPlan, set[AnyAdapter], list[bool]] | None = None
        self._positions = Positions()  # of adapters among the inputs of graphs of ops
        self._written: BatchPlan | None = None
        self.is_traced = self._runs_ops = self._is_closed = False
        self._tables = GraphTables(tables)
        self.captures = Captures()
        self._lock = threading.RLock()

    def adapt(self, banks: list[Bank], layers: Mapping[Any, str]) -> None:
        """Update the banks of the model and its layers with adapters, by name."""
        self.banks = banks
        self.captures.adapt(banks, layers)

    @torch._dynamo.assume_constant_result  # runs while the graph is traced, and isn't part of it
    def trace(self) -> bool:
        """Record that code is being compiled that reads attributes of this object."""
        with self._lock:
            if not self.is_traced:
                self.is_traced = True
                self._look_apart([call for call in self._calls if call.is_active])
        return True

    @torch._dynamo.assume_constant_result
    def arm(self) -> bool:
        """Record that there is a graph of ops, so that every call brings the banks up to date for it."""
        call = self._active_call()
        # dynamo reads .grad of every input, and hides the warning unless warnings are errors
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", module=r"torch\.")
        with self._lock:
            if not self._runs_ops and call is not None:
                self._runs_ops = True
                self._sync(call.plan)
        return True

    @torch._dynamo.assume_constant_result
    def arm_kernels(self, key: str, device: str) -> bool:
        """Record that a graph of kernels reads this bank on this device."""
        call = self._active_call()
        with self._lock:
            if call is not None:
                place = torch.device(device)
                bank = next(bank for bank in self.banks if bank.key == key)
                bank.tables(call.plan.adapters, place, call.plan.slots)
                is_fixed = self.captures.of_users and bank in self._tables
                self.captures.extend(bank, call.plan.adapters, place, is_fixed)
                for table in bank.graph_tables:
                    torch._dynamo.mark_static_address(table.rows)
                if self._tables.add(bank, place):
                    self.forget()
                self._buffers.is_compiled = True
                self.prepare(call, place, is_long=True)  # or later, whatever the input's size is now
        return True

    def prepare(self, call: Call, device: torch.device, is_long: bool = False) -> None:
        """Write the plan of a call to the fixed address on a device, for the current stream and this kind of input."""
        with self._lock:
            if str(device) not in self.buffers:
                self._buffers.grow(device, call.plan.segments.num_entries, self.components)
                self._written = None
            self._buffers.has_long |= is_long
            if self._written is call.plan or call.for_graphs or not self.contended:
                self._write(call)
            if self.contended:  # the calling layer writes rows to the tables itself
                self._tables.forget()

    def fixed(
        self, call: Call, bank: Bank, device: torch.device, is_capturing: bool, is_long: bool = False
    ) -> tuple[list[Tensor], tuple[TableRows, ...]]:
        """Plans and tables at fixed addresses, for kernels that are being captured in a CUDA graph or will be next.

        Raises:
            ModelStateError: they don't exist yet, and can't be made during a capture.
        """
        plan = call.plan
        if not is_capturing:
            self.prepare(call, device, is_long)
            if not bank.has_rows(plan.adapters, device, plan.slots):
                bank.tables(plan.adapters, device, plan.slots)
        # the plan of a continuous batching step stays until the step ends, whichever calls begin in between
        elif (
            self._written is not plan
            or (self.contended and not call.for_graphs)
            or not bank.has_rows(plan.adapters, device, plan.slots)
        ):
            raise ModelStateError(
                "a CUDA graph is being captured with adapter_ids that no call has run with, or while ids are active "
                "on another thread: expected a call of the model before the capture. Run it once on the same inputs, "
                "inside the same mb.batch(...)."
            )
        with self._lock:
            captured = self.captures if call.for_graphs else self.captures.of_users
            self.captures.extend(bank, plan.adapters, device, bool(captured and bank in self._tables), is_capturing)
            if self._tables.add(bank, device):
                self.forget()
            buffers = self.buffers[str(device)]
            is_long &= self._buffers.is_complete  # not if no call has had a long input before the capture
            self.captures.note(is_users=is_capturing and not call.for_graphs, components=len(buffers))
        return [(each.long if is_long else each.short).packed for each in buffers], bank.graph_tables

    def enter(self, call: Call) -> None:
        """Begin a call.

        Raises:
            NotEnabledError: the model was disabled in the meantime.
        """
        self._exclusively(functools.partial(self._enter, call))

    def _enter(self, call: Call) -> None:
        if self._is_closed:
            raise NotEnabledError(
                "the model was disabled while a call with ids began: expected it to stay enabled. Call "
                "peft_multibatch.enable(model) again."
            )
        call.thread, call.task = self.here.thread, current_task()
        self._calls[call] = None
        self._change(call.thread)
        if self.contended and self.captures.of_users and not call.is_media:
            self._tables.bring_up_to_date(call.plan, self.captures)  # refused now, not when the other call ends
        self._sync(call.plan)

    def leave(self, call: Call) -> None:
        """End a call, and make the one around it active again. Does nothing if the call has ended already."""
        if call in self._calls:
            self._exclusively(functools.partial(self._leave, call))
            self.sibling_outputs.clear()

    def _leave(self, call: Call) -> None:
        self._calls.pop(call, None)
        if call.outer is not None and call.outer.plan is not call.plan:
            self.plans.add_(1)
        if call.thread is not None:
            with contextlib.suppress(ModelStateError):  # of a call that continues, whose layers raise it when they run
                self._change(call.thread)
        if call.outer in self._innermost:
            self._sync(call.outer.plan)

    def drop_ended(self, _: object = None) -> None:
        """End calls whose blocks were left without ``__exit__``, as after Ctrl-C."""
        for call in [call for call in list(self._calls) if not call.is_active]:
            self.leave(call)

    def close(self) -> list[Call]:
        """Refuse new calls from now on, unless calls are active; returns these."""
        with self._lock:
            calls = [call for call in self._calls if call.is_active]
            self._is_closed = not calls
        return calls

    def expect(self, components: int) -> None:
        """Make room for mixtures of this many adapters."""
        with self._lock:
            self.components = max(self.components, components)

    def forget(self, is_changed: bool = True) -> None:
        """Drop what was prepared for graphs, and free its memory. Tables are checked again if anything changed."""
        with self._lock:
            if is_changed:
                self._tables.forget()
            self._synced = None
            self._positions.forget(self._in_use(), self.banks)
            self._written = self._written if self.active else None

    def plan(self, shape: Sequence[int], index: int, trains: bool) -> Tensor:
        """The packed plan of a component on the current thread, for an input of shape ``[..., K]``, padded with zeros.

        Raises:
            ModelStateError: no call is active on the thread.
            RowMappingError: the number of rows isn't a multiple of the entries.
            UnsupportedError: a CUDA graph is being captured.
        """
        call = self._active_call()
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                "a CUDA graph is being captured of a compiled model on the torch backend, which reads its plan on the "
                "host: expected the triton backend, without gradients. Pass backend='auto' to enable, and capture "
                "under torch.no_grad()."
            )
        if call is None:
            raise ModelStateError(
                "a compiled model was called without ids on one thread while ids are active on another, or backward "
                "recomputes layers after their mb.batch block has ended: expected no overlap of calls with and "
                "without ids of one compiled model. Pass ids of -1 instead of none, make the calls one after the "
                "other, and run backward inside mb.batch(...)."
            )
        self._note(call, trains)
        call.num_rows(shape)
        rows = math.prod(shape[:-1])
        if rows and index < len(call.plan.components):
            packed = self._positions.packed(call.plan)[index]
        else:
            packed = Segments.from_ids([BASE] * min(call.plan.segments.num_entries, rows)).pack()
        return torch.nn.functional.pad(packed, (0, packed_size(rows) - packed.numel()))

    def _exclusively(self, change: Callable[[], None]) -> None:
        """Change attributes that compiled code depends on, once no other thread is compiling.

        Dynamo reads a value when it traces, and again when it writes the guard for the graph. The locks aren't held
        by a context manager written in Python, because an exception could keep it from releasing them.
        """
        while True:
            is_traced = self.is_traced
            with compile_lock if is_traced else self._lock, self._lock:  # in this order: tracing calls `arm`
                if is_traced is self.is_traced:
                    return change()

    def _change(self, thread: ThreadState) -> None:
        """Update attributes after a call of a thread began or ended."""
        active = [call for call in self._calls if call.is_active]
        around = {(call.outer, call.thread, call.task) for call in active}
        calls = self._innermost = [call for call in active if (call, call.thread, call.task) not in around]
        samples = [0 if call.expands else call.plan.segments.num_entries for call in calls if call.thread is thread]
        self.contended = any(call.plan is not calls[0].plan for call in calls)
        self.components = max([self.components, *(len(call.plan.components) for call in calls)])
        self._look_apart(calls)
        thread.samples = samples[0] if len(set(samples)) == 1 else 0
        thread.active, self.active = bool(samples), bool(calls)
        if calls and not self.contended and self._tables and not calls[0].is_media:  # which no graph runs
            self._write(calls[0])

    def _look_apart(self, calls: Sequence[Call]) -> None:
        if self.is_traced:
            self.apart = next(filter(None, (call.plan.why_not_compiled(self.banks) for call in calls)), "")
            self.no_kernels = next(filter(None, (self.captures.why_no_kernels(call.plan) for call in calls)), "")

    def _in_use(self) -> list[AnyAdapter]:
        return list(dict.fromkeys(each for call in self._calls for each in call.plan.adapters.values()))

    def _sync(self, plan: BatchPlan) -> None:
        """Bring what graphs of ops read up to date for a plan; gradients go to the adapters of the active calls."""
        if not self._runs_ops:
            return
        live = {*plan.adapters.values(), *(each for call in self._innermost for each in call.plan.adapters.values())}
        is_trained = [each for bank in self.banks for each in bank.trained(live)] if torch.is_grad_enabled() else []
        known = self._synced
        if known is None or known[0] is not plan or known[1] != live or (is_trained and known[2] != is_trained):
            self.plans.add_(1)
            self._positions.fill([*self._in_use(), *plan.adapters.values()], live, self.banks)
            self._synced = plan, live, is_trained

    def _write(self, call: Call) -> None:
        """Write the plan of a call to the fixed address, for the current streams."""
        with self._lock:
            if self._written is not call.plan:
                self._tables.bring_up_to_date(call.plan, self.captures)
                self._buffers.write(call.plan, self.components)
                self._written = call.plan
            self._buffers.complete(call)
            self._buffers.follow()

    def outgrown_by(self, plan: BatchPlan) -> bool:
        """Whether the captured graphs of continuous batching can't run a plan."""
        captures = self.captures
        with self._lock:
            return captures.of_steps and (
                captures.are_outdated
                or captures.lacks_components(plan, is_users=False)
                or captures.missing(plan, is_users=False) is not None
                or self._tables.are_outgrown_by(plan)
            )

    def keep(self, memory: list[Tensor]) -> None:
        """As ``Captures.keep``."""
        with self._lock:
            self.captures.keep(memory)

    def discard_captures(self) -> None:
        """As ``Captures.discard``."""
        with self._lock:
            self.captures.discard()
