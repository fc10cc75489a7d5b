"""Who serves which sample: the plans of a call, its adapters, and what was made from both."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_multibatch.adapters.weights import Adapter
from peft_multibatch.plan.ids import Entry, slots_of, terms
from peft_multibatch.plan.segments import BASE, Segments


if TYPE_CHECKING:
    from peft_multibatch.adapters.bank import Bank
    from peft_multibatch.adapters.tables import SlotWeights, TableRows


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

    def term(self, index: int) -> Segments:
        """The plan of one term, for which no sample need have an adapter."""
        return self.terms[index] if index < len(self.terms) else Segments.from_ids([BASE] * len(self.ids))

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

    def op_inputs(self, bank: Bank) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
        """Plans, ``lora_A``, ``lora_B``, ranks and scalings of the adapters in use and of no other, for the ops."""
        with torch.inference_mode(False):  # autograd will save them
            if self._dense_plans is None:
                self._dense_plans = [
                    Segments.from_ids([self._index.get(slot, BASE) for slot in slots], weights=weights).pack()
                    for slots, weights in terms(self.ids)
                ]
            return self._dense_plans, *bank.gather(self.adapters.values())
