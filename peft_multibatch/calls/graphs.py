"""What compiled and captured code sees of the call in force: plans at fixed places, and whether there is one."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._dynamo.convert_frame import compile_lock

from peft_multibatch.calls.call import Call
from peft_multibatch.calls.in_force import Here, InForce, current_task
from peft_multibatch.calls.mix import Mix
from peft_multibatch.errors import ModelStateError, UnsupportedError
from peft_multibatch.plan.segments import BASE, CUT, SegmentBuffer, Segments, capacity_for, packed_size


if TYPE_CHECKING:
    from peft_multibatch.adapters.bank import Bank
    from peft_multibatch.adapters.tables import TableRows
    from peft_multibatch.adapters.weights import Adapter


class Graph:
    """What compiled and captured code sees instead of a ``Call``.

    Attributes:
        key: tells ``take_plan`` which graph asks.
        active: whether ids are in force on any thread; compiled code has one version for each value.
        here: whether they are on the thread that asks.
        contended: whether calls with different ids are in force at the same time, on several threads or tasks, so that
            no single plan can stand at the fixed place.
        terms: plans that graphs read one after the other, as many as a sample of any call had adapters.
        mixes: how many were in force so far, a tensor on the CPU. Graphs of ops that compute anew in ``backward`` keep
            it, and autograd raises where that would be under another mix.
        buffers: plans at fixed places for kernels, by their device, one for each term.
        stash: as in ``Call``; filled and emptied within one graph.
        banks: all banks of the model.
        is_captured: whether a CUDA graph was captured that reads them.
        packed: as in ``Call``; never so.

    Args:
        call: the call in force on the thread or task that asks.
        in_force: the same, and raises where that call has ended.
        adapters: adapters as PEFT holds them now, by slot, as ``Router.adapters``.
    """

    packed = False

    def __init__(
        self,
        call: ContextVar[Call | None],
        in_force: Callable[[], Call | None],
        adapters: Callable[..., dict[int, Adapter]],
    ) -> None:
        self.key = next(_keys)
        _graphs[self.key] = self
        self.active = False
        self.here = Here()
        self.contended = False
        self.terms = 1
        with torch.inference_mode(False):
            self.mixes = torch.zeros((), dtype=torch.int32, device="cpu")
        self.buffers: dict[str, list[SegmentBuffer]] = {}
        self.stash: dict[Any, tuple[Tensor, int, list[Tensor | None]]] = {}
        self.banks: list[Bank] = []
        self._call = call
        self._call_in_force = in_force
        self._read_adapters = adapters
        self._in_force: dict[Call, Call | None] = {}  # and the calls around them
        self._synced: Mix | None = None
        self._written: Mix | None = None
        self._is_traced = False
        self._runs_ops = False
        self._held: dict[Bank, torch.device] = {}  # whose tables graphs of kernels read
        self._ready: tuple[int, dict[int, Adapter]] = 0, {}  # slots, and adapters that all of these tables have
        self._streams: dict[torch.device, torch.cuda.Stream] = {}  # on which the last plan was written
        self._outgrown: list[list[SegmentBuffer]] = []  # which captured graphs may still read
        self.is_captured = False
        self._lock = threading.RLock()

    @torch._dynamo.assume_constant_result  # runs while the graph is traced, and is no part of it
    def trace(self) -> bool:
        """Code is being compiled that reads attributes from here."""
        with self._lock:
            self._is_traced = True
        return True

    @torch._dynamo.assume_constant_result
    def arm(self) -> bool:
        """From now on there is a graph of ops: keep the banks up to date for it at every call."""
        call = self._call.get()
        with self._lock:
            if not self._runs_ops and call is not None:
                self._runs_ops = True
                self._sync(call.mix)
        return True

    @torch._dynamo.assume_constant_result
    def arm_kernels(self, key: str, device: str) -> bool:
        """From now on there is a graph of kernels that reads this bank on this device."""
        call = self._call.get()
        with self._lock:
            if call is not None:
                place = torch.device(device)
                bank = next(bank for bank in self.banks if bank.key == key)
                adapters = self._read_adapters()
                bank.tables(adapters, place, call.mix.slots)
                bank.hold(adapters, place, self._is_captured_with(bank))
                for table in bank.held:
                    torch._dynamo.mark_static_address(table.rows)
                self._hold(bank, place)
                self.prepare(call, place)
        return True

    def prepare(self, call: Call, device: torch.device) -> None:
        """Have the plan of a call at the fixed place, on a device on which kernels run."""
        with self._lock:
            if str(device) not in self.buffers:
                self._grow(device, call.mix.segments.num_entries)
                self._written = None
            if self._written is not call.mix and (call.for_graphs or not self.contended):
                self._write(call.mix)
            if self.contended:  # the layer that asks will write rows by itself
                self.forget()

    def fixed(
        self, call: Call, bank: Bank, device: torch.device, is_capturing: bool
    ) -> tuple[list[Tensor], tuple[TableRows, ...]]:
        """Plans and tables that stay, for kernels that are being captured in a CUDA graph or will be right after.

        Raises:
            ModelStateError: they would have to be made first, and during a capture nothing can be.
        """
        mix = call.mix
        if not is_capturing:
            self.prepare(call, device)
            if not bank.has_rows(mix.adapters, device, mix.slots):
                bank.tables(mix.adapters, device, mix.slots)
        # the plan of a step of continuous batching stays until it ends, whoever comes in between
        elif (
            self._written is not mix
            or (self.contended and not call.for_graphs)
            or not bank.has_rows(mix.adapters, device, mix.slots)
        ):
            raise ModelStateError(
                "a CUDA graph is being captured under ids that no call ran with before, or while another thread has "
                "ids in force: expected a call of the model on the same inputs first, inside the same mb.batch(...)."
            )
        with self._lock:
            # compared when the first graph is captured, whose ranks have to suffice for all; then no more
            adapters = self._read_adapters(checks=0 if self.is_captured else None)
            bank.hold(adapters, device, self._is_captured_with(bank))
            self._hold(bank, device)
            self.is_captured = True
        return [buffer.packed for buffer in self.buffers[str(device)]], bank.held

    def enter(self, call: Call, outer: Call | None) -> None:
        """A call begins, inside another one or not."""
        with self._changing():
            call.thread, call.task = self.here.thread, current_task()
            self._in_force[call] = outer
            self._change(call.thread)
            if self._runs_ops and self._synced is not call.mix:
                self._sync(call.mix)

    def leave(self, call: Call) -> None:
        """A call ends, and one around it is in force again."""
        with self._changing():
            call.ended = True
            outer = self._in_force.pop(call, None)
            if outer is not None and outer.mix is not call.mix:
                self.mixes.add_(1)
            if call.thread is not None:
                self._change(call.thread)
        self.stash.clear()

    def expect(self, terms: int) -> None:
        """Have room for mixtures of this many adapters."""
        with self._changing():
            self.terms = max(self.terms, terms)

    def forget(self) -> None:
        """Let go of what tables are known to have, and of its memory; they are asked again before they are read."""
        self._ready = 0, {}

    def plan(self, shape: Sequence[int], index: int) -> Tensor:
        """A plan of the thread that asks, that of one term, for rows of the shape ``[..., K]``, with zeros behind it.

        Raises:
            ModelStateError: the thread has no ids.
            RowMappingError: the rows are no multiple of the entries.
        """
        call = self._call_in_force()
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
        call.num_rows(shape)
        rows = math.prod(shape[:-1])
        if rows and index < len(call.mix.terms):
            packed = call.mix.plans(torch.device("cpu"))[index]
        else:
            packed = Segments.from_ids([BASE] * min(call.mix.segments.num_entries, rows)).pack()
        return torch.nn.functional.pad(packed, (0, packed_size(rows) - packed.numel()))

    def _is_captured_with(self, bank: Bank) -> bool:
        return self.is_captured and bank in self._held

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change what code is compiled for, and wait for what is being compiled on another thread.

        Dynamo reads a value once when it traces, and again when it writes the guard that decides who runs the graph.
        """
        with self._lock:
            if not self._is_traced:
                yield
                return
        with compile_lock, self._lock:  # in this order, because tracing calls `arm`
            yield

    def _change(self, thread: InForce) -> None:
        """Calls of a thread began or ended."""
        around = {(outer, call.thread, call.task) for call, outer in self._in_force.items()}
        # of those that are nested on one task the innermost
        calls = [call for call in self._in_force if (call, call.thread, call.task) not in around]
        self.active = bool(calls)
        self.contended = any(call.mix is not calls[0].mix for call in calls)
        self.terms = max([self.terms, *(len(call.mix.terms) for call in calls)])
        samples = [0 if call.expands else call.mix.segments.num_entries for call in calls if call.thread is thread]
        thread.active = bool(samples)
        thread.samples = samples[0] if len(set(samples)) == 1 else 0
        if calls and not self.contended and self._held and self._written is not calls[0].mix:
            self._write(calls[0].mix)

    def _sync(self, mix: Mix) -> None:
        adapters = self._read_adapters()
        self.mixes.add_(1)
        # normal tensors even if the first call happens to run in inference mode
        with torch.inference_mode(False), torch.no_grad():
            for bank in self.banks:
                bank.sync([adapters.get(slot) for slot in range(mix.slots)])
        self._synced = mix

    def _write(self, mix: Mix) -> None:
        entries = mix.segments.num_entries
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for device in map(torch.device, self.buffers):
                self._follow(device)
            self._make_ready(mix)
            for buffers in list(self.buffers.values()):
                if self.is_captured and len(mix.terms) > len(buffers):
                    raise ModelStateError(
                        f"a CUDA graph was captured under ids that gave a sample {len(buffers)} adapters at most, and "
                        f"now a mixture has {len(mix.terms)}: expected mixtures as long as those that were in force "
                        "when it was captured. Call disable and enable, and capture it again."
                    )
                if entries > buffers[0].capacity or len(mix.terms) > len(buffers):
                    self._outgrown.append(buffers)
                    self._grow(buffers[0].packed.device, max(entries, buffers[0].capacity))
            for buffers in (*self.buffers.values(), *self._outgrown):
                if entries <= buffers[0].capacity:
                    for index, buffer in enumerate(buffers):
                        buffer.update(mix.term(index).cut(CUT))
            self._written = mix

    def _follow(self, device: torch.device) -> None:
        """Write after what reads the last plan, which calls of other threads may have left running on their stream."""
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            last = self._streams.get(device, stream)
            if last != stream:
                stream.wait_stream(last)
            self._streams[device] = stream

    def _make_ready(self, mix: Mix) -> None:
        """Have the adapters of a mix in all tables that graphs read."""
        slots, ready = self._ready
        if slots == mix.slots and mix.adapters.items() <= ready.items():
            return
        self.forget()  # until all of them are known to have these
        is_same = slots == mix.slots
        for bank, device in self._held.items():
            if not bank.has_rows(mix.adapters, device, mix.slots):
                bank.tables(mix.adapters, device, mix.slots)
                is_same = False
            if bank.hold(mix.adapters, device, self.is_captured):
                for table in bank.held:
                    torch._dynamo.mark_static_address(table.rows)
        self._ready = mix.slots, {**ready, **mix.adapters} if is_same else dict(mix.adapters)

    def _hold(self, bank: Bank, device: torch.device) -> None:
        """Keep a bank's tables as graphs need them from now on."""
        if self._held.get(bank) != device:
            self._held[bank] = device
            self.forget()

    def _grow(self, device: torch.device, entries: int) -> None:
        with torch.inference_mode(False):
            buffers = [SegmentBuffer(capacity_for(entries), device) for _ in range(self.terms)]
        self.buffers[str(device)] = buffers
        for buffer in buffers:
            torch._dynamo.mark_static_address(buffer.packed)


_keys = itertools.count()
_graphs: WeakValueDictionary[int, Graph] = WeakValueDictionary()


# like a random number, and unlike what follows from its arguments, a plan is no constant
@torch.library.custom_op("peft_multibatch::take_plan", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def take_plan(mixes: Tensor, shape: Sequence[int], key: int, index: int) -> Tensor:
    """The packed plan of the call that runs the graph, that of one term: int32, long enough for any plan.

    Args:
        mixes: of the graph.
        shape: of a layer's input ``[..., K]``, which has at least a row for each entry of a plan, or none at all.
        key: of the graph.
        index: of the term.
    """
    return _graphs[key].plan(shape, index)


@take_plan.register_fake
def _(mixes, shape, key, index):
    return mixes.new_empty(packed_size(math.prod(shape[:-1])))
