"""The CUDA graphs that were captured of a model, and what has changed since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch


if TYPE_CHECKING:
    from peft_multibatch.adapters.adapter import AnyAdapter
    from peft_multibatch.adapters.bank import Bank
    from peft_multibatch.adapters.tables import TableRows
    from peft_multibatch.calls.batch_plan import BatchPlan


class Captures:
    """Whose graphs were captured, with which layers, and whether they are outdated.

    A user's graphs can't be replaced, so a call that they can't run raises an error. Graphs of continuous batching are
    captured again, so other calls may change what they read; their tables stay in memory until then.

    Not thread-safe: callers hold a lock.

    Attributes:
        layers: all layers with adapters, and their names; a new mapping when any come or go.
    """

    def __init__(self) -> None:
        self.layers: Mapping[Any, str] = {}
        self._before: dict[bool, Mapping[Any, str]] = {}  # the layers at the first capture, by whether it was a user's
        self._outdated: list[tuple[TableRows, ...]] = []  # which graphs of continuous batching may still read
        # the layers now, and the adapters that have weights only in layers of the first capture
        self._complete: dict[bool, tuple[Mapping[Any, str], WeakSet[AnyAdapter]]] = {}

    def __bool__(self) -> bool:
        return bool(self._before)

    @property
    def of_users(self) -> bool:
        """Whether a user captured a graph."""
        return True in self._before

    @property
    def of_steps(self) -> bool:
        """Whether graphs of continuous batching were captured."""
        return False in self._before

    @property
    def are_outdated(self) -> bool:
        """Whether graphs of continuous batching read tables that have been replaced."""
        return bool(self._outdated)

    def note(self, is_users: bool) -> None:
        """Record that a graph is captured, by a user or for the steps of continuous batching."""
        self._before.setdefault(is_users, self.layers)

    def discard(self) -> None:
        """Record that the graphs of continuous batching were discarded."""
        self._before.pop(False, None)
        self._complete.pop(False, None)
        self._outdated.clear()

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
        is_changed = bank.extend_for_graphs(adapters, device, is_fixed, is_capturing)
        if is_changed and before and self.of_steps:
            self._outdated.append(before)
        return is_changed

    def missing(self, plan: BatchPlan, is_users: bool) -> tuple[AnyAdapter, str] | None:
        """An adapter of a plan with weights in a layer that had no adapters at the capture, and the layer's name."""
        before = self._before.get(is_users, self.layers)
        if before is self.layers:
            return None
        layers, complete = self._complete.get(is_users, (None, None))
        if layers is not self.layers or complete is None:
            complete = WeakSet()
            self._complete[is_users] = self.layers, complete
        for adapter in plan.adapters.values():
            if adapter not in complete:
                for layer, name in self.layers.items():
                    if layer not in before and adapter.has(layer):
                        return adapter, name
                complete.add(adapter)
        return None
