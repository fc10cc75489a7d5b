"""A call in force: who serves which sample, and what was made for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_multibatch.adapters.bank import Adapter
from peft_multibatch.errors import RowMappingError, UnsupportedError
from peft_multibatch.plan.ids import Entry, slots_of, terms
from peft_multibatch.plan.segments import BASE, Segments


if TYPE_CHECKING:
    from peft_multibatch.adapters.bank import Bank
    from peft_multibatch.adapters.tables import TableRows
    from peft_multibatch.calls.graphs import InForce
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
        packed: True where entries are tokens, all in one row, as in continuous batching, whose steps run to their end
            as they began even if another thread disables adapters in between.
        for_graphs: True where CUDA graphs are captured of the call, which runs as they will from the beginning.
        inside: True while a model's forward runs that has checked this call.
        ended: True when it is no longer in force.
        thread: the thread on which it began.
        task: the asyncio task.
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
        self.for_graphs = False
        self.inside = False
        self.ended = False
        self.thread: InForce | None = None
        self.task = 0
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

    def num_rows(self, shape: Sequence[int]) -> int:
        """Rows that belong to entries in a layer's input of the shape ``[..., K]``.

        Raises:
            RowMappingError: they are no multiple of the entries.
        """
        rows = math.prod(shape[:-1]) if self.packed else shape[0]
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
