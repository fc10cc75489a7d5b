"""Versions of stored adapters, as registered and as calls use them while their weights are in memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_multibatch.adapters import views
from peft_multibatch.adapters.adapter import AnyAdapter, serials
from peft_multibatch.adapters.slots import Slots
from peft_multibatch.adapters.store.layout import ALIGNMENT, Half, Layout, StoredLayer
from peft_multibatch.adapters.tables import LayerWeights, SlotRows, TableBlock, WeightFormat


if TYPE_CHECKING:
    from peft_multibatch.compat import LoraLayer


class Version:
    """A registered version of an adapter. All that an adapter costs while it isn't in memory.

    Attributes:
        name: the adapter's name.
        serial: a number that no other version of any adapter has.
        path: the path of the weights.
        identity: the file's identity at registration.
        header: the length of its header in bytes.
        config: a hash of its configuration.
        layout: the memory layout of the weights.
        is_pinned: whether it stays in memory once it was loaded.
        is_gone: whether it was unregistered or replaced.
        loading: the ``Load`` that is running, or None.
        error: why the last load failed, or None.
        adapter: a weak reference to the object that calls use, or None.
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
        """The adapter for calls; the same object as long as any call uses it.

        Args:
            memory: its weights.
            slots: the pool from which it takes its slot.
            names: the names of the model's layers.
        """
        adapter = self.adapter() if self.adapter is not None else None
        if adapter is None or adapter.memory is not memory:
            adapter = StoredAdapter(self, memory, slots, names)
            self.adapter = weakref.ref(adapter)
        return adapter


class StoredAdapter(AnyAdapter):
    """A stored adapter whose weights are in memory, where they stay as long as this object is referenced.

    Attributes:
        name: the adapter's name.
        serial: a number that no other version of any adapter has, and that changes when it is loaded again.
        version: the registered version.
        memory: uint8 ``[size]``, all of its weights.
        apart: always empty.
        dropouts: always empty.
        is_plain: always True.
        layout: as in ``AnyAdapter``.
    """

    apart: Mapping[Any, str] = {}
    dropouts: Mapping[Any, Any] = {}
    is_plain = True

    def __init__(self, version: Version, memory: Tensor, slots: Slots, names: Mapping[Any, str]) -> None:
        super().__init__(version.name, slots)
        self.version = version
        self.memory = memory
        self._names = names
        self.layout = version.layout if memory.data_ptr() % ALIGNMENT == 0 else None
        self._memory: dict[torch.dtype, Tensor] = {}
        self._views: dict[Any, Any] = {}

    @property
    def num_layers(self) -> int:
        """The number of layers in which it has weights."""
        return len(self.version.layout.layers)

    def tensors(self) -> list[Tensor]:
        """All of its weights that have been used so far."""
        return [each for part in list(self._parts.values()) if part is not None for each in part[:2]]

    def ranks(self) -> tuple[int, ...]:
        """Its ranks, in ascending order."""
        return self.version.layout.ranks()

    def parts(self, layers: Iterable[LoraLayer]) -> list[LayerWeights | None]:
        """The adapter's weights in layers; None for layers where it has none."""
        return [self._parts[layer] if layer in self._parts else self._read(layer) for layer in layers]

    def formats(self, layers: Sequence[LoraLayer]) -> list[WeightFormat]:
        """As in ``AnyAdapter``."""
        found = [self.version.layout.layers.get(self._names.get(layer, "")) for layer in layers]
        device, is_aligned = self.memory.device, self.layout is not None
        return [
            WeightFormat(
                each.dtype, each.lora_a.shape[0], is_aligned and each.lora_a.shape[0] % 8 == 0, (device, device)
            )
            for each in found
            if each is not None
        ]

    def rows(self, block: TableBlock) -> SlotRows:
        """As in ``AnyAdapter``, for all layers."""
        if self.memory.device != block.device:
            return SlotRows(block.numbers[self.slot, : block.used], ())
        return self.version.layout.rows(block, self._names, self.memory.data_ptr())

    def view(self, layer: Any) -> Any:
        """A view of a layer with this adapter active, or with none if it has no weights there."""
        return views.view_of(layer, {self.name: self.source(layer)} if self.has(layer) else {})

    def source(self, layer: Any) -> Any:
        """A view with its weights in a layer, from which other views are made."""
        if layer not in self._views:
            part = self.parts([layer])[0]
            assert part is not None
            self._views[layer] = views.holding(layer, self.name, part.lora_a, part.lora_b, part.scaling)
        return self._views[layer]

    def variant(self, layer: Any) -> str:
        """Its LoRA variant: always the empty string."""
        return ""

    def has(self, layer: Any) -> bool:
        """Whether it has weights in a layer."""
        return self.parts([layer])[0] is not None

    def _read(self, layer: Any) -> LayerWeights | None:
        stored: StoredLayer | None = self.version.layout.layers.get(self._names.get(layer, ""))
        part = None
        if stored is not None:
            with torch.inference_mode(False):  # other calls reuse these, possibly with gradients
                a, b = self._view(stored.lora_a, stored.dtype), self._view(stored.lora_b, stored.dtype)
            part = LayerWeights(a, b, stored.scaling, (a, b))
        return self._parts.setdefault(layer, part)  # so that all threads use the same tensors

    def _view(self, half: Half, dtype: torch.dtype) -> Tensor:
        memory = self._memory.get(dtype)
        if memory is None:
            whole = len(self.memory) // dtype.itemsize * dtype.itemsize
            memory = self._memory[dtype] = self.memory[:whole].view(dtype)
        offset = memory.storage_offset() + half.start // dtype.itemsize
        return memory.as_strided(half.shape, (half.shape[1], 1), offset)
