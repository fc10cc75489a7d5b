"""Which plan is in force: ids travel beside a call, never through the model's arguments.

Every thread and every asyncio task has its own call, so that two with different ids don't meet. What a compiled graph
fixes is only that ids are in force at all. Graphs of ops ask for the plan when they run; graphs of kernels, which may
be captured and then run no host code, read it at a fixed place that is written when a call begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from peft_multibatch.adapters.shards import Split, check_same
from peft_multibatch.adapters.weights import Adapter
from peft_multibatch.calls.call import Call
from peft_multibatch.calls.graphs import Graph
from peft_multibatch.calls.mix import Mix
from peft_multibatch.errors import ModelStateError, MultibatchError
from peft_multibatch.plan.ids import Entry, slots_of


if TYPE_CHECKING:
    from peft_multibatch.compat import LoraLayer


class Router:
    """Holds the call in force for one enabled model, what was read of its adapters, and the backend that layers use.

    Attributes:
        kernels: the module ``ops.triton_backend``, for tensors on a GPU, or None.
        names: adapter names by slot; None where an adapter was deleted.
        is_enabled: False once the model was disabled.
        split: how tensor parallelism splits layers of the model, or None.
        is_gathered: whether FSDP shards the model, and gathers weights when its parts run.
        call: the call in force on the thread or task that asks.
        graph: what compiled code sees instead.
        layers: those that run as one product for the batch.
    """

    def __init__(
        self, kernels: ModuleType | None, names: list[str | None], check: Callable[[Iterable[int]], None]
    ) -> None:
        self.kernels = kernels
        self.names = names
        self.is_enabled = True
        self.split: Split | None = None
        self.is_gathered = False
        self._check = check
        self.call: ContextVar[Call | None] = ContextVar("peft_multibatch", default=None)
        self.graph = Graph(self.call, self.in_force, self.adapters)
        self.layers: list[LoraLayer] = []
        self._adapters: dict[int, Adapter] = {}
        self._last: Mix | None = None
        self._turn = 0
        self._turns: dict[int, int] = {}  # when each slot was compared last by a call that doesn't compare all

    def current(self) -> Call | Graph | None:
        """The call in force for the code that asks, or None where the model runs as PEFT alone would run it."""
        if torch.compiler.is_compiling():
            return self.graph if self.graph.trace() and self.graph.active else None
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

    def adapters(self, slots: Sequence[int] | None = None, checks: int | None = None) -> dict[int, Adapter]:
        """Adapters as PEFT holds them now, by slot.

        Args:
            slots: which; where they aren't given, all but those that don't fit, which nobody can ask for.
            checks: how many of them are compared with what PEFT holds; all where it isn't given. The others may be as
                they were a few calls ago, because those come first that were compared longest ago.
        """
        if slots is None:
            slots = [slot for slot, name in enumerate(self.names) if name is not None and self._can_be_read(slot)]
        due = slots
        if checks is not None and checks < len(slots):
            self._turn += 1
            due = sorted(slots, key=lambda slot: self._turns.get(slot, 0))[:checks]
            self._turns.update(dict.fromkeys(due, self._turn))
        known = [adapter for slot in due if (adapter := self._adapters.get(slot)) is not None]
        if not all(adapter.holds() for adapter in known):
            # let go of the memory of all that moved, not only of those in use
            self._adapters = {slot: adapter for slot, adapter in list(self._adapters.items()) if adapter.holds()}
            self._last = None
        return {slot: self._adapters.get(slot) or self._read(slot) for slot in slots}

    def mix(self, ids: Sequence[Entry], checks: int | None = None) -> Mix:
        """The plans for these ids, an entry for every sample, and the adapters as `adapters` gives them."""
        last = self._last if self._last is not None and self._last.ids == ids else None
        used = list(last.adapters) if last else sorted({slot for entry in {*ids} for slot in slots_of(entry)})
        adapters = self.adapters(used, checks)
        if last is None or last.slots != len(self.names) or last.adapters != adapters:
            last = self._last = Mix(ids, adapters, len(self.names))
        return last

    def forget(self) -> None:
        """Let go of everything that was read: adapters came or went."""
        self._adapters.clear()
        self._last = None
        self.graph.forget()
        for bank in self.graph.banks:
            bank.forget()

    def _read(self, slot: int) -> Adapter:
        name = self.names[slot]
        assert name is not None
        adapter = Adapter(name)
        adapter.check(self.layers)  # what doesn't fit is refused where it is named, before anything runs
        self._adapters[slot] = adapter
        return adapter

    def _can_be_read(self, slot: int) -> bool:
        try:
            return slot in self._adapters or bool(self._read(slot))
        except MultibatchError:
            return False

    @contextmanager
    def routing(
        self, ids: Sequence[Entry], expands: bool, packed: bool = False, checks: int | None = None
    ) -> Iterator[Call]:
        """Put ids in force for this thread or task; what was in force before is again afterwards.

        Args:
            ids: an entry for every sample.
            expands: as in ``Call``.
            packed: as in ``Call``.
            checks: as in ``adapters``.

        Raises:
            ModelStateError: the block is left on another thread or task than it was entered on, or before a block
                that was entered later.
        """
        outer, call = self.call.get(), Call(self.mix(ids, checks), expands, packed)
        if self.split is not None:
            check_same(ids, self.names, self.split)
        token = self.call.set(call)
        try:
            self.graph.enter(call, outer)
            yield call
        finally:
            try:  # first of all, whatever fails after it
                if self.call.get() is not call:
                    raise ValueError  # ids that were put in force later still are, and stay so
                self.call.reset(token)
            except ValueError:
                raise ModelStateError(
                    "ids were put in force on one thread or task and taken back on another, so that calls in between "
                    "may have run without them, or taken back before ids that came later: expected both on the same "
                    "one, the last ids first. A generator that holds mb.batch() open must not be passed between "
                    "threads, nor end inside a block that began after it; pass adapter_ids to each call instead."
                ) from None
            finally:
                self.graph.leave(call)
