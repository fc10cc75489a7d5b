"""Which plan is in force: ids travel beside a call, never through the model's arguments.

Every thread and every asyncio task has its own call, so that two with different ids don't meet. A compiled graph asks
too, through an op that runs with the graph; what is fixed at compile time is only that ids are in force at all.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from peft_multibatch.errors import ModelStateError, RowMappingError
from peft_multibatch.segments import BASE, SegmentBuffer, Segments


if TYPE_CHECKING:
    from peft_multibatch.bank import Bank, TableRows
    from peft_multibatch.ops.torch_backend import SlotWeights


class Call:
    """A mixed batch in force on one thread or task.

    Attributes:
        segments: the plan.
        expands: True inside ``generate``, where beams and returned sequences make a sample several rows, and where
            what was read from PEFT is kept for the next step.
        inside: True while a model's forward runs that has checked this call.
        stash: for each fused group, what its first layer computed for the others.
    """

    def __init__(self, segments: Segments, expands: bool) -> None:
        self.segments = segments
        self.expands = expands
        self.inside = False
        self.stash: dict[Any, tuple[Tensor, list[Tensor | None]]] = {}
        self.live = [slot for slot in segments.weight_indices.tolist() if slot != BASE]
        self._rows: int | None = None
        self._longest = max((stop - start for _, start, stop in segments.spans), default=0)
        self._weights: dict[Bank, dict[int, SlotWeights]] = {}
        self._tables: dict[Bank, TableRows] = {}
        self._plans: dict[torch.device, Tensor] = {}
        self._dense_plan: Tensor | None = None

    def check_rows(self, rows: int | None) -> None:
        """Raise where ``generate`` goes on with fewer rows than before: it dropped samples, and nobody knows which.

        Raises:
            RowMappingError: it did.
        """
        if not self.expands or rows is None:
            return
        if self._rows is not None and rows < self._rows:
            raise RowMappingError(
                f"generate went on with {rows} rows after {self._rows}, and can't tell which rows belong to which "
                "sample: expected the same rows at every step. Whisper does so with long audio; generate for one "
                "adapter at a time there."
            )
        self._rows = rows

    def weights(self, bank: Bank) -> dict[int, SlotWeights]:
        """Weights of the adapters in use."""
        found = self._weights.get(bank)
        if found is None:
            found = {slot: bank.weights(slot) for slot in self.live}
            if self.expands:
                self._weights[bank] = found
        return found

    def trains(self, bank: Bank) -> bool:
        """Whether any weight in use wants a gradient."""
        return any(
            tensor.requires_grad for slot in self.live for part in bank.parameters(slot) if part for tensor in part[:2]
        )

    def kernel_inputs(self, bank: Bank, x: Tensor) -> tuple[Tensor, int, int, TableRows]:
        """Plan on the device of ``x``, number of segments, rows of the longest one, and the bank's table."""
        plan = self._plans.get(x.device)
        if plan is None:
            plan = self._plans[x.device] = self.segments.pack().to(x.device, non_blocking=True)
        table = self._tables.get(bank)
        if table is None:
            table = bank.table(x.device).update(self.live)
            if self.expands:
                self._tables[bank] = table
        return plan, self.segments.num_segments, self._longest * (len(x) // self.segments.num_entries), table

    def op_inputs(self, bank: Bank) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor]:
        """Plan, ``lora_A``, ``lora_B``, ranks and scalings of the adapters in use and of no other, for the ops."""
        if self._dense_plan is None:
            segments = self.segments
            dense = torch.full_like(segments.weight_indices, BASE)
            dense[segments.weight_indices != BASE] = torch.arange(len(self.live), dtype=dense.dtype, device="cpu")
            self._dense_plan = Segments(dense, segments.seg_indptr, segments.permutation).pack()
        return self._dense_plan, *bank.gather(self.live)


class Graph:
    """What compiled code sees instead of a ``Call``.

    Attributes:
        key: tells ``take_plan`` which graph asks.
        active: whether ids are in force; compiled code has one version for each value.
        buffer: the plan of the last call that began, at a fixed place; a graph takes its size from it, and is compiled
            again where a batch is larger than any before.
        stash: as in ``Call``; filled and emptied within one graph.
    """

    def __init__(self, call: ContextVar[Call | None]) -> None:
        self.key = next(_keys)
        _graphs[self.key] = self
        self.active = False
        self.buffer = SegmentBuffer(capacity=0)
        self.stash: dict[Any, tuple[Tensor, list[Tensor | None]]] = {}
        self.banks: list[Bank] = []
        self._call = call
        self._calls = 0
        self._armed = False
        self._lock = threading.Lock()

    @torch._dynamo.assume_constant_result  # runs while the graph is traced, and is no part of it
    def arm(self) -> bool:
        """From now on there is a graph: keep the buffer and the banks up to date for it at every call."""
        call = self._call.get()
        if not self._armed and call is not None:
            self._armed = True
            self._update(call.segments)
        return True

    def enter(self, call: Call) -> None:
        """A call begins. The buffer has the plan of the last one that began."""
        with self._lock:
            self._calls += 1
            self.active = True
        if self._armed:
            self._update(call.segments)

    def leave(self, outer: Call | None) -> None:
        """A call ends, and the one around it is in force again."""
        with self._lock:
            self._calls -= 1
            self.active = self._calls > 0
        self.stash.clear()
        if self._armed and outer is not None:
            self._update(outer.segments)

    def plan(self, size: int) -> Tensor:
        """The plan of the thread that asks, ``[size]``, with zeros behind it."""
        call = self._call.get()
        if call is None:
            raise ModelStateError(
                "a compiled model was called without ids on one thread while ids are in force on another: expected "
                "that calls with and without ids of one compiled model don't overlap. Pass ids of -1 instead of none, "
                "or run the calls after each other."
            )
        packed = call.segments.pack()
        return torch.nn.functional.pad(packed, (0, size - packed.numel()))

    def _update(self, segments: Segments) -> None:
        # normal tensors even if the first call happens to run in inference mode
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if segments.num_entries > self.buffer.capacity:
                # powers of two, so that a growing batch size makes a new graph a few times and not every time
                self.buffer = SegmentBuffer(1 << max(segments.num_entries - 1, 15).bit_length())
            self.buffer.update(segments)
            for bank in self.banks:
                bank.sync()


_keys = itertools.count()
_graphs: WeakValueDictionary[int, Graph] = WeakValueDictionary()


@torch.library.custom_op("peft_multibatch::take_plan", mutates_args=())
def take_plan(buffer: Tensor, key: int) -> Tensor:
    """The packed plan of the call that runs the graph: int32, as long as the graph's buffer."""
    return _graphs[key].plan(buffer.numel())


@take_plan.register_fake
def _(buffer, key):
    return torch.empty_like(buffer)


class Router:
    """Holds the call in force for one enabled model, and the backend that layers run on.

    Attributes:
        kernels: the module ``ops.triton_backend``, for tensors on a GPU, or None.
        call: the call in force on the thread or task that asks.
        graph: what compiled code sees instead.
    """

    def __init__(self, kernels: ModuleType | None) -> None:
        self.kernels = kernels
        self.call: ContextVar[Call | None] = ContextVar("peft_multibatch", default=None)
        self.graph = Graph(self.call)

    def current(self) -> Call | Graph | None:
        """The call in force for the code that asks, or None where the model runs as PEFT alone would run it."""
        if torch.compiler.is_compiling():
            if not self.graph.active:
                return None
            self.graph.arm()
            return self.graph
        return self.call.get()

    @contextmanager
    def routing(self, segments: Segments, expands: bool) -> Iterator[Call]:
        """Put a plan in force for this thread or task; what was in force before is again afterwards.

        Raises:
            ModelStateError: the block is left on another thread or task than it was entered on.
        """
        outer, call = self.call.get(), Call(segments, expands)
        token = self.call.set(call)
        self.graph.enter(call)
        try:
            yield call
        finally:
            self.graph.leave(outer)
            try:
                self.call.reset(token)
            except ValueError:
                raise ModelStateError(
                    "ids were put in force on one thread or task and taken back on another, so that calls in between "
                    "may have run without them: expected both on the same one. A generator that holds mb.batch() open "
                    "must not be passed between threads; pass adapter_ids to each call instead."
                ) from None
