"""The memory layout of an adapter's weights, checked against the model. Adapters with equal headers share one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from peft_multibatch.adapters.checks import check_scaling
from peft_multibatch.adapters.store.files import StoredTensor, short
from peft_multibatch.adapters.store.patterns import Patterns
from peft_multibatch.adapters.store.settings import Settings
from peft_multibatch.adapters.tables import SlotRows, TableBlock, bits
from peft_multibatch.errors import AdapterMismatchError, AdapterUnsupportedError


StoreDtype = torch.dtype | Literal["file"] | None
"""Values of a store's ``dtype``."""

ALIGNMENT = 16
"""The alignment of matrices in bytes, so that kernels can read 16 bytes at a time."""

KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])\.weight")


class Layers(Protocol):
    """The model's layers, as a store looks them up.

    Attributes:
        names: the names of layers that stored adapters can use, kept up to date.
        changes: a counter of changes: layers that were added, removed or refused.
    """

    names: MutableMapping[Any, str]
    changes: int

    def is_training(self) -> bool:
        """Whether the model is in train mode."""
        ...

    def device(self) -> torch.device:
        """The model's current device."""
        ...

    def module_names(self) -> Iterable[str]:
        """The names of all modules, with PEFT's layers instead of the modules inside them."""
        ...

    def cover(self, name: str, modules: Iterable[str]) -> dict[str, Any]:
        """Prepare modules for a stored adapter; returns their LoRA layers, by module name.

        Raises:
            AdapterMismatchError: there is no such module.
            AdapterUnsupportedError: the module can't have stored adapters.
        """
        ...


class Half(NamedTuple):
    """A matrix in an adapter's memory."""

    start: int
    shape: tuple[int, int]


class StoredLayer(NamedTuple):
    """The weights of an adapter in one layer.

    Attributes:
        lora_a: ``[R, K]``.
        lora_b: ``[N, R]``.
        dtype: the dtype of both.
        scaling: the factor of their product.
    """

    lora_a: Half
    lora_b: Half
    dtype: torch.dtype
    scaling: float


class Copy(NamedTuple):
    """A contiguous range of numbers that is copied from the file, possibly converted to another dtype."""

    source: int
    target: int
    numbers: int
    from_dtype: torch.dtype
    to_dtype: torch.dtype


class Template(NamedTuple):
    """The rows of all adapters with a layout in a block, but with offsets instead of addresses.

    Attributes:
        changes: that of the block when this was made.
        offsets: int64 ``[used, 4]``.
        factors: int64 ``[used, 4]``: 1 for what the address of the adapter's memory is added to, otherwise 0.
        serials: as in ``SlotRows``.
    """

    changes: int
    offsets: np.ndarray
    factors: np.ndarray
    serials: list[dict[int, int]]


class Layout:
    """The memory layout of an adapter's weights.

    Attributes:
        layers: its weights, by module name.
        size: the bytes of its memory.
        file_size: the bytes of the file after the header.
        copies: the ranges to copy from the file into memory.
        is_plain: whether the memory equals the file, byte by byte.
        dropout: the probability of its dropout in train mode.
        checked: the model's counter of changes when ``Layouts`` checked it last.
    """

    def __init__(
        self,
        name: str,
        tensors: Sequence[StoredTensor],
        settings: Settings,
        model: Layers,
        max_rank: int,
        dtype: StoreDtype,
    ) -> None:
        halves = self._halves(name, tensors)
        patterns = Patterns(name)
        _check_names(name, halves, settings.names(patterns, model.module_names()))
        self.dropout = settings.dropout
        self.checked = -1
        self._templates: MutableMapping[TableBlock, Template] = WeakKeyDictionary()
        self._shapes = {
            module: (found["A"].shape, found["B"].shape, settings.rank_of(patterns, module))
            for module, found in halves.items()
        }
        self._max_rank = max_rank
        covered = self.check(name, model)
        self.copies: list[Copy] = []
        self.size = 0
        places: dict[tuple[str, str], tuple[int, torch.dtype]] = {}
        for tensor in tensors:
            module, half = parse_key(name, tensor.key)
            wanted = _dtype_for(covered[module], tensor, dtype)
            places[module, half] = self._place(tensor, wanted), wanted
        self.file_size = sum(each.numbers * each.from_dtype.itemsize for each in self.copies)
        self.is_plain = all(each.source == each.target and each.from_dtype == each.to_dtype for each in self.copies)
        self.layers: dict[str, StoredLayer] = {}
        for module, found in halves.items():
            scaling = settings.scaling_of(patterns, module, self._shapes[module][2])
            check_scaling(name, scaling)
            (a, dtype_a), (b, dtype_b) = places[module, "A"], places[module, "B"]
            if dtype_a != dtype_b:
                raise AdapterMismatchError(
                    f"adapter {name!r} has lora_A of {dtype_a} and lora_B of {dtype_b} in {module}: expected the same "
                    "dtype. Leave dtype out of adapter_store, which then converts them."
                )
            self.layers[module] = StoredLayer(Half(a, found["A"].shape), Half(b, found["B"].shape), dtype_a, scaling)

    def check(self, name: str, model: Layers) -> dict[str, Any]:
        """Check the adapter against the model; returns the layers for which it has weights, by module name.

        Raises:
            AdapterMismatchError: it doesn't fit the model.
            AdapterUnsupportedError: a layer can't have stored adapters.
        """
        covered = model.cover(name, self._shapes)
        self._templates.clear()  # layers may have other names now
        for module, (a, b, rank) in self._shapes.items():
            layer = covered[module]
            if not (a == (rank, layer.in_features) and b == (layer.out_features, rank)):
                raise AdapterMismatchError(
                    f"adapter {name!r} has lora_A of shape {[*a]} and lora_B of shape {[*b]} in {module}, where its "
                    f"configuration has rank {rank}: expected [{rank}, {layer.in_features}] and "
                    f"[{layer.out_features}, {rank}]. Save it again, from the model for which it was trained."
                )
            if rank > self._max_rank:
                raise AdapterMismatchError(
                    f"adapter {name!r} has rank {rank} in {module}: expected {self._max_rank} at most. Pass a larger "
                    "max_rank to adapter_store."
                )
        return covered

    def rows(self, block: TableBlock, names: Mapping[Any, str], address: int) -> SlotRows:
        """The rows of an adapter with this layout, without a loop over layers.

        Args:
            block: the block of tables.
            names: the names of the model's layers.
            address: the address of the adapter's memory.
        """
        found = self._templates.get(block)
        if found is None or found.changes != block.changes:
            found = self._templates[block] = self._template(block, names)
        return SlotRows(found.offsets + found.factors * address, found.serials)

    def _template(self, block: TableBlock, names: Mapping[Any, str]) -> Template:
        offsets = np.zeros((block.used, 4), dtype=np.int64)
        serials = []
        for table in block.tables():
            found = [self.layers.get(names.get(layer, "")) for layer in table.layers]
            if {stored.dtype for stored in found if stored is not None}.issubset(table.dtypes):
                serials.append(table.serials)
            for place, stored in enumerate(found, table.first):
                if stored is not None and stored.dtype == table.dtype:
                    a, b, rank = stored.lora_a.start, stored.lora_b.start, stored.lora_a.shape[0]
                    offsets[place] = a, b, rank, bits(stored.scaling)
        factors = (offsets[:, 2:3] > 0) * np.array([1, 1, 0, 0])
        return Template(block.changes, offsets, factors, serials)

    def fill(self, memory: Tensor, file: Tensor) -> None:
        """Copy weights from the file's contents into memory, and convert their dtypes.

        Args:
            memory: uint8 ``[size]``.
            file: uint8 ``[file_size]``.
        """
        for each in self.copies:
            source = file[each.source : each.source + each.numbers * each.from_dtype.itemsize]
            target = memory[each.target : each.target + each.numbers * each.to_dtype.itemsize]
            target.view(each.to_dtype).copy_(source.view(each.from_dtype))

    def ranks(self) -> tuple[int, ...]:
        """Its ranks, in ascending order."""
        return tuple(sorted({layer.lora_a.shape[0] for layer in self.layers.values()}))

    def _halves(self, name: str, tensors: Sequence[StoredTensor]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for tensor in tensors:
            module, half = parse_key(name, tensor.key)
            if half in found.setdefault(module, {}):
                raise AdapterMismatchError(
                    f"adapter {name!r} has lora_{half} of {short(module)} twice: expected one. Save the adapter again."
                )
            found[module][half] = tensor
        for module, halves in found.items():
            if len(halves) < 2:
                missing = "A" if "B" in halves else "B"
                raise AdapterMismatchError(
                    f"adapter {name!r} has no lora_{missing} in {short(module)}: expected lora_A and lora_B. Save it "
                    "again, from a model that has all of its weights."
                )
        return found

    def _place(self, tensor: StoredTensor, dtype: torch.dtype) -> int:
        count = tensor.shape[0] * tensor.shape[1]
        last = self.copies[-1] if self.copies else None
        start = -(-self.size // ALIGNMENT) * ALIGNMENT
        self.size = start + count * dtype.itemsize
        if (
            last is not None
            and last[3:] == (tensor.dtype, dtype)
            and last.source + last.numbers * tensor.dtype.itemsize == tensor.start
            and last.target + last.numbers * dtype.itemsize == start
        ):
            self.copies[-1] = last._replace(numbers=last.numbers + count)
        else:
            self.copies.append(Copy(tensor.start, start, count, tensor.dtype, dtype))
        return start


def parse_key(name: str, key: str) -> tuple[str, str]:
    """Parse a tensor's name into the module's name and ``"A"`` or ``"B"``.

    Raises:
        AdapterUnsupportedError: it isn't a LoRA matrix of a linear layer.
    """
    found = KEY.fullmatch(key)
    if found is None:
        raise AdapterUnsupportedError(
            f"adapter {name!r} has the tensor {key[:120]!r}: expected only lora_A.weight and lora_B.weight of linear "
            "layers, because a store supports nothing else. Use load_adapter."
        )
    return found["module"], found["half"]


def _check_names(name: str, found: Mapping[str, Any], wanted: set[str]) -> None:
    """Check that the file has weights for exactly the modules that PEFT would adapt.

    PEFT silently ignores other weights, and initializes missing ones.

    Raises:
        AdapterMismatchError: weights are missing, or there are others.
    """
    if not found and not wanted:
        raise AdapterMismatchError(
            f"adapter {name!r} has no weights, so it would equal the base model: expected some. Save it again."
        )
    for what, names in (("no weights for", wanted - found.keys()), ("weights for", found.keys() - wanted)):
        if names:
            is_in = "its configuration names" if what.startswith("no") else "isn't in its configuration or the model"
            raise AdapterMismatchError(
                f"adapter {name!r} has {what} {short(min(names))}, which {is_in}, and {len(names) - 1} more like it: "
                "expected weights for exactly the modules that target_modules names in this model. Save it again, "
                "from the model for which it was trained."
            )


def _dtype_for(layer: Any, tensor: StoredTensor, asked: StoreDtype) -> torch.dtype:
    """The dtype of a matrix in memory: the requested one, or that of PEFT's ``load_adapter`` in this layer."""
    if isinstance(asked, torch.dtype):
        return asked
    if asked == "file":
        return tensor.dtype
    weight = getattr(layer.get_base_layer(), "weight", None)
    return torch.float64 if getattr(weight, "dtype", None) == torch.float64 else torch.float32
