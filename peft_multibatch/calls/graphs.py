"""What compiled and captured code sees of the active call: plans at fixed places, and whether there is one."""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo.convert_frame import compile_lock

from peft_multibatch.calls.batch_plan import BatchPlan
from peft_multibatch.calls.buffers import PlanBuffers
from peft_multibatch.calls.call import Call
from peft_multibatch.calls.graph_tables import GraphTables
from peft_multibatch.calls.positions import Positions
from peft_multibatch.calls.take_plan import number
from peft_multibatch.calls.threads import PerThread, ThreadState, current_task
from peft_multibatch.errors import ModelStateError, NotEnabledError, UnsupportedError
from peft_multibatch.plan.segments import BASE, Segments, packed_size


if TYPE_CHECKING:
    from peft_multibatch.adapters.adapter import AnyAdapter
    from peft_multibatch.adapters.bank import Bank
    from peft_multibatch.adapters.tables import TableRows


class Graph:
    """What compiled and captured code sees instead of a ``Call``.

    Attributes:
        key: tells ``take_plan`` which graph asks.
        active: whether a call is active on any thread; compiled code has one version for each value.
        here: whether one is on the thread that asks.
        contended: whether calls with different plans are active at the same time, on several threads or tasks, so that
            no single plan can stand at the fixed place.
        apart: why compiled code can't run the active calls: some adapter runs PEFT's own modules. Or the empty string.
        components: plans that graphs read one after the other, as many as a sample of any call had adapters.
        plans: how many were active so far, a tensor on the CPU. Graphs of ops that compute anew in ``backward`` keep
            it, and autograd raises where that would be under another plan.
        buffers: plans at fixed places for kernels, by their device, one for each component.
        sibling_outputs: as in ``Call``; filled and emptied within one graph.
        banks: all banks of the model.
        is_captured: whether a CUDA graph was captured that reads them.
        is_traced: whether code was compiled that reads attributes from here.
        packed: as in ``Call``; never so.
        base_layers: as in ``Call``; never any.

    Args:
        active_call: gives the active call for the thread or task that asks, and raises where it has ended.
        note: told of a call under which compiled code runs, and whether it was compiled with gradients.
    """

    packed = False
    base_layers: frozenset = frozenset()

    def __init__(self, active_call: Callable[[], Call | None], note: Callable[[Call, bool], None]) -> None:
        self.key = number(self)
        self.active = False
        self.here = PerThread()
        self.contended = False
        self.apart = ""
        self.components = 1
        with torch.inference_mode(False):
            self.plans = torch.zeros((), dtype=torch.int32, device="cpu")
        self._buffers = PlanBuffers()
        self.buffers = self._buffers.by_device
        self.sibling_outputs: dict[Any, tuple[Tensor, int, list[Tensor | None]]] = {}
        self.banks: list[Bank] = []
        self._active_call, self._note = active_call, note
        self._calls: dict[Call, None] = {}  # that are active
        self._is_closed = False
        self._innermost: list[Call] = []  # of those that are nested
        self._synced: tuple[BatchPlan, set[AnyAdapter], list[bool]] | None = None  # for whom, and what of it trains
        self._positions = Positions()  # which graphs of ops read
        self._written: BatchPlan | None = None
        self.is_traced = self._runs_ops = False
        self._tables = GraphTables()
        self.is_captured = False
        self._lock = threading.RLock()

    @torch._dynamo.assume_constant_result  # runs while the graph is traced, and is no part of it
    def trace(self) -> bool:
        """Code is being compiled that reads attributes from here."""
        with self._lock:
            if not self.is_traced:
                self.is_traced = True
                self._look_apart([call for call in self._calls if call.is_active])
        return True

    @torch._dynamo.assume_constant_result
    def arm(self) -> bool:
        """From now on there is a graph of ops: keep the banks up to date for it at every call."""
        call = self._active_call()
        # dynamo looks at .grad of every input, and hides the warning about it, but not where warnings are errors
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", module=r"torch\.")
        with self._lock:
            if not self._runs_ops and call is not None:
                self._runs_ops = True
                self._sync(call.plan)
        return True

    @torch._dynamo.assume_constant_result
    def arm_kernels(self, key: str, device: str) -> bool:
        """From now on there is a graph of kernels that reads this bank on this device."""
        call = self._active_call()
        with self._lock:
            if call is not None:
                place = torch.device(device)
                bank = next(bank for bank in self.banks if bank.key == key)
                bank.tables(call.plan.adapters, place, call.plan.slots)
                bank.extend_for_graphs(call.plan.adapters, place, self.is_captured and bank in self._tables)
                for table in bank.graph_tables:
                    torch._dynamo.mark_static_address(table.rows)
                if self._tables.add(bank, place):
                    self.forget()
                self.prepare(call, place)
        return True

    def prepare(self, call: Call, device: torch.device) -> None:
        """Have the plan of a call at the fixed place, on a device on which kernels run, for what its stream does."""
        with self._lock:
            if str(device) not in self.buffers:
                self._buffers.grow(device, call.plan.segments.num_entries, self.components)
                self._written = None
            if self._written is call.plan or call.for_graphs or not self.contended:
                self._write(call.plan)
            if self.contended:  # the layer that asks will write rows by itself
                self._tables.forget()

    def fixed(
        self, call: Call, bank: Bank, device: torch.device, is_capturing: bool
    ) -> tuple[list[Tensor], tuple[TableRows, ...]]:
        """Plans and tables that stay, for kernels that are being captured in a CUDA graph or will be right after.

        Raises:
            ModelStateError: they would have to be made first, and during a capture nothing can be.
        """
        plan = call.plan
        if not is_capturing:
            self.prepare(call, device)
            if not bank.has_rows(plan.adapters, device, plan.slots):
                bank.tables(plan.adapters, device, plan.slots)
        # the plan of a step of continuous batching stays until it ends, whoever comes in between
        elif (
            self._written is not plan
            or (self.contended and not call.for_graphs)
            or not bank.has_rows(plan.adapters, device, plan.slots)
        ):
            raise ModelStateError(
                "a CUDA graph is being captured under ids that no call ran with before, or while another thread has "
                "ids in force: expected a call of the model on the same inputs first, inside the same mb.batch(...)."
            )
        with self._lock:
            bank.extend_for_graphs(plan.adapters, device, self.is_captured and bank in self._tables, is_capturing)
            if self._tables.add(bank, device):
                self.forget()
            self.is_captured = True
        return [buffer.packed for buffer in self.buffers[str(device)]], bank.graph_tables

    def enter(self, call: Call) -> None:
        """A call begins.

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
        self._sync(call.plan)

    def leave(self, call: Call) -> None:
        """A call ended, and the one around it is active again. Does nothing the second time."""
        if call in self._calls:
            self._exclusively(functools.partial(self._leave, call))
            self.sibling_outputs.clear()

    def _leave(self, call: Call) -> None:
        if call.outer is not None and call.outer.plan is not call.plan:
            self.plans.add_(1)
        if call.thread is not None:
            self._change(call.thread)
        self._calls.pop(call, None)
        if call.outer in self._innermost:
            self._sync(call.outer.plan)

    def drop_ended(self, _: object = None) -> None:
        """An exception, such as Ctrl-C's, may have kept a call from being left."""
        for call in [call for call in list(self._calls) if not call.is_active]:
            self.leave(call)

    def close(self) -> list[Call]:
        """Let no more calls begin, unless some are active, which are returned."""
        with self._lock:
            calls = [call for call in self._calls if call.is_active]
            self._is_closed = not calls
        return calls

    def expect(self, components: int) -> None:
        """Have room for mixtures of this many adapters."""
        with self._lock:
            self.components = max(self.components, components)

    def forget(self) -> None:
        """Let go of what graphs are known to have, and of its memory; it is asked again before it is read."""
        with self._lock:
            self._tables.forget()
            self._synced = None
            self._positions.forget(self._in_use(), self.banks)
            if not self.active:
                self._written = None

    def plan(self, shape: Sequence[int], index: int, trains: bool) -> Tensor:
        """A plan of the thread that asks, of one component, for rows of the shape ``[..., K]``, with zeros behind it.

        Raises:
            ModelStateError: the thread has no ids.
            RowMappingError: the rows are no multiple of the entries.
        """
        call = self._active_call()
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                "a CUDA graph is being captured of a compiled model that runs on torch's products, which ask for "
                "their plan on the host: expected the kernels, without gradients. Pass backend='auto' to enable, and "
                "capture under torch.no_grad()."
            )
        if call is None:
            raise ModelStateError(
                "a compiled model was called without ids on one thread while ids are in force on another, or backward "
                "computes again what ran under ids that have ended: expected that calls with and without ids of one "
                "compiled model don't overlap. Pass ids of -1 instead of none, run the calls after each other, and "
                "backward inside mb.batch(...)."
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
        """Change what code is compiled for, and wait for what is being compiled on another thread.

        Dynamo reads a value once when it traces, and again when it writes the guard that decides who runs the graph.
        No context manager written in Python holds the locks, which an exception might keep from letting go of them.
        """
        while True:
            is_traced = self.is_traced
            with compile_lock if is_traced else self._lock, self._lock:  # in this order: tracing calls `arm`
                if is_traced is self.is_traced:
                    return change()

    def _change(self, thread: ThreadState) -> None:
        """Calls of a thread began or ended."""
        active = [call for call in self._calls if call.is_active]
        around = {(call.outer, call.thread, call.task) for call in active}
        # of those that are nested on one task the innermost
        calls = [call for call in active if (call, call.thread, call.task) not in around]
        samples = [0 if call.expands else call.plan.segments.num_entries for call in calls if call.thread is thread]
        self._innermost = calls
        self.contended = any(call.plan is not calls[0].plan for call in calls)
        self.components = max([self.components, *(len(call.plan.components) for call in calls)])
        self._look_apart(calls)
        thread.samples = samples[0] if len(set(samples)) == 1 else 0
        thread.active = bool(samples)
        self.active = bool(calls)
        if calls and not self.contended and self._tables:
            self._write(calls[0].plan)

    def _look_apart(self, calls: Iterable[Call]) -> None:
        if self.is_traced:
            found = (call.plan.why_not_compiled(self.banks) for call in calls)
            self.apart = next(filter(None, found), "")

    def _in_use(self) -> list[AnyAdapter]:
        return list(dict.fromkeys(each for call in self._calls for each in call.plan.adapters.values()))

    def _sync(self, plan: BatchPlan) -> None:
        """Have what graphs of ops read as a plan needs it; gradients go to the adapters that code may run under."""
        if not self._runs_ops:
            return
        live = {*plan.adapters.values(), *(each for call in self._innermost for each in call.plan.adapters.values())}
        is_trained = [each for bank in self.banks for each in bank.trained(live)] if torch.is_grad_enabled() else []
        known = self._synced
        if known is None or known[0] is not plan or known[1] != live or (is_trained and known[2] != is_trained):
            self.plans.add_(1)
            self._positions.fill([*self._in_use(), *plan.adapters.values()], live, self.banks)
            self._synced = plan, live, is_trained

    def _write(self, plan: BatchPlan) -> None:
        """Have a plan at the fixed place, for what runs next on the current streams."""
        with self._lock:
            if self._written is not plan:
                with torch.inference_mode(False), torch.no_grad():
                    self._tables.bring_up_to_date(plan, self.is_captured)
                    self._buffers.write(plan, self.components, self.is_captured)
                self._written = plan
            self._buffers.follow()

    def outgrown_by(self, plan: BatchPlan) -> bool:
        """Whether graphs were captured that can't run a plan."""
        with self._lock:
            return self.is_captured and self._tables.are_outgrown_by(plan)
