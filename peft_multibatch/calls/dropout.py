"""Dropout in a call: the seed and step of each adapter, and the masks for the layers of a bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_multibatch import streams
from peft_multibatch.adapters.dropout import Draw, DropoutState
from peft_multibatch.adapters.views import STATE
from peft_multibatch.ops.dropout import LARGEST_KEY, DropTable, Mask, Masks, table_rows


if TYPE_CHECKING:
    from peft_multibatch.adapters.bank import Bank


class Draws:
    """The seed and step of each adapter in one call, drawn when the adapter first applies dropout.

    Layers that ``backward`` runs again share the draws and continue counting their uses from the same number as the
    first time, so they get the same masks.
    """

    def __init__(self) -> None:
        self._drawn: dict[DropoutState, Draw] = {}
        self._uses: dict[nn.Module, int] = {}
        self._steps: dict[tuple[torch.device, int], tuple[dict[int, int], Tensor]] = {}

    def again(self) -> Draws:
        """The same draws, for layers that ``backward`` runs again from here."""
        again = Draws()
        again._drawn, again._steps, again._uses = self._drawn, self._steps, {**self._uses}
        return again

    def of(self, state: DropoutState) -> Draw:
        """The draw of an adapter."""
        found = self._drawn.get(state)
        if found is None:
            found = self._drawn[state] = state.draw()
        return found

    def uses(self, layer: nn.Module) -> int:
        """How often a layer has run in the call. A layer that runs several times gets a new mask each time."""
        return self._uses.get(layer, 0)

    def count(self, layer: nn.Module) -> None:
        """Count a run of a layer."""
        self._uses[layer] = self.uses(layer) + 1

    def steps(self, steps: Mapping[int, int], slots: int, device: torch.device) -> Tensor:
        """The steps of some slots as kernels read them, ``DropTable.steps``; copied only once for all layers."""
        place = device, streams.key(device)
        known, tensor = self._steps.get(place, ({}, None))
        if tensor is None or len(tensor) != slots or not steps.items() <= known.items():
            known = {**known, **steps}
            numbers = [known.get(slot, 0) & 0x7FFFFFFF for slot in range(slots)]
            tensor = torch.tensor(numbers, dtype=torch.int32, device="cpu").to(device, non_blocking=True)
            self._steps[place] = known, tensor
        return tensor


class Place(NamedTuple):
    """A dropout module of an adapter in use.

    Attributes:
        slot: the adapter's slot.
        i: the slice.
        module: PEFT's dropout module.
        state: the adapter's dropout state.
    """

    slot: int
    i: int
    module: nn.Dropout
    state: DropoutState

    @property
    def drops(self) -> bool:
        """Whether it is in train mode, with a probability above 0."""
        return bool(self.module.training and self.module.p)


class Dropouts:
    """The dropouts that a bank's product applies for the adapters of a plan.

    Args:
        places: the dropouts.
        bank: the bank.
        slots: the number of slots.
    """

    def __init__(self, places: Sequence[Place], bank: Bank, slots: int) -> None:
        self._places, self._slots = places, slots
        self._layers: Sequence[Any] = bank.layers
        # by device and stream: the values from which a table was made, and the table
        self._tables: dict[tuple[torch.device, int], tuple[Any, Tensor]] = {}

    def drop(self) -> bool:
        """Whether any of them is in train mode."""
        return any(place.drops for place in self._places)

    def _live(self) -> list[Place]:
        return [place for place in self._places if place.drops]

    def masks(self, draws: Draws) -> Masks:
        """The masks of a call, by slot and slice, of the dropouts in train mode."""
        names = [layer.__dict__[STATE].name for layer in self._layers]
        uses = list(map(draws.uses, self._layers))
        found = {}
        for slot, i, module, state in self._live():
            seed, step = draws.of(state)
            found[slot, i] = Mask(state.key(seed, names[i]) + uses[i] & LARGEST_KEY, step, module.p)
        return found

    def table(self, draws: Draws, device: torch.device) -> DropTable:
        """The masks as kernels read them. Only the steps change between calls, unless the user changes dropouts."""
        live = self._live()
        steps, seeds = {}, []
        for place in live:
            seed, steps[place.slot] = draws.of(place.state)
            seeds.append(seed)
        made_from = live, seeds, [place.module.p for place in live], list(map(draws.uses, self._layers))
        place_of = device, streams.key(device)
        known = self._tables.get(place_of)
        if known is None or known[0] != made_from:
            with torch.inference_mode(False):
                rows = table_rows(self.masks(draws), self._slots, len(self._layers), device)
            known = self._tables[place_of] = made_from, rows
        return DropTable(known[1], draws.steps(steps, self._slots, device))
