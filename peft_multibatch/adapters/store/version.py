"""One version of a stored adapter: as it was registered, and as calls use it while its weights are in memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_multibatch.adapters import views
from peft_multibatch.adapters.adapter import AnyAdapter, serials
from peft_multibatch.adapters.slots import Slots
from peft_multibatch.adapters.store.layout import Half, Layout, StoredLayer
from peft_multibatch.adapters.tables import LayerWeights


if TYPE_CHECKING:
    from peft_multibatch.compat import LoraLayer


class Version:
    """An adapter as it was registered; all that ten thousand of them cost while nobody uses them.

    Attributes:
        name: the adapter's name.
        serial: tells this version from all others of all adapters.
        path: of the file with the weights.
        identity: what the file was.
        header: bytes of its header.
        config: a hash of its configuration.
        layout: where the weights lie in memory.
        is_pinned: whether it stays in memory once it is there.
        is_gone: whether it was unregistered, or another one is in its place.
        loading: its load that is under way, or None.
        error: why it couldn't be loaded the last time, or None.
        adapter: what calls use while they do.
    """

    __slots__ = (
        "__weakref__", "adapter", "config", "error", "header", "identity", "is_gone", "is_pinned", "layout", "loading",
        "name", "path", "serial",
    )  # fmt: skip

    def __init__(self, name: str, path: str, identity: bytes, header: int, config: int, layout: Layout) -> None:
        self.name, self.serial = name, next(serials)
        self.path, self.identity, self.header, self.config, self.layout = path, identity, header, config, layout
        self.is_pinned = self.is_gone = False
        self.loading: Any = None
        self.error: Exception | None = None
        self.adapter: weakref.ref[StoredAdapter] | None = None

    def in_memory(self, memory: Tensor, slots: Slots, names: Mapping[Any, str]) -> StoredAdapter:
        """The adapter as calls use it; the same object for as long as anybody does.

        Args:
            memory: its weights.
            slots: where it takes its slot.
            names: of the model's layers.
        """
        adapter = self.adapter() if self.adapter is not None else None
        if adapter is None or adapter.memory is not memory:
            adapter = StoredAdapter(self, memory, slots, names)
            self.adapter = weakref.ref(adapter)
        return adapter


class StoredAdapter(AnyAdapter):
    """A stored adapter whose weights are in memory, where they stay for as long as anybody holds this.

    Attributes:
        name: the adapter's name.
        serial: tells these weights at this place in memory from all others.
        version: as it was registered.
        memory: uint8 ``[size]``, all of its weights.
        apart: never any layer.
        dropouts: never any.
        is_plain: always.
    """

    apart: Mapping[Any, str] = {}
    dropouts: Mapping[Any, Any] = {}
    is_plain = True

    def __init__(self, version: Version, memory: Tensor, slots: Slots, names: Mapping[Any, str]) -> None:
        super().__init__(version.name, slots)
        self.version = version
        self.memory = memory
        self._names = names
        self._memory: dict[torch.dtype, Tensor] = {}
        self._parts: dict[Any, LayerWeights | None] = {}
        self._views: dict[Any, Any] = {}

    @property
    def num_layers(self) -> int:
        """Layers in which it has anything."""
        return len(self.version.layout.layers)

    def tensors(self) -> list[Tensor]:
        """All of its weights, as far as they have been read."""
        return [each for part in list(self._parts.values()) if part is not None for each in part[:2]]

    def ranks(self) -> tuple[int, ...]:
        """Its ranks, in ascending order."""
        return self.version.layout.ranks()

    def parts(self, layers: Iterable[LoraLayer]) -> list[LayerWeights | None]:
        """The adapter's weights in layers; None where it has none."""
        return [self._parts[layer] if layer in self._parts else self._read(layer) for layer in layers]

    def view(self, layer: Any) -> Any:
        """A layer with this adapter active; with none where it has nothing there."""
        return views.view_of(layer, {self.name: self.source(layer)} if self.has(layer) else {})

    def source(self, layer: Any) -> Any:
        """What it has in a layer, from which views are made."""
        if layer not in self._views:
            part = self.parts([layer])[0]
            assert part is not None
            self._views[layer] = views.holding(layer, self.name, part.lora_a, part.lora_b, part.scaling)
        return self._views[layer]

    def variant(self, layer: Any) -> str:
        """The variant of LoRA that it is: none."""
        return ""

    def has(self, layer: Any) -> bool:
        """Whether it has anything in a layer."""
        return self.parts([layer])[0] is not None

    def _read(self, layer: Any) -> LayerWeights | None:
        stored: StoredLayer | None = self.version.layout.layers.get(self._names.get(layer, ""))
        part = None
        if stored is not None:
            with torch.inference_mode(False):  # kept for other calls, which may want gradients
                a, b = self._view(stored.lora_a, stored.dtype), self._view(stored.lora_b, stored.dtype)
            part = LayerWeights(a, b, stored.scaling, (a, b))
        return self._parts.setdefault(layer, part)  # the same tensors for all threads

    def _view(self, half: Half, dtype: torch.dtype) -> Tensor:
        memory = self._memory.get(dtype)
        if memory is None:
            whole = len(self.memory) // dtype.itemsize * dtype.itemsize
            memory = self._memory[dtype] = self.memory[:whole].view(dtype)
        offset = memory.storage_offset() + half.start // dtype.itemsize
        return memory.as_strided(half.shape, (half.shape[1], 1), offset)
