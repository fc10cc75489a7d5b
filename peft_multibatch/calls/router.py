"""Finds the active call. Ids reach layers through context variables, never through the model's arguments.

Every thread and every asyncio task has its own call, so different ids don't interfere. A compiled graph depends only
on whether ids are active. Graphs of ops look up the plan when they run; graphs of kernels, which may be captured and
then run no host code, read it from a fixed address that is written when a call begins.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

from peft_multibatch.adapters.registry import Registry
from peft_multibatch.adapters.shards import Split, check_same
from peft_multibatch.calls.active import ActiveCall, check_running
from peft_multibatch.calls.batch_plan import BatchPlan
from peft_multibatch.calls.call import Call
from peft_multibatch.calls.graphs import Graph
from peft_multibatch.calls.origin import NO_BACKWARD
from peft_multibatch.calls.replay import Replays
from peft_multibatch.compat import current_backward
from peft_multibatch.errors import ModelStateError
from peft_multibatch.plan.ids import Entry, ids_of


class Router:
    """Finds the active call of one enabled model, and has the backend that layers use.

    Attributes:
        kernels: the module ``ops.triton_backend``, for tensors on a GPU, or None.
        registry: the model's adapters.
        split: how tensor parallelism splits layers of the model, or None.
        is_gathered: whether FSDP shards the model and gathers weights when its modules run.
        is_tried: whether the model type was tested, so that its rows are known to be in the order of the samples.
        buffers: the buffer dictionaries of the model's modules.
        call: the call that began last on the current thread or task, which may have ended.
        disabled: layers whose adapters are disabled on the current thread or task.
        graph: the state that compiled code reads.
        replays: the ids of layers that ``backward`` runs again.
    """

    def __init__(
        self, kernels: ModuleType | None, registry: Registry, check: Callable[[Iterable[int]], frozenset]
    ) -> None:
        self.kernels = kernels
        self.registry = registry
        self.split: Split | None = None
        self.is_gathered = False
        self.is_tried = True
        self.buffers: list[dict[str, Any]] = []
        self._check = check
        self.call: ContextVar[Call | None] = ContextVar("peft_multibatch", default=None)
        self.disabled: ContextVar[frozenset] = ContextVar("peft_multibatch_disabled", default=frozenset())
        self.replays = Replays(self.routing)
        self.graph = Graph(self.active, self.replays.note_compiled, registry.tables)
        if kernels is not None:
            self.graph.captures.can_run = kernels.can_run
        self._last: BatchPlan | None = None

    def current(self, layer: Any) -> Call | Graph | None:
        """The call of a layer that is about to run; None if it runs as in plain PEFT.

        Args:
            layer: the ``PatchedLayer``.
        """
        if torch.compiler.is_compiling():
            return self.graph if self.graph.trace() and self.graph.active else None
        call = self.call.get()
        if call is None and current_backward() == NO_BACKWARD:
            return None
        if call is None or call.is_watched or call.end() is None:
            call = self.look(layer)
            if call is not None:
                if not call.inside:
                    self._check_outside(call)
                self.replays.note(call, call.origin)
        return call

    def look(self, layer: Any = None) -> Call | None:
        """The call of a layer or a model: the active one, or that of the first run if ``backward`` runs it again.

        Args:
            layer: as in ``current``; None for a model.
        """
        backward, call = current_backward(), self.live()
        if backward != NO_BACKWARD and (call is None or call.ended or call.origin.backward != backward):
            return self.replays.call(layer)  # the active call, if any, began before backward and doesn't apply
        return self.active()

    def live(self) -> Call | None:
        """The active call, or one that has ended but was inherited by the current task."""
        call = self.call.get()
        while call is not None and not call.ended and call.end() is None:  # an exception skipped its __exit__
            call = call.outer
        return call

    def active(self) -> Call | None:
        """The active call.

        Raises:
            ModelStateError: it has ended, and was inherited by a task that is still running.
        """
        call = self.live()
        if call is not None and call.ended:
            raise ModelStateError(
                "a model was called in a task that was started inside mb.batch(...), after that block had ended: "
                "expected the task to end first. Await it inside the block, or pass adapter_ids to the call."
            )
        if call is not None and call.suspended:
            check_running(call)
        return call

    def _check_outside(self, call: Call) -> None:
        """Check the call for a layer that is called by itself, without a model around it that has done so."""
        call.is_used = True
        call.base_layers = self._check(call.plan.ids_in_use)
        call.plan = self.plan(call.plan.ids)

    def plan(self, ids: Sequence[Entry], checks: int | None = None) -> BatchPlan:
        """The plan for these ids, one entry per sample, with the adapters that ``Registry.adapters`` returns."""
        last = self._last
        if last is not None and last.ids == ids:
            used: Sequence[int] = last.ids_in_use
            known = weakref.ref(last)  # waiting for memory must not keep the adapters of an old plan alive
        else:
            used, known = sorted({number for entry in {*ids} for number in ids_of(entry)}), None
        last = None
        adapters = self.registry.adapters(used, checks)
        last = known() if known is not None else None
        slots = self.registry.slots
        if last is None or last.slots != slots.capacity or [*last.adapters.values()] != [*adapters.values()]:
            for adapter in adapters.values():
                adapter.slot  # noqa: B018 - assigns a slot, which may increase the number of slots
            last = self._last = BatchPlan(ids, adapters, slots.capacity)
        return last

    def begin(
        self,
        ids: Sequence[Entry],
        expands: bool,
        packed: bool = False,
        checks: int | None = None,
        base_layers: frozenset = frozenset(),
    ) -> Call:
        """A call that isn't active yet.

        Args:
            ids: one entry per sample.
            expands: as in ``Call``.
            packed: as in ``Call``.
            checks: as in ``Registry.adapters``.
            base_layers: as in ``Call``.
        """
        call = Call(self.plan(ids, checks), expands, packed, base_layers)
        call.is_tried = self.is_tried
        if self.split is not None:
            check_same(ids, self.registry.names.listed(), self.split)
        return call

    def routing(self, ids: Sequence[Entry] | Callable[[], Call], **options: Any) -> ActiveCall:
        """A block in which ids are active on this thread or task.

        Args:
            ids: one entry per sample, or a function that makes the call when the block is entered.
            **options: as in ``begin``.
        """
        begin = ids if callable(ids) else lambda: self.begin(ids, **options)
        return ActiveCall(begin, self.call, self.live, self.graph)

    def let_go(self) -> None:
        """Drop plans of calls that have ended, which may keep stored adapters in memory."""
        self._last = None
        self.graph.forget(is_changed=False)

    def forget(self) -> None:
        """Drop everything that was prepared for adapters, because some were added or deleted."""
        self._last = None
        self.registry.forget_gone()
        self.graph.forget()
        for bank in self.graph.banks:
            bank.forget()
