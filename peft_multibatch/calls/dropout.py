"""Dropout in a call: at which step each adapter drops, and what that means for the layers of a bank."""

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
    """What the adapters of one call draw, once each, when they first drop anything.

    What ``backward`` runs again shares it, and counts the uses of its layers from where they were the first time, so
    that it drops the same.
    """

    def __init__(self) -> None:
        self._drawn: dict[DropoutState, Draw] = {}
        self._uses: dict[nn.Module, int] = {}
        self._steps: dict[tuple[torch.device, int], tuple[dict[int, int], Tensor]] = {}

    def again(self) -> Draws:
        """The same for what is run again from here on."""
        again = Draws()
        again._drawn, again._steps, again._uses = self._drawn, self._steps, {**self._uses}
        return again

    def of(self, state: DropoutState) -> Draw:
        """What an adapter drew."""
        found = self._drawn.get(state)
        if found is None:
            found = self._drawn[state] = state.draw()
        return found

    def uses(self, layer: nn.Module) -> int:
        """How often a layer has run in the call, as a layer that a model calls several times drops anew each time."""
        return self._uses.get(layer, 0)

    def count(self, layer: nn.Module) -> None:
        """A layer has run."""
        self._uses[layer] = self.uses(layer) + 1

    def steps(self, steps: Mapping[int, int], slots: int, device: torch.device) -> Tensor:
        """The steps of some slots as kernels read them, ``DropTable.steps``; copied once for all layers."""
        place = device, streams.key(device)
        known, tensor = self._steps.get(place, ({}, None))
        if tensor is None or len(tensor) != slots or not steps.items() <= known.items():
            known = {**known, **steps}
            numbers = [known.get(slot, 0) & 0x7FFFFFFF for slot in range(slots)]
            tensor = torch.tensor(numbers, dtype=torch.int32, device="cpu").to(device, non_blocking=True)
            self._steps[place] = known, tensor
        return tensor


class Place(NamedTuple):
    """A dropout of an adapter in use.

    Attributes:
        slot: the adapter's.
        i: the slice.
        module: PEFT's.
        state: the adapter's.
    """

    slot: int
    i: int
    module: nn.Dropout
    state: DropoutState

    @property
    def drops(self) -> bool:
        """Whether it drops anything now."""
        return bool(self.module.training and self.module.p)


class Dropouts:
    """The dropouts of the adapters of a plan in the layers of a bank, which a product applies by itself.

    Args:
        places: which they are.
        bank: the layers.
        slots: how many slots there are.
    """

    def __init__(self, places: Sequence[Place], bank: Bank, slots: int) -> None:
        self._places, self._slots = places, slots
        self._layers: Sequence[Any] = bank.layers
        # for each device and stream, the table and what it was made from
        self._tables: dict[tuple[torch.device, int], tuple[Any, Tensor]] = {}

    def drop(self) -> bool:
        """Whether any of them drops anything now."""
        return any(place.drops for place in self._places)

    def _live(self) -> list[Place]:
        return [place for place in self._places if place.drops]

    def masks(self, draws: Draws) -> Masks:
        """The masks of a call, by slot and slice, of those that drop anything."""
        names = [layer.__dict__[STATE].name for layer in self._layers]
        uses = list(map(draws.uses, self._layers))
        found = {}
        for slot, i, module, state in self._live():
            seed, step = draws.of(state)
            found[slot, i] = Mask(state.key(seed, names[i]) + uses[i] & LARGEST_KEY, step, module.p)
        return found

    def table(self, draws: Draws, device: torch.device) -> DropTable:
        """The same as kernels read it. All but the steps is made once, and again where a user changes dropouts."""
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
