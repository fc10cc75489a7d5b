"""The CUDA graphs that were captured of a model, and what has changed since."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from peft_multibatch.errors import ModelStateError


if TYPE_CHECKING:
    from peft_multibatch.adapters.adapter import AnyAdapter
    from peft_multibatch.adapters.bank import Bank, CanRun
    from peft_multibatch.adapters.tables import TableRows
    from peft_multibatch.calls.batch_plan import BatchPlan


MOST_LAYOUTS = 64
"""The most layouts whose names are kept, so that compiled code is used again when a layout returns."""

_numbers = itertools.count()


class First(NamedTuple):
    """What the first of several graphs reads. Later ones read as much or more.

    Attributes:
        layers: the layers with adapters, and their names.
        components: the number of plans, the most adapters that a sample may have.
    """

    layers: Mapping[Any, str]
    components: int


class Captures:
    """Whose graphs were captured, with which layers, and whether they are outdated.

    A user's graphs can't be replaced, so a call that they can't run raises an error. Graphs of continuous batching are
    captured again, so other calls may change what they read; the tables and base weights that they read stay in memory
    until then.

    Not thread-safe: callers hold a lock.

    Attributes:
        layers: all layers with adapters, and their names; a new mapping when any come or go.
        banks: all banks of the model.
        discards: how often graphs of continuous batching were discarded.
        can_run: whether kernels, if there are any, can run weights of a dtype and rank on a device.
        described: what compiled decoding reads of the layers, apart from their tables.
        layout: a name for everything that compiled decoding reads of the layers and their tables, the same only if
            nothing of it differs.
    """

    def __init__(self) -> None:
        self.described: Hashable = None
        self._changes = 0
        self._layouts: dict[Hashable, str] = {}
        self._naming = threading.Lock()
        self._rename()
        self.layers: Mapping[Any, str] = {}
        self.banks: list[Bank] = []
        self._first: dict[bool, First] = {}  # by whether it was a user's
        self._outdated: list[Sequence[TableRows | Tensor]] = []  # which graphs of continuous batching may still read
        self._kept: list[Sequence[Tensor]] = []  # which users' graphs may read
        # the layers now, and the adapters that have weights only in layers of the first capture
        self._complete: dict[bool, tuple[Mapping[Any, str], WeakSet[AnyAdapter]]] = {}
        self.discards = 0
        self.can_run: CanRun = lambda dtype, rank, device: True
        self._can_run: WeakSet[object] = WeakSet()  # adapters, or their layouts, of which graphs can run all weights

    def __bool__(self) -> bool:
        return bool(self._first)

    @property
    def of_users(self) -> bool:
        """Whether a user captured a graph."""
        return True in self._first

    @property
    def of_steps(self) -> bool:
        """Whether graphs of continuous batching were captured."""
        return False in self._first

    @property
    def are_outdated(self) -> bool:
        """Whether graphs of continuous batching read memory that has been replaced."""
        return bool(self._outdated)

    def note(self, is_users: bool, components: int) -> None:
        """Record that a graph is captured.

        Args:
            is_users: whether a user captures it, or else a step of continuous batching.
            components: the number of plans that it reads.
        """
        self._first.setdefault(is_users, First(self.layers, components))

    def discard(self) -> None:
        """Record that the graphs of continuous batching, of all managers, must not be used any more."""
        self.discards += self.of_steps
        self._first.pop(False, None)
        self._complete.pop(False, None)
        self._outdated.clear()

    def keep(self, memory: list[Tensor]) -> None:
        """Keep base weights that are about to be copied elsewhere, for the graphs that read them."""
        self._rename(is_changed=True)
        if self.of_steps:
            self._outdated.append(memory)
        if self.of_users:
            self._kept.append(memory)

    def extend(
        self,
        bank: Bank,
        adapters: Mapping[int, AnyAdapter],
        device: torch.device,
        is_fixed: bool,
        is_capturing: bool = False,
    ) -> bool:
        """Make graphs read a bank's tables for more adapters, as in ``Bank.extend_for_graphs``."""
        before = bank.graph_tables
        is_changed = bank.extend_for_graphs(adapters, device, self.can_run, is_fixed, is_capturing)
        if is_changed and before and self.of_steps:
            self._outdated.append(before)
        if is_changed:
            self._rename(is_changed)
        return is_changed

    def describe(self, layers: Hashable) -> None:
        """Update the layout, from what compiled decoding reads of the layers. Needs no lock."""
        self.described = layers
        self._rename()

    def _rename(self, is_changed: bool = False) -> None:
        with self._naming:
            self._changes += is_changed
            if len(self._layouts) >= MOST_LAYOUTS:
                self._layouts.clear()
            self.layout = self._layouts.setdefault((self._changes, self.described), f"layout {next(_numbers)}")

    def why_no_kernels(self, plan: BatchPlan) -> str:
        """Why graphs of kernels can't run a plan of plain LoRA, or the empty string."""
        for adapter in plan.adapters.values():
            known = adapter.layout or adapter
            if known not in self._can_run:
                formats = {each[:2] + each.devices[:1] for bank in self.banks for each in adapter.formats(bank.layers)}
                wrong = [each for each in formats if not self.can_run(*each)]
                if wrong:
                    return cant_run(adapter.name, *wrong[0])
                self._can_run.add(known)
        return ""

    def adapt(self, banks: list[Bank], layers: Mapping[Any, str]) -> None:
        """Update the banks of the model and its layers with adapters, by name."""
        self.banks = banks
        self._can_run.clear()
        if layers.keys() != self.layers.keys():
            self.layers = layers

    def check(self, plan: BatchPlan) -> None:
        """Check that a user's graphs have all layers and components of a plan.

        Raises:
            ModelStateError: they lack some.
        """
        missing = self.missing(plan, is_users=True)
        if missing is not None:
            adapter, layer = missing
            raise ModelStateError(
                f"a CUDA graph was captured before any adapter had weights in {layer}, where {adapter.name!r} "
                "has some that a replay would leave out: expected adapters on the layers that had adapters at "
                "the capture. Call disable and enable, and capture the graph again."
            )
        if self.lacks_components(plan, is_users=True):
            raise ModelStateError(
                f"a CUDA graph was captured with at most {self._first[True].components} adapters per sample, and now "
                f"a mixture has {len(plan.components)}: expected no more adapters in a mixture than at the capture. "
                "Call disable and enable, and capture the graph again."
            )

    def lacks_components(self, plan: BatchPlan, is_users: bool) -> bool:
        """Whether a plan has more adapters for a sample than graphs read."""
        first = self._first.get(is_users)
        return first is not None and len(plan.components) > first.components

    def missing(self, plan: BatchPlan, is_users: bool) -> tuple[AnyAdapter, str] | None:
        """An adapter of a plan with weights in a layer that had no adapters at the capture, and the layer's name."""
        first = self._first.get(is_users)
        if first is None or first.layers is self.layers:
            return None
        layers, complete = self._complete.get(is_users, (None, None))
        if layers is not self.layers or complete is None:
            complete = WeakSet()
            self._complete[is_users] = self.layers, complete
        for adapter in plan.adapters.values():
            if adapter not in complete:
                for layer, name in self.layers.items():
                    if layer not in first.layers and adapter.has(layer):
                        return adapter, name
                complete.add(adapter)
        return None


def cant_run(name: str, dtype: torch.dtype | None, rank: int, device: torch.device) -> str:
    """Why graphs can't run an adapter whose weights have this dtype and rank."""
    kind = "weights that aren't contiguous or don't share a dtype" if dtype is None else f"weights of {dtype}"
    return f"adapter {name!r} has {kind} and rank {rank}, which no kernel supports on {device}"
