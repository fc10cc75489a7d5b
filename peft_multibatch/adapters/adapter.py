"""The interface through which calls read an adapter, in PEFT's modules or in a store."""

from __future__ import annotations

import itertools
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peft_multibatch.adapters.dropout import DropoutState
from peft_multibatch.adapters.slots import Slots
from peft_multibatch.adapters.tables import LayerWeights, SlotRows, TableBlock, WeightFormat, format_of


if TYPE_CHECKING:
    from peft_multibatch.compat import LoraLayer


class AnyAdapter(ABC):
    """One version of an adapter, which doesn't change as long as anything references it.

    Attributes:
        name: the adapter's name.
        serial: a number that no other version of any adapter has.
        apart: layers that run as products for other adapters, but need PEFT's own module for this one -> the reason.
        dropouts: its dropout modules, by layer.
        is_plain: whether it runs as a product in all fast layers, without dropouts and variants, so that layers don't
            have to be checked one by one.
        dropout_state: the seed and step of its masks; None if it has no dropouts.
        layout: an object shared by adapters whose ranks and dtypes are the same in all layers, and whose memory starts
            at a multiple of 16 bytes; None if there is no such object.

    Args:
        name: the adapter's name.
        slots: the pool from which it takes its slot.
    """

    apart: Mapping[Any, str]
    dropouts: Mapping[Any, nn.Dropout]
    is_plain: bool
    dropout_state: DropoutState | None = None
    layout: object | None = None

    def __init__(self, name: str, slots: Slots) -> None:
        self.name = name
        self.serial = next(serials)
        self._slots = slots
        self._slot: int | None = None
        self._lock = threading.RLock()
        self._parts: dict[Any, LayerWeights | None] = {}  # those that were read

    @property
    def slot(self) -> int:
        """Its row in the tables that kernels read, until this version is freed."""
        if self._slot is None:
            with self._lock:
                if self._slot is None:
                    self._slot = self._slots.take()
                    weakref.finalize(self, self._slots.give_back, self._slot).atexit = False
        return self._slot

    @abstractmethod
    def parts(self, layers: Iterable[LoraLayer]) -> list[LayerWeights | None]:
        """The adapter's weights in fast layers; None for layers where it has none, or runs apart."""

    def formats(self, layers: Sequence[LoraLayer]) -> list[WeightFormat]:
        """What tables and graphs depend on, of its weights in fast layers; layers without any are left out."""
        return [format_of(part) for part in self.parts(layers) if part is not None]

    def rows(self, block: TableBlock) -> SlotRows:
        """Its rows in the tables of a block. Those of layers that weren't read, or are elsewhere, stay unknown."""

        def parts(layers: Sequence[LoraLayer]) -> list[LayerWeights | None] | None:
            return [self._parts[layer] for layer in layers] if all(layer in self._parts for layer in layers) else None

        return block.read(self.slot, self.serial, parts)

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All of its weights that have been read so far."""

    @abstractmethod
    def view(self, layer: Any) -> Any:
        """A view of a layer with this adapter active, or with none if it has nothing there."""

    @abstractmethod
    def source(self, layer: Any) -> Any:
        """An object with its entries in a layer, from which views are made."""

    @abstractmethod
    def variant(self, layer: Any) -> str:
        """Its LoRA variant in a layer, or the empty string."""

    @abstractmethod
    def has(self, layer: Any) -> bool:
        """Whether it has weights or other entries in a layer."""


serials = itertools.count()
"""Serial numbers for the versions of all adapters."""
