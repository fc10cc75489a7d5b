"""The plan of a call: its segments, the adapters in use, and everything derived from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_multibatch import streams
from peft_multibatch.adapters.adapter import AnyAdapter
from peft_multibatch.calls.dropout import Dropouts, Place
from peft_multibatch.ops.gradients import TrainedWeights
from peft_multibatch.plan.ids import Entry, components, ids_of
from peft_multibatch.plan.segments import BASE, Segments


if TYPE_CHECKING:
    from peft_multibatch.adapters.bank import Bank
    from peft_multibatch.adapters.tables import LayerWeights, SlotWeights, TableRows


MOST_RUNS = 4
"""The most plans of ``of_runs`` that a plan keeps, such as for images and videos of one call."""


class Apart(NamedTuple):
    """Adapters that PEFT's own modules run in the layers of a bank, while all others run as one product.

    Attributes:
        slots: the slots of these adapters.
        reason: why, for messages.
        dropouts: (slot, module) of other adapters' dropouts that no product applies. An adapter is apart as well while
            its dropout is in train mode.
    """

    slots: frozenset[int]
    reason: str
    dropouts: tuple[tuple[int, nn.Dropout], ...]

    def dropping(self) -> frozenset[int]:
        """The slots whose dropouts are in train mode, with a probability above 0."""
        return frozenset(slot for slot, dropout in self.dropouts if dropout.training and dropout.p)


class BatchPlan:
    """Which adapter serves each sample, and everything derived from that.

    Calls with the same ids share a plan as long as PEFT's weights stay the same, so decode steps rebuild nothing.

    Attributes:
        ids: one entry per sample, as the user passed it.
        ids_in_use: the adapters' ids, in the order of ``adapters``.
        entries: ``ids`` with slots instead of ids.
        components: the segments of each component: a single one without mixtures.
        segments: the segments of the first component.
        adapters: the adapters in use, by slot.
        serials: their serial numbers, by slot.
        slots: the number of slots, in use or not.
        mixed: the slots of adapters that are part of a mixture.
        placed: the positions at which graphs of ops last took the adapters, and the plans packed with them.
        products: what the Triton backend prepared for each bank and stream, and whether it adds.

    Args:
        ids: one entry per sample.
        adapters: the adapters in use, by id.
        slots: the number of slots.
    """

    def __init__(self, ids: Sequence[Entry], adapters: Mapping[int, AnyAdapter], slots: int) -> None:
        self.ids = ids
        self.ids_in_use = list(adapters)
        slot_of = {number: adapter.slot for number, adapter in adapters.items()}
        entry_of = {entry: _with_slots(entry, slot_of) for entry in {*ids}}  # once per distinct entry
        self.entries = [entry_of[entry] for entry in ids]
        self._fill({adapter.slot: adapter for adapter in adapters.values()}, slots)

    def _fill(self, adapters: dict[int, AnyAdapter], slots: int) -> None:
        with torch.inference_mode(False):  # other calls reuse these, possibly with gradients
            self.components = [
                Segments.from_ids(slots, weights=weights) for slots, weights in components(self.entries)
            ]
        self.segments = self.components[0]
        self.adapters = adapters
        self._special = {slot: adapter for slot, adapter in adapters.items() if not adapter.is_plain}
        self.serials = {slot: adapter.serial for slot, adapter in adapters.items()}
        self.slots = slots
        self.products: dict[tuple[Bank, int, bool], Any] = {}
        self._weights: dict[Bank, dict[int, SlotWeights]] = {}
        # by device and stream: see streams.py
        self._tables: dict[tuple[Bank, torch.device, int], tuple[TableRows, ...]] = {}
        self._trained: dict[Bank, TrainedWeights] = {}
        self._index = {slot: position for position, slot in enumerate(adapters)}
        self._positions: dict[tuple[torch.device, int], Tensor] = {}
        self._kinds = list(dict.fromkeys(self.entries))
        self.mixed = {slot for entry in self._kinds if isinstance(entry, tuple) for slot in ids_of(entry)}
        self.placed: tuple[Mapping[int, int], list[Tensor]] | None = None
        self._has_dora: dict[Bank, bool] = {}
        self._apart: dict[Bank, Apart | None] = {}
        self._dropouts: dict[Bank, Dropouts | None] = {}
        self._without: dict[frozenset[int], BatchPlan] = {}
        self._alone: dict[Entry, BatchPlan] = {}
        self._of_runs: dict[tuple[tuple[int, int], ...], BatchPlan] = {}

    def apart(self, bank: Bank) -> Apart | None:
        """Adapters that PEFT's modules run in a bank's layers, always or in train mode; None if there are none."""
        if not self._special:
            return None
        if bank not in self._apart:
            self._apart[bank] = self._find_apart(bank)
        return self._apart[bank]

    def _find_apart(self, bank: Bank) -> Apart | None:
        slots, dropouts, reasons = set(), [], []
        for slot, adapter in self._special.items():
            found = [adapter.apart[layer] for layer in bank.layers if layer in adapter.apart]
            if found:
                slots.add(slot)
                reasons.append(f"adapter {adapter.name!r} runs per segment ({found[0]})")
            parts = zip(bank.layers, adapter.parts(bank.layers))
            dropouts += [
                (slot, adapter.dropouts[layer])
                for layer, part in parts
                if layer in adapter.dropouts and not self._is_fused(slot, bank, part, adapter.dropouts[layer])
            ]
        return Apart(frozenset(slots), ", ".join(reasons), tuple(dropouts)) if slots or dropouts else None

    def dropouts(self, bank: Bank) -> Dropouts | None:
        """The dropouts that a bank's product applies in train mode; None if there are none."""
        if not self._special:
            return None
        if bank not in self._dropouts:
            self._dropouts[bank] = self._find_dropouts(bank)
        return self._dropouts[bank]

    def dropping(self, bank: Bank) -> Dropouts | None:
        """The same, but None if none of them is in train mode."""
        found = self.dropouts(bank)
        return found if found is not None and found.drop() else None

    def _find_dropouts(self, bank: Bank) -> Dropouts | None:
        found = []
        for slot, adapter in self._special.items():
            for i, (layer, part) in enumerate(zip(bank.layers, adapter.parts(bank.layers))):
                dropout, state = adapter.dropouts.get(layer), adapter.dropout_state
                if dropout is not None and state is not None and self._is_fused(slot, bank, part, dropout):
                    found.append(Place(slot, i, dropout, state))
        return Dropouts(found, bank, self.slots) if found else None

    def _is_fused(self, slot: int, bank: Bank, part: LayerWeights | None, dropout: nn.Dropout) -> bool:
        """Whether a product applies an adapter's dropout. Not for DoRA, which also drops inputs of the base layer."""
        is_plain = part is not None and part.magnitude is None and not dropout.inplace
        return is_plain and not bank.is_split and slot not in self.mixed

    def has_dora(self, bank: Bank) -> bool:
        """Whether any adapter in use is a DoRA adapter in a bank's layers."""
        found = self._has_dora.get(bank)
        if found is None:
            parts = [part for adapter in self._special.values() for part in adapter.parts(bank.layers) if part]
            found = self._has_dora[bank] = any(part.magnitude is not None for part in parts)
        return found

    def why_not_compiled(self, banks: Iterable[Bank]) -> str:
        """Why compiled code can't run the plan, or the empty string."""
        for bank in banks if self._special else ():
            apart = self.apart(bank)
            if apart is not None and apart.reason:
                return apart.reason
            if (apart is not None and apart.dropping()) or self.dropping(bank) is not None:
                return "an adapter trains with dropout"
            if self.has_dora(bank):
                return "a DoRA adapter is used, whose norms are computed when a call begins"
        return ""

    def is_whole(self, slots: frozenset[int]) -> bool:
        """Whether every entry names one of these slots."""
        return all(slots.intersection(ids_of(entry)) for entry in self._kinds)

    def without(self, slots: frozenset[int]) -> BatchPlan:
        """The same plan with the base model instead of every entry that names one of these slots."""
        found = self._without.get(slots)
        if found is None:
            found = BatchPlan.__new__(BatchPlan)
            found.ids, found.ids_in_use = self.ids, self.ids_in_use
            found.entries = [BASE if slots.intersection(ids_of(entry)) else entry for entry in self.entries]
            found._fill({slot: adapter for slot, adapter in self.adapters.items() if slot not in slots}, self.slots)
            self._without[slots] = found  # last, because other threads share this plan
        return found

    def alone(self, entry: Entry) -> BatchPlan:
        """A plan with a single sample, which has one of this plan's entries."""
        found = self._alone.get(entry)
        if found is None:
            ids = self.ids[self.entries.index(entry)]
            adapters = dict(zip(self.ids_in_use, self.adapters.values()))
            own = {number: adapters[number] for number in ids_of(ids)}
            found = self._alone[entry] = BatchPlan([ids], own, self.slots)
        return found

    def of_runs(self, runs: tuple[tuple[int, int], ...]) -> BatchPlan:
        """A plan for rows that follow each other in another way than samples do.

        Args:
            runs: samples, each with a number in proportion to the rows that are its own.
        """
        found = self._of_runs.get(runs)  # other threads may replace it: calls with the same ids share this plan
        if found is None:
            unit = math.gcd(*(rows for _, rows in runs))
            ids = [self.ids[sample] for sample, rows in runs for _ in range(rows // unit)]
            adapters = dict(zip(self.ids_in_use, self.adapters.values()))
            used = sorted({number for entry in {*ids} for number in ids_of(entry)})
            found = BatchPlan(ids, {number: adapters[number] for number in used}, self.slots)
            if len(self._of_runs) >= MOST_RUNS:
                self._of_runs = {}
            self._of_runs[runs] = found
        return found

    def weights(self, bank: Bank) -> dict[int, SlotWeights]:
        """The weights in use, by slot, for the torch backend."""
        found = self._weights.get(bank)
        if found is None:
            found = self._weights[bank] = {slot: bank.weights(adapter) for slot, adapter in self.adapters.items()}
        return found

    def component(self, index: int) -> Segments:
        """The segments of a component; of the base model alone if no mixture has that many adapters."""
        none = [BASE] * len(self.entries)
        return self.components[index] if index < len(self.components) else Segments.from_ids(none)

    def packed_at(self, positions: Mapping[int, int]) -> list[Tensor]:
        """The packed plans, with positions instead of slots."""
        positions = {**positions, BASE: BASE}
        with torch.inference_mode(False):
            return [
                Segments.from_ids([positions[slot] for slot in slots], weights=weights).pack()
                for slots, weights in components(self.entries)
            ]

    def positions(self, device: torch.device) -> Tensor:
        """int64 ``[E]``: index of each entry's adapter among those in use; ``-1`` for the base model and mixtures."""
        place = device, streams.key(device)
        found = self._positions.get(place)
        if found is None:
            positions = [BASE if isinstance(entry, tuple) else self._index.get(entry, BASE) for entry in self.entries]
            with torch.inference_mode(False):
                found = self._positions[place] = torch.tensor(positions, dtype=torch.int64, device=device)
        return found

    @cached_property
    def runs(self) -> tuple[Segments, list[Entry]]:
        """Segments with one number per distinct entry, mixtures included, and the entries by that number.

        For layers that run per segment, with all adapters of a mixture active at once.
        """
        slots = {entry: slot for slot, entry in enumerate(self._kinds)}
        with torch.inference_mode(False):
            return Segments.from_ids([slots[entry] for entry in self.entries]), self._kinds

    def tables(self, bank: Bank, device: torch.device) -> tuple[TableRows, ...]:
        """The tables that kernels read, one per dtype."""
        place = bank, device, streams.key(device)
        found = self._tables.get(place)
        if found is None:
            found = self._tables[place] = bank.tables(self.adapters, device, self.slots)
        return found

    def trained(self, bank: Bank) -> TrainedWeights:
        """The weights in use, for products that compute gradients."""
        found = self._trained.get(bank)
        if found is None:
            found = self._trained[bank] = TrainedWeights(self.adapters, bank.layers, self.slots)
        return found


def _with_slots(entry: Entry, slots: Mapping[int, int]) -> Entry:
    if isinstance(entry, tuple):
        return tuple(sorted((slots[number], weight) for number, weight in entry))
    return BASE if entry == BASE else slots[entry]
