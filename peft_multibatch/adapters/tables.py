"""A bank in the form that kernels read: addresses, ranks and scalings in a tensor that stays where it is."""

from __future__ import annotations

import struct
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_multibatch import streams


# One adapter in one projection group: for each slice lora_A transposed [K, R], lora_B transposed [R, N] and the
# scaling, or None where this adapter has no weights for this slice.
Projection = tuple[Tensor, Tensor, float]
SlotWeights = list[Projection | None]


class LayerWeights(NamedTuple):
    """One adapter in one layer, as it was when it was read.

    Attributes:
        lora_a: ``[R, K]``; shares PEFT's memory, and stays where it is when PEFT's parameter gets other memory.
        lora_b: ``[N, R]``, likewise.
        scaling: what the product is multiplied with.
        parameters: PEFT's own ``lora_A`` and ``lora_B``, to which gradients go; empty where nobody trains.
        magnitude: of a DoRA adapter, ``[N]``.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    parameters: tuple[Tensor, ...] = ()
    magnitude: Tensor | None = None


class TableRows(NamedTuple):
    """What kernels take of a table.

    Attributes:
        rows: int64 ``[slots, I, 4]``: addresses of ``lora_A`` and ``lora_B``, rank, bits of the float32 scaling.
        dtype: dtype of all weights in the table, or None where they can't be read row by row.
        rank: largest rank in use.
        is_aligned: whether all weights in use can be read 16 bytes at a time.
    """

    rows: Tensor
    dtype: torch.dtype | None
    rank: int
    is_aligned: bool


class Row(NamedTuple):
    """One slice of a slot.

    Attributes:
        a: address of ``lora_A``.
        b: address of ``lora_B``.
        rank: its rank, 0 where the adapter has nothing there.
        scaling: what the product is multiplied with.
        is_aligned: whether both can be read 16 bytes at a time.
    """

    a: int
    b: int
    rank: int
    scaling: float
    is_aligned: bool


NO_ROW = Row(0, 0, 0, 0.0, True)

_FLOAT, _BITS = struct.Struct("f"), struct.Struct("i")


class WeightTable:
    """A bank in the form that kernels read: for every slot and slice where the weights are, their rank and scaling.

    The tensor stays where it is, so that captured graphs see every update.

    Args:
        dtype: of the weights that belong into this table; the rows of others have rank 0. None: of those that can't be
            read row by row, or whose ``lora_A`` and ``lora_B`` differ.
        slots: how many slots the table holds.
        slices: ``I``.
        device: where the table, and all weights in it, live.
    """

    def __init__(self, dtype: torch.dtype | None, slots: int, slices: int, device: torch.device | str) -> None:
        self.dtype = dtype
        with torch.inference_mode(False):  # a table outlives the call in which it is made
            self._mirror = torch.zeros((slots, slices, 4), dtype=torch.int64, device="cpu")
            self.rows = self._mirror.to(device, copy=True)
        streams.after_write(self.rows.device)
        weakref.finalize(self, streams.keep_for_all, [self.rows]).atexit = False
        self._written: dict[int, list[Row | None]] = {}
        self._lock = threading.Lock()

    def update(self, read: Mapping[int, Sequence[LayerWeights | None]]) -> Iterable[int]:
        """Bring the rows of these slots up to date; copies nothing where nothing changed.

        Args:
            read: for each slot its parts, which the caller keeps alive for as long as the slot is in use.

        Returns:
            The slots whose rows changed.
        """
        described = {slot: [self._row(part) for part in parts] for slot, parts in read.items()}
        with self._lock:
            changed = {slot: row for slot, row in described.items() if self._written.get(slot) != row}
            if changed:
                self._write(changed)
                self._written.update(changed)
        return changed

    def describe(self, slots: Iterable[int]) -> TableRows:
        """The table as kernels that meet only these slots, which were brought up to date, need it."""
        live = [row for slot in slots for row in self._written.get(slot, ()) if row is not None]
        return TableRows(
            self.rows, self.dtype, max((row.rank for row in live), default=0), all(row.is_aligned for row in live)
        )

    def _row(self, part: LayerWeights | None) -> Row | None:
        if part is None or dtype_of(part) != self.dtype:
            return None
        a, b, rank = part.lora_a.data_ptr(), part.lora_b.data_ptr(), part.lora_a.shape[0]
        return Row(a, b, rank, part.scaling, _aligned(a, b, rank))

    def _write(self, changed: Mapping[int, Sequence[Row | None]]) -> None:
        rows = [row or NO_ROW for slices in changed.values() for row in slices]
        numbers = [
            number for row in rows for number in (row.a, row.b, row.rank, *_BITS.unpack(_FLOAT.pack(row.scaling)))
        ]
        span = slice(min(changed), max(changed) + 1)
        with torch.inference_mode(False), streams.writing(self.rows.device):
            values = torch.tensor(numbers, dtype=torch.int64, device="cpu").view(-1, *self._mirror.shape[1:])
            self._mirror[list(changed) if len(changed) > 1 else span] = values
            # a copy from the host, and no kernel: what kernels read of a table they read before they wait for the
            # kernel that was launched right before them
            self.rows[span].copy_(self._mirror[span], non_blocking=True)


def dtype_of(part: LayerWeights) -> torch.dtype | None:
    """Common dtype of a part, None where there is none or rows aren't contiguous."""
    a, b = part.lora_a, part.lora_b
    return a.dtype if a.dtype == b.dtype and a.is_contiguous() and b.is_contiguous() else None


def is_aligned(part: LayerWeights) -> bool:
    """Whether weights can be read 16 bytes at a time."""
    return _aligned(part.lora_a.data_ptr(), part.lora_b.data_ptr(), len(part.lora_a))


def _aligned(a: int, b: int, rank: int) -> bool:
    return a % 16 == b % 16 == rank % 8 == 0
