"""Banks as kernels read them: addresses, ranks and scalings in tensors at fixed addresses.

All tables of a device are in a few blocks, slot by slot, so that one copy brings all rows of a new adapter there, for
every layer of the model.
"""

from __future__ import annotations

import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from peft_multibatch import streams


# One adapter in one projection group: for each slice, lora_A transposed [K, R], lora_B transposed [R, N] and the
# scaling, or None if the adapter has no weights for the slice.
Projection = tuple[Tensor, Tensor, float]
SlotWeights = list[Projection | None]

WIDTH = 512
"""The rows of a block for each slot: 16 kB. Copies of up to 64 kB from pageable memory never wait for the device."""


class LayerWeights(NamedTuple):
    """The weights of one adapter in one layer, when it was read.

    Attributes:
        lora_a: ``[R, K]``; shares the memory that PEFT's parameter had then.
        lora_b: ``[N, R]``, likewise.
        scaling: the factor of the product.
        parameters: PEFT's own ``lora_A`` and ``lora_B``, which get gradients; empty for stored adapters.
        magnitude: the magnitudes of a DoRA adapter, ``[N]``, or None.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    parameters: tuple[Tensor, ...] = ()
    magnitude: Tensor | None = None


class TableRows(NamedTuple):
    """A table as an argument of kernels.

    Attributes:
        rows: int64 ``[slots, I, 4]``: addresses of ``lora_A`` and ``lora_B``, rank, bits of the float32 scaling. Slots
            may be any distance apart in memory.
        dtype: dtype of all weights in the table, or None if they aren't contiguous or don't share a dtype.
        rank: largest rank in use.
        is_aligned: whether all weights in use can be read 16 bytes at a time.
    """

    rows: Tensor
    dtype: torch.dtype | None
    rank: int
    is_aligned: bool


class WeightFormat(NamedTuple):
    """What tables and graphs depend on, of the weights of one adapter in one layer.

    Attributes:
        dtype: the common dtype of ``lora_A`` and ``lora_B``; None if they differ or aren't contiguous.
        rank: their rank.
        is_aligned: whether both can be read 16 bytes at a time.
        devices: the devices of both.
    """

    dtype: torch.dtype | None
    rank: int
    is_aligned: bool
    devices: tuple[torch.device, torch.device]


class SlotRows(NamedTuple):
    """An adapter's rows in a block.

    Attributes:
        numbers: int64 ``[used, 4]``, as in ``TableRows``.
        serials: those of the tables in which all of them are up to date.
    """

    numbers: np.ndarray
    serials: Sequence[dict[int, int]]


class InSlot(Protocol):
    """An adapter, as tables need it.

    Attributes:
        serial: as in ``AnyAdapter``.
    """

    serial: int

    def rows(self, block: TableBlock) -> SlotRows:
        """Its rows in a block."""
        ...


class WeightTable:
    """A bank as kernels read it: the addresses, rank and scaling of every slot and slice.

    The tensor never moves, so captured graphs see every update.

    Attributes:
        block: the block that contains it.
        first, span: its first row there, and all of them.
        dtype: the dtype of the weights in this table; the rows of all others have rank 0. None for weights that aren't
            contiguous, or whose ``lora_A`` and ``lora_B`` have different dtypes.
        layers: the bank's layers, one per slice.
        dtypes: the dtypes of all of the bank's tables on this device, kept up to date.
        serials: the serial numbers of the adapters whose rows are in the table, by slot.
        rows: as in ``TableRows``.
    """

    def __init__(
        self,
        block: TableBlock,
        first: int,
        dtype: torch.dtype | None,
        layers: Sequence[Any],
        dtypes: Collection[torch.dtype | None],
    ) -> None:
        self.block, self.first, self.dtype, self.layers, self.dtypes = block, first, dtype, tuple(layers), dtypes
        self.span = slice(first, first + len(self.layers))
        self.serials: dict[int, int] = {}
        with torch.inference_mode(False):
            self.rows = block.rows[:, self.span].data  # an input of graphs, which should be no view

    def describe(self, slots: Iterable[int]) -> TableRows:
        """The table as an argument of kernels that read only these slots."""
        a, b, rank, _ = self.block.numbers[[*slots], self.span].reshape(-1, 4).T
        is_aligned = not ((a | b | 2 * rank) % 16).any()
        return TableRows(self.rows, self.dtype, int(rank.max(initial=0)), is_aligned)


class TableBlock:
    """Tables of many banks, slot by slot. Not thread-safe: callers hold the lock of ``Tables``.

    Attributes:
        slots: the number of slots.
        device: the device of all tables, and of all weights in them.
        rows: int64 ``[slots, WIDTH, 4]``.
        numbers: the same in host memory.
        used: the rows per slot that tables have taken.
        changes: that of ``Tables``.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.slots = slots
        self.numbers = np.zeros((slots, WIDTH, 4), dtype=np.int64)
        with torch.inference_mode(False):  # the tables are reused by later calls
            self.rows = torch.from_numpy(self.numbers).to(device, copy=True)
        self.device = self.rows.device
        streams.after_write(self.device)
        weakref.finalize(self, streams.keep_for_all, [self.rows]).atexit = False
        self.used = self.changes = 0
        self._tables: weakref.WeakValueDictionary[int, WeightTable] = weakref.WeakValueDictionary()
        self._free: dict[int, list[int]] = {}  # first rows, by number of rows
        self._returned: deque[tuple[int, int]] = deque()  # appended without a lock, by any thread that frees a table

    @property
    def is_used(self) -> bool:
        """Whether any bank still uses a table in it."""
        return len(self._tables) > 0

    def tables(self) -> list[WeightTable]:
        """The tables in it that banks still use."""
        return list(self._tables.values())

    def add(self, dtype: torch.dtype | None, layers: Sequence[Any], dtypes: Collection) -> WeightTable | None:
        """A new table, without any adapter's rows; None if there is no room."""
        while self._returned:
            first, count = self._returned.popleft()
            self._free.setdefault(count, []).append(first)
        count, free = len(layers), self._free.get(len(layers))
        if not free and self.used + count > WIDTH:
            return None
        first = free.pop() if free else self.used
        self.used = max(self.used, first + count)
        self._clear(slice(first, first + count))
        table = self._tables[first] = WeightTable(self, first, dtype, layers, dtypes)
        # not when the table is freed, because captured graphs may still read its rows
        weakref.finalize(table.rows, self._returned.append, (first, count)).atexit = False
        return table

    def _clear(self, span: slice) -> None:
        """Remove the rows of a table that was freed."""
        with torch.inference_mode(False), streams.writing(self.device):
            for slot in np.flatnonzero(self.numbers[:, span].any((1, 2))).tolist():
                self._copy(slot, span, np.zeros_like(self.numbers[slot, span]))

    def _copy(self, slot: int, span: slice, numbers: np.ndarray) -> None:
        # a copy from the host instead of a kernel, because kernels read tables before they wait for the kernel that
        # was launched right before them
        self.rows[slot, span].copy_(torch.from_numpy(numbers), non_blocking=True)
        self.numbers[slot, span] = numbers

    def read(
        self, slot: int, serial: int, parts_in: Callable[[Sequence[Any]], Sequence[LayerWeights | None] | None]
    ) -> SlotRows:
        """The rows of an adapter, from its weights in each table's layers, or None where they aren't known yet."""
        numbers = self.numbers[slot, : self.used].copy()
        places: list[int] = []
        found: list[tuple[int, int, int, int]] = []
        serials = []
        for table in self.tables():
            parts = parts_in(table.layers) if table.serials.get(slot) != serial else None
            if parts is None:
                continue
            formats = [part and format_of(part) for part in parts]
            if all(
                each is None or (each.devices == (self.device, self.device) and each.dtype in table.dtypes)
                for each in formats
            ):
                serials.append(table.serials)
                places += range(table.first, table.first + len(parts))
                found += [
                    (part.lora_a.data_ptr(), part.lora_b.data_ptr(), each.rank, bits(part.scaling))
                    if part is not None and each is not None and each.dtype == table.dtype
                    else (0, 0, 0, 0)
                    for part, each in zip(parts, formats)
                ]
        if places:
            numbers[places] = found
        return SlotRows(numbers, serials)

    def write(self, adapters: Mapping[int, InSlot]) -> None:
        """Bring the rows of adapters, by slot, up to date in all tables. Copies nothing if nothing changed."""
        found = {slot: adapter.rows(self) for slot, adapter in adapters.items()}
        whole = slice(0, self.used)
        changed = [slot for slot, each in found.items() if not np.array_equal(each.numbers, self.numbers[slot, whole])]
        if changed:
            with torch.inference_mode(False), streams.writing(self.device):
                for slot in changed:
                    self._copy(slot, whole, found[slot].numbers)
        for slot, rows in found.items():
            for serials in rows.serials:
                serials[slot] = adapters[slot].serial


class Tables:
    """All tables of a model, in blocks.

    Attributes:
        lock: held by those who call its methods, or change what they know about tables.
        changes: a counter of tables that were made.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.changes = 0
        self._blocks: list[TableBlock] = []

    def make(
        self,
        dtype: torch.dtype | None,
        slots: int,
        layers: Sequence[Any],
        dtypes: Collection[torch.dtype | None],
        device: torch.device,
    ) -> WeightTable:
        """A new table, in a block of this many slots; the other arguments are as in ``WeightTable``."""
        self._blocks = [block for block in self._blocks if block.is_used]
        fitting = (block for block in self._blocks if block.device == device and block.slots == slots)
        table = next(filter(None, (block.add(dtype, layers, dtypes) for block in fitting)), None)
        if table is None:
            block = TableBlock(slots, device)
            self._blocks.append(block)
            table = block.add(dtype, layers, dtypes)
            assert table is not None, len(layers)
        self.changes += 1
        for block in self._blocks:
            block.changes = self.changes
        return table

    def write(self, adapters: Mapping[int, InSlot], device: torch.device) -> None:
        """Bring the rows of adapters, by slot, up to date in all tables of a device."""
        for block in self._blocks:
            if block.device == device and block.is_used:
                block.write({slot: adapter for slot, adapter in adapters.items() if slot < block.slots})


def format_of(part: LayerWeights) -> WeightFormat:
    """The format of weights."""
    a, b, rank = part.lora_a, part.lora_b, len(part.lora_a)
    dtype = a.dtype if a.dtype == b.dtype and a.is_contiguous() and b.is_contiguous() else None
    is_aligned = a.data_ptr() % 16 == b.data_ptr() % 16 == rank % 8 == 0
    return WeightFormat(dtype, rank, is_aligned, (a.device, b.device))


_FLOAT, _BITS = struct.Struct("f"), struct.Struct("i")


def bits(scaling: float) -> int:
    """The bits of a float32 scaling."""
    return _BITS.unpack(_FLOAT.pack(scaling))[0]
