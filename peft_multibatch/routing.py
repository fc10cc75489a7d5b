"""Which plan is in force: ids travel beside a call, never through the model's arguments.

Every thread and every asyncio task has its own call, so that two with different ids don't meet. What a compiled graph
fixes is only that ids are in force at all. Graphs of ops ask for the plan when they run; graphs of kernels, which may
be captured and then run no host code, read it at a fixed place that is written when a call begins.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from peft_multibatch.bank import Adapter
from peft_multibatch.errors import ModelStateError, RowMappingError, UnsupportedError
from peft_multibatch.ids import Entry, slots_of, terms
from peft_multibatch.segments import BASE, SegmentBuffer, Segments


if TYPE_CHECKING:
    from peft_multibatch.bank import Bank, TableRows
    from peft_multibatch.ops.torch_backend import SlotWeights


class Mix:
    """Who serves which sample, the adapters in use, and what was made from both.

    Calls with the same ids share one for as long as PEFT holds the same weights, so that a decode step makes nothing
    anew.

    Attributes:
        ids: what every sample runs under, as it was asked for.
        terms: a plan for every adapter that a sample may have: one, and more where samples have mixtures.
        segments: the first of them.
        adapters: those in use, by slot.
        slots: how many slots there are, in use or not.
        mixed: those that are part of a mixture.
        products: for each bank what the backend for kernels prepared.
    """

    def __init__(self, ids: Sequence[Entry], adapters: dict[int, Adapter], slots: int) -> None:
        self.ids = ids
        with torch.inference_mode(False):  # kept for other calls, which may want gradients
            self.terms = [Segments.from_ids(slots, weights=weights) for slots, weights in terms(ids)]
        self.segments = self.terms[0]
        self.adapters = adapters
        self.slots = slots
        self.products: dict[Bank, Any] = {}
        self._weights: dict[Bank, dict[int, SlotWeights]] = {}
        self._tables: dict[tuple[Bank, torch.device], tuple[TableRows, ...]] = {}
        self._plans: dict[torch.device, list[Tensor]] = {}
        self._dense_plans: list[Tensor] | None = None
        self._index = {slot: position for position, slot in enumerate(adapters)}
        self._positions: dict[torch.device, Tensor] = {}
        self._kinds = list(dict.fromkeys(ids))
        self.mixed = {slot for entry in self._kinds if isinstance(entry, tuple) for slot in slots_of(entry)}

    def weights(self, bank: Bank) -> dict[int, SlotWeights]:
        """Weights for torch's products."""
        found = self._weights.get(bank)
        if found is None:
            found = self._weights[bank] = {slot: bank.weights(adapter) for slot, adapter in self.adapters.items()}
        return found

    def trains(self, bank: Bank) -> bool:
        """Whether any weight in use wants a gradient."""
        return any(
            part.lora_a.requires_grad or part.lora_b.requires_grad
            for adapter in self.adapters.values()
            for part in adapter.parts(bank.layers)
            if part
        )

    def plans(self, device: torch.device) -> list[Tensor]:
        """The packed plans on a device."""
        found = self._plans.get(device)
        if found is None:
            with torch.inference_mode(False):
                found = self._plans[device] = [term.pack().to(device, non_blocking=True) for term in self.terms]
        return found

    def positions(self, device: torch.device) -> Tensor:
        """int64 ``[E]``: where each entry's adapter stands among those in use, ``-1`` for the base model alone.

        Mixtures have ``-1`` as well.
        """
        found = self._positions.get(device)
        if found is None:
            positions = [BASE if isinstance(entry, tuple) else self._index.get(entry, BASE) for entry in self.ids]
            with torch.inference_mode(False):
                found = self._positions[device] = torch.tensor(positions, device=device)
        return found

    @cached_property
    def runs(self) -> tuple[Segments, list[Entry]]:
        """A plan that keeps mixtures whole, for layers that run them whole, and what its slots stand for."""
        slots = {entry: slot for slot, entry in enumerate(self._kinds)}
        with torch.inference_mode(False):
            return Segments.from_ids([slots[entry] for entry in self.ids]), self._kinds

    def tables(self, bank: Bank, device: torch.device) -> tuple[TableRows, ...]:
        """Tables for kernels, one for each dtype."""
        found = self._tables.get((bank, device))
        if found is None:
            found = self._tables[bank, device] = bank.tables(self.adapters, device, self.slots)
        return found

    def has_tables(self, bank: Bank, device: torch.device) -> bool:
        """Whether ``tables`` would only look them up."""
        return (bank, device) in self._tables

    def op_inputs(self, bank: Bank) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
        """Plans, ``lora_A``, ``lora_B``, ranks and scalings of the adapters in use and of no other, for the ops."""
        with torch.inference_mode(False):  # autograd will save them
            if self._dense_plans is None:
                self._dense_plans = [
                    Segments.from_ids([self._index.get(slot, BASE) for slot in slots], weights=weights).pack()
                    for slots, weights in terms(self.ids)
                ]
            return self._dense_plans, *bank.gather(self.adapters.values())


class Invocations:
    """Where aLoRA adapters begin in each sample, counted from its end, as PEFT counts when a call begins.

    Args:
        offsets: for each sample the number of tokens from its invocation on; None where there is none.
        tokens: length of the samples.
        expands: True for ``generate``, whose steps are checked against what the offsets mean.
    """

    def __init__(self, offsets: Sequence[int | None], tokens: int, expands: bool) -> None:
        self.offsets = offsets
        self.tokens = tokens  # of the forward under way
        self._total = 0 if expands else None  # tokens that the model has seen; None outside of generate
        self._prompt = tokens

    def step(self, tokens: int, before: int) -> None:
        """A forward inside ``generate`` begins: the whole prompt first, then one token after the other.

        Raises:
            UnsupportedError: it isn't, and offsets from the end would point elsewhere.
        """
        if self._total is None:
            return
        first = self._total == 0
        if before + tokens != (self._prompt if first else self._total + 1) or not (first or tokens == 1):
            raise UnsupportedError(
                "generate with an aLoRA adapter ran the model on other tokens than the prompt and then one at a time, "
                "and aLoRA counts tokens from the prompt's end: expected a cache, and no chunked prefill, guidance or "
                "assisted decoding. Leave these options out."
            )
        self._total, self.tokens = before + tokens, tokens


class Call:
    """A mixed batch in force on one thread or task.

    Attributes:
        mix: the plan and its adapters.
        expands: True inside ``generate``, where beams and returned sequences make a sample several rows.
        packed: True where entries are tokens, all in one row, as in continuous batching.
        inside: True while a model's forward runs that has checked this call.
        ended: True when it is no longer in force.
        thread: the thread on which it began.
        stash: for each fused group, what its first layer computed for the others.
        dora_scales: what DoRA multiplies outputs with, for each bank.
        workspaces: memory for intermediate results, for each device and stream.
        rows: rows of the model's last forward inside ``generate``.
        invocations: where aLoRA adapters begin; None where no adapter in use is one.
    """

    def __init__(self, mix: Mix, expands: bool, packed: bool = False) -> None:
        self.mix = mix
        self.expands = expands
        self.packed = packed
        self.inside = False
        self.ended = False
        self.thread: InForce | None = None
        self.stash: dict[Any, tuple[Tensor, int, list[Tensor | None]]] = {}
        self.dora_scales: dict[Bank, list[Tensor | None]] = {}
        self.workspaces: dict[tuple, Tensor] = {}
        self.rows: int | None = None
        self.invocations: Invocations | None = None

    def again(self) -> Call:
        """The same ids for layers that ``backward`` runs once more after the call has ended."""
        again = Call(self.mix, self.expands, self.packed)
        again.inside, again.rows, again.invocations = True, self.rows, self.invocations
        return again

    def num_rows(self, x: Tensor) -> int:
        """Rows of a layer's input ``[..., K]`` that belong to entries.

        Raises:
            RowMappingError: they are no multiple of the entries.
        """
        rows = x.numel() // x.shape[-1] if self.packed else len(x)
        self.mix.segments.rows_per_entry(rows)
        return rows

    def check_rows(self, rows: int | None) -> None:
        """Raise where ``generate`` goes on with fewer rows than before: it dropped samples, and nobody knows which.

        Raises:
            RowMappingError: it did.
        """
        if not self.expands or rows is None:
            return
        if self.rows is not None and rows < self.rows:
            raise RowMappingError(
                f"generate went on with {rows} rows after {self.rows}, and can't tell which rows belong to which "
                "sample: expected the same rows at every step. Whisper does so with long audio; generate for one "
                "adapter at a time there."
            )
        self.rows = rows


class InForce:
    """How many calls are in force on one thread, on all of its tasks, and whether there are any."""

    def __init__(self) -> None:
        self.count = 0
        self.active = False  # all that compiled code reads, so that another count makes no new graph

    def add(self, difference: int) -> None:
        """Count a call that begins or ends."""
        self.count += difference
        self.active = self.count > 0


class Here(threading.local):
    """Gives every thread, compiled code included, what is in force on that thread."""

    def __init__(self) -> None:
        self.thread = InForce()


class Graph:
    """What compiled and captured code sees instead of a ``Call``.

    Attributes:
        key: tells ``take_plan`` which graph asks.
        active: whether ids are in force on any thread; compiled code has one version for each value.
        here: whether they are on the thread that asks.
        contended: whether calls with different ids are in force at the same time, on several threads or tasks, so that
            no single plan can stand at the fixed place.
        samples: entries of the plan in force; 0 inside ``generate``, which multiplies rows.
        terms: plans that graphs read one after the other, as many as a sample of any call had adapters.
        buffer: the plan of the last call that began, at a fixed place on the CPU; a graph takes its size from it, and
            is compiled again where a batch is larger than any before.
        buffers: the same for kernels, by their device, one for each term.
        stash: as in ``Call``; filled and emptied within one graph.
        banks: all banks of the model.
        is_captured: whether a CUDA graph was captured that reads them.
    """

    def __init__(self, router: Router) -> None:
        self.key = next(_keys)
        _graphs[self.key] = self
        self.active = False
        self.here = Here()
        self.contended = False
        self.samples = 0
        self.terms = 1
        self.buffer = SegmentBuffer(capacity=0)
        self.buffers: dict[str, list[SegmentBuffer]] = {}
        self.stash: dict[Any, tuple[Tensor, int, list[Tensor | None]]] = {}
        self.banks: list[Bank] = []
        self._router = router
        self._in_force: list[Call] = []  # of several that are nested on one thread, the innermost
        self._written: Mix | None = None
        self._runs_ops = False
        self._held: dict[Bank, torch.device] = {}  # whose tables graphs of kernels read
        self._outgrown: list[list[SegmentBuffer]] = []  # which captured graphs may still read
        self.is_captured = False
        self._lock = threading.RLock()

    @torch._dynamo.assume_constant_result  # runs while the graph is traced, and is no part of it
    def arm(self) -> bool:
        """From now on there is a graph of ops: keep the buffer and the banks up to date for it at every call."""
        call = self._router.call.get()
        if not self._runs_ops and call is not None:
            self._runs_ops = True
            self._write(call.mix)
        return True

    @torch._dynamo.assume_constant_result
    def arm_kernels(self, key: int, device: str) -> bool:
        """From now on there is a graph of kernels that reads this bank on this device."""
        call = self._router.call.get()
        with self._lock:
            if call is not None:
                place = torch.device(device)
                bank = next(bank for bank in self.banks if bank.key == key)
                adapters = self._router.adapters()
                bank.tables(adapters, place, call.mix.slots)
                bank.hold(adapters, place)
                for table in bank.held:
                    torch._dynamo.mark_static_address(table.rows)
                self._held[bank] = place
                self.prepare(call, place)
        return True

    def prepare(self, call: Call, device: torch.device) -> None:
        """Have the plan of a call at the fixed place, on a device on which kernels run."""
        with self._lock:
            if str(device) not in self.buffers:
                self._grow(device, call.mix.segments.num_entries)
                self._written = None
            if not self.contended and self._written is not call.mix:
                self._write(call.mix)

    def capture(self, call: Call, bank: Bank, device: torch.device) -> tuple[list[Tensor], tuple[TableRows, ...]]:
        """Plans and tables that stay, for kernels that are being captured in a CUDA graph.

        Raises:
            ModelStateError: they would have to be made first, and during a capture nothing can be.
        """
        if self.contended or self._written is not call.mix or not call.mix.has_tables(bank, device):
            raise ModelStateError(
                "a CUDA graph is being captured under ids that no call ran with before, or while another thread has "
                "ids in force: expected a call of the model on the same inputs first, inside the same mb.batch(...)."
            )
        with self._lock:
            bank.hold(self._router.adapters(), device)
            self._held[bank] = device
            self.is_captured = True
        return [buffer.packed for buffer in self.buffers[str(device)]], bank.held

    def enter(self, call: Call, outer: Call | None) -> None:
        """A call begins, inside another one or not."""
        with self._lock:
            self._in_force = [*(each for each in self._in_force if each is not outer), call]
            call.thread = self.here.thread
            call.thread.add(1)
            self._change()

    def leave(self, call: Call, outer: Call | None) -> None:
        """A call ends, and the one around it is in force again."""
        with self._lock:
            call.ended = True
            if call.thread is not None:
                call.thread.add(-1)
                call.thread = None
            self._in_force = [each for each in self._in_force if each is not call]
            if outer is not None and not outer.ended:
                self._in_force.append(outer)
            self._change()
        self.stash.clear()

    def plan(self, size: int, index: int) -> Tensor:
        """A plan of the thread that asks, that of one term, ``[size]``, with zeros behind it."""
        call = self._router.in_force()
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                "a CUDA graph is being captured of a compiled model that runs on torch's products, which ask for "
                "their plan on the host: expected the kernels, without gradients. Pass backend='auto' to enable, and "
                "capture under torch.no_grad()."
            )
        if call is None:
            raise ModelStateError(
                "a compiled model was called without ids on one thread while ids are in force on another: expected "
                "that calls with and without ids of one compiled model don't overlap. Pass ids of -1 instead of none, "
                "or run the calls after each other."
            )
        packed = _term(call.mix, index).pack()
        return torch.nn.functional.pad(packed, (0, size - packed.numel()))

    def _change(self) -> None:
        calls = self._in_force
        self.active = bool(calls)
        self.contended = any(call.mix is not calls[0].mix for call in calls)
        self.terms = max([self.terms, *(len(call.mix.terms) for call in calls)])
        if calls and not self.contended:
            self.samples = 0 if calls[0].expands else calls[0].mix.segments.num_entries
            if (self._runs_ops or self._held) and self._written is not calls[0].mix:
                self._write(calls[0].mix)

    def _write(self, mix: Mix) -> None:
        entries = mix.segments.num_entries
        # normal tensors even if the first call happens to run in inference mode
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._runs_ops:
                if entries > self.buffer.capacity:
                    self.buffer = SegmentBuffer(_capacity(entries))
                adapters = self._router.adapters()
                for bank in self.banks:
                    bank.sync([adapters.get(slot) for slot in range(mix.slots)])
            for bank, device in self._held.items():
                mix.tables(bank, device)
                if bank.hold(mix.adapters, device) and self.is_captured:
                    raise ModelStateError(
                        "a CUDA graph was captured, and now there are more adapters, or adapters of a larger rank or "
                        "another dtype, than it can serve: expected adapters like those that were there when it was "
                        "captured. Call disable and enable, and capture it again."
                    )
                for table in bank.held:
                    torch._dynamo.mark_static_address(table.rows)
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
                        buffer.update(_term(mix, index))
            self._written = mix

    def _grow(self, device: torch.device, entries: int) -> None:
        with torch.inference_mode(False):
            buffers = [SegmentBuffer(_capacity(entries), device) for _ in range(self.terms)]
        self.buffers[str(device)] = buffers
        for buffer in buffers:
            torch._dynamo.mark_static_address(buffer.packed)


def _term(mix: Mix, index: int) -> Segments:
    """The plan of one term, for which no sample of a mix need have an adapter."""
    return mix.terms[index] if index < len(mix.terms) else Segments.from_ids([BASE] * mix.segments.num_entries)


def _capacity(entries: int) -> int:
    """A power of two, so that a growing batch makes a new graph a few times and not every time."""
    return 1 << max(entries - 1, 15).bit_length()


_keys = itertools.count()
_graphs: WeakValueDictionary[int, Graph] = WeakValueDictionary()


@torch.library.custom_op("peft_multibatch::take_plan", mutates_args=())
def take_plan(buffer: Tensor, key: int, index: int) -> Tensor:
    """The packed plan of the call that runs the graph, that of one term: int32, as long as the graph's buffer."""
    return _graphs[key].plan(buffer.numel(), index)


@take_plan.register_fake
def _(buffer, key, index):
    return torch.empty_like(buffer)


class Router:
    """Holds the call in force for one enabled model, what was read of its adapters, and the backend that layers use.

    Attributes:
        kernels: the module ``ops.triton_backend``, for tensors on a GPU, or None.
        names: adapter names by slot; None where an adapter was deleted.
        is_enabled: False once the model was disabled.
        call: the call in force on the thread or task that asks.
        graph: what compiled code sees instead.
    """

    def __init__(
        self, kernels: ModuleType | None, names: list[str | None], check: Callable[[Iterable[int]], None]
    ) -> None:
        self.kernels = kernels
        self.names = names
        self.is_enabled = True
        self._check = check
        self.call: ContextVar[Call | None] = ContextVar("peft_multibatch", default=None)
        self.graph = Graph(self)
        self._adapters: dict[int, Adapter] = {}
        self._last: Mix | None = None

    def current(self) -> Call | Graph | None:
        """The call in force for the code that asks, or None where the model runs as PEFT alone would run it."""
        if torch.compiler.is_compiling():
            return self.graph if self.graph.active else None
        call = self.call.get()
        if call is not None and not call.inside:
            return self._outside(call)
        return call

    def in_force(self) -> Call | None:
        """The call in force.

        Raises:
            ModelStateError: it ended, and was inherited by a task that goes on.
        """
        call = self.call.get()
        if call is not None and call.ended:
            raise ModelStateError(
                "a model was called in a task that was started inside mb.batch(...), after that block had ended: "
                "expected the task to end first. Wait for it inside the block, or pass adapter_ids to the call."
            )
        return call

    def _outside(self, call: Call) -> Call:
        """A layer is called by itself inside a block, with no model around it that checked the call."""
        self.in_force()
        self._check(call.mix.adapters)
        call.mix = self.mix(call.mix.ids)
        return call

    def adapters(self) -> dict[int, Adapter]:
        """All adapters as PEFT holds them now, by slot."""
        return {slot: self._adapter(slot) for slot, name in enumerate(self.names) if name is not None}

    def mix(self, ids: Sequence[Entry]) -> Mix:
        """The plans for these ids, an entry for every sample, and the adapters as PEFT holds them now."""
        last = self._last if self._last is not None and self._last.ids == ids else None
        used = last.adapters if last else sorted({slot for entry in {*ids} for slot in slots_of(entry)})
        adapters = {slot: self._adapter(slot) for slot in used}
        if last is None or last.slots != len(self.names) or last.adapters != adapters:
            last = self._last = Mix(ids, adapters, len(self.names))
        return last

    def forget(self) -> None:
        """Let go of everything that was read: adapters came or went."""
        self._adapters.clear()
        self._last = None
        for bank in self.graph.banks:
            bank.forget()

    def _adapter(self, slot: int) -> Adapter:
        known, name = self._adapters.get(slot), self.names[slot]
        assert name is not None
        if known is not None and not known.holds():
            # let go of the memory of all that moved, not only of those in use
            self._adapters = {slot: adapter for slot, adapter in list(self._adapters.items()) if adapter.holds()}
            self._last = None
            known = None
        if known is None:
            known = self._adapters[slot] = Adapter(name)
        return known

    @contextmanager
    def routing(self, ids: Sequence[Entry], expands: bool, packed: bool = False) -> Iterator[Call]:
        """Put ids in force for this thread or task; what was in force before is again afterwards.

        Raises:
            ModelStateError: the block is left on another thread or task than it was entered on.
        """
        outer, call = self.call.get(), Call(self.mix(ids), expands, packed)
        token = self.call.set(call)
        try:
            self.graph.enter(call, outer)
            yield call
        finally:
            try:  # first of all, whatever fails after it
                self.call.reset(token)
            except ValueError:
                raise ModelStateError(
                    "ids were put in force on one thread or task and taken back on another, so that calls in between "
                    "may have run without them: expected both on the same one. A generator that holds mb.batch() open "
                    "must not be passed between threads; pass adapter_ids to each call instead."
                ) from None
            finally:
                self.graph.leave(call, outer)
