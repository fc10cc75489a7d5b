"""Which plan is in force: ids travel beside a call, never through the model's arguments.

Every thread has its own call, so that two threads with different ids don't meet. A compiled graph can't ask which
thread runs it; it reads one ``Graph``, whose buffers are written before the graph runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_multibatch.segments import BASE, SegmentBuffer, Segments


if TYPE_CHECKING:
    from peft_multibatch.bank import Bank
    from peft_multibatch.ops.torch_backend import SlotWeights


class Call:
    """A mixed batch in force on one thread.

    Attributes:
        segments: the plan.
        expands: True inside ``generate``, where beams and returned sequences make a sample several rows.
        stash: for each fused group, what its first layer computed for the others.
    """

    def __init__(self, segments: Segments, expands: bool) -> None:
        self.segments = segments
        self.expands = expands
        self.stash: dict[Any, tuple[Tensor, list[Tensor | None]]] = {}
        self._live = [slot for slot in segments.weight_indices.tolist() if slot != BASE]
        self._weights: dict[Bank, tuple[dict[int, SlotWeights], bool]] = {}
        self._plan: Tensor | None = None

    def refresh(self) -> None:
        """Forget what was read from PEFT: the next layer reads it again."""
        self._weights.clear()
        self.stash.clear()

    def weights(self, bank: Bank) -> tuple[dict[int, SlotWeights], bool]:
        """Weights of the adapters in use, and whether any of them wants a gradient; read once per call and bank."""
        found = self._weights.get(bank)
        if found is None:
            weights = {slot: bank.weights(slot) for slot in self._live}
            trained = any(
                tensor.requires_grad for slices in weights.values() for part in slices if part for tensor in part[:2]
            )
            found = self._weights[bank] = weights, trained
        return found

    def op_inputs(self, bank: Bank) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor]:
        """Plan, ``lora_A``, ``lora_B``, ranks and scalings of the adapters in use and of no other, for the ops."""
        if self._plan is None:
            segments = self.segments
            dense = torch.full_like(segments.weight_indices, BASE)
            dense[segments.weight_indices != BASE] = torch.arange(len(self._live), dtype=dense.dtype)
            self._plan = Segments(dense, segments.seg_indptr, segments.permutation).pack()
        return self._plan, *bank.gather(self._live)


class Graph:
    """What compiled graphs read instead of a ``Call``: buffers at fixed places, written before every call.

    Attributes:
        active: whether ids are in force; compiled code has one version for each value.
        buffer: the plan; replaced only when a batch is larger than any before.
        stash: as in ``Call``; filled and emptied within one graph.
    """

    def __init__(self) -> None:
        self.active = False
        self.buffer = SegmentBuffer(capacity=0)
        self.stash: dict[Any, tuple[Tensor, list[Tensor | None]]] = {}
        self.banks: list[Bank] = []
        self._armed = False
        self._lock = threading.RLock()

    @torch._dynamo.assume_constant_result  # runs while the graph is traced, and is no part of it
    def arm(self) -> bool:
        """From now on there is a graph: keep banks up to date for it at every call."""
        if not self._armed:
            self._armed = True
            self._sync_banks()
        return True

    @contextmanager
    def using(self, segments: Segments) -> Iterator[None]:
        """Write a plan for graphs to read. Calls of several threads take turns once there is a graph."""
        if not self._lock.acquire(blocking=self._armed):
            yield  # another thread's call is under way, and no graph is there to read this one's plan
            return
        try:
            before, was_active = self.buffer.packed.clone(), self.active
            if segments.num_entries > self.buffer.capacity:
                # powers of two, so that a growing batch size makes a new graph a few times and not every time
                self.buffer = SegmentBuffer(1 << max(segments.num_entries - 1, 15).bit_length())
            self.buffer.update(segments)
            if self._armed:
                self._sync_banks()
            self.active = True
            try:
                yield
            finally:
                self.active = was_active
                if was_active:
                    self.buffer.packed[: before.numel()].copy_(before)
        finally:
            self._lock.release()

    def _sync_banks(self) -> None:
        for bank in self.banks:
            bank.sync()


class _ThreadState(threading.local):
    call: Call | None = None


class Router:
    """Holds the call in force for one enabled model."""

    def __init__(self) -> None:
        self.thread = _ThreadState()
        self.graph = Graph()

    def current(self) -> Call | Graph | None:
        """The call in force for the code that asks, or None where the model runs as PEFT alone would run it."""
        if torch.compiler.is_compiling():
            if not self.graph.active:
                return None
            self.graph.arm()
            return self.graph
        return self.thread.call

    @contextmanager
    def routing(self, segments: Segments, expands: bool) -> Iterator[None]:
        """Put a plan in force on this thread; what was in force before is again afterwards, whatever happens."""
        before = self.thread.call
        with self.graph.using(segments):
            self.thread.call = Call(segments, expands)
            try:
                yield
            finally:
                self.thread.call = before
