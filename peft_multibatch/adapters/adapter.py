"""What calls compute with of one adapter, wherever its weights are."""

from __future__ import annotations

import itertools
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peft_multibatch.adapters.dropout import DropoutState
from peft_multibatch.adapters.slots import Slots
from peft_multibatch.adapters.tables import LayerWeights


if TYPE_CHECKING:
    from peft_multibatch.compat import LoraLayer


class AnyAdapter(ABC):
    """One version of an adapter, which stays as it is for as long as anybody holds it.

    Attributes:
        name: the adapter's name.
        serial: tells this object from all others.
        apart: the layers, of those that run as products, in which only PEFT's own module can run it, and why.
        dropouts: its dropouts, by the layer.
        is_plain: whether it runs as a product wherever layers do, without dropouts and variants, so that nobody has to
            ask layer by layer.
        dropout_state: what its masks follow from; None where it has no dropouts.

    Args:
        name: the adapter's name.
        slots: where it takes its slot.
    """

    apart: Mapping[Any, str]
    dropouts: Mapping[Any, nn.Dropout]
    is_plain: bool
    dropout_state: DropoutState | None = None

    def __init__(self, name: str, slots: Slots) -> None:
        self.name = name
        self.serial = next(serials)
        self._slots = slots
        self._slot: int | None = None
        self._lock = threading.RLock()

    @property
    def slot(self) -> int:
        """Its row in the tables that kernels read, for as long as anybody needs this version."""
        with self._lock:
            if self._slot is None:
                self._slot = self._slots.take()
                weakref.finalize(self, self._slots.give_back, self._slot).atexit = False
            return self._slot

    @abstractmethod
    def parts(self, layers: Iterable[LoraLayer]) -> list[LayerWeights | None]:
        """The adapter's weights in layers that run as products; None where it has none, or runs apart."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All of its weights, as far as they have been read."""

    @abstractmethod
    def view(self, layer: Any) -> Any:
        """A layer with this adapter active; with none where it has nothing there."""

    @abstractmethod
    def source(self, layer: Any) -> Any:
        """What it has in a layer, from which views are made."""

    @abstractmethod
    def variant(self, layer: Any) -> str:
        """The variant of LoRA that it is in a layer; the empty string where it is none."""

    @abstractmethod
    def has(self, layer: Any) -> bool:
        """Whether it has anything in a layer."""


serials = itertools.count()
"""Numbers that tell versions of all adapters from one another."""
