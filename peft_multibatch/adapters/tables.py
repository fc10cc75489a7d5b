"""Banks as kernels read them: addresses, ranks and scalings in a tensor at a fixed address."""

from __future__ import annotations

import struct
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_multibatch import streams


# One adapter in one projection group: for each slice, lora_A transposed [K, R], lora_B transposed [R, N] and the
# scaling, or None if the adapter has no weights for the slice.
Projection = tuple[Tensor, Tensor, float]
SlotWeights = list[Projection | None]


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
        rows: int64 ``[slots, I, 4]``: addresses of ``lora_A`` and ``lora_B``, rank, bits of the float32 scaling.
        dtype: dtype of all weights in the table, or None if they aren't contiguous or don't share a dtype.
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
        rank: its rank; 0 if the adapter has no weights there.
        scaling: the factor of the product.
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
    """A bank as kernels read it: the addresses, rank and scaling of every slot and slice.

    The tensor never moves, so captured graphs see every update.

    Args:
        dtype: the dtype of the weights in this table; the rows of all others have rank 0. None for weights that aren't
            contiguous, or whose ``lora_A`` and ``lora_B`` have different dtypes.
        slots: the number of slots.
        slices: ``I``.
        device: the device of the table and of all weights in it.
    """

    def __init__(self, dtype: torch.dtype | None, slots: int, slices: int, device: torch.device | str) -> None:
        self.dtype = dtype
        with torch.inference_mode(False):  # the table is reused by later calls
            self._mirror = torch.zeros((slots, slices, 4), dtype=torch.int64, device="cpu")
            self._numbers = self._mirror.numpy()  # the same memory
            self.rows = self._mirror.to(device, copy=True)
        streams.after_write(self.rows.device)
        weakref.finalize(self, streams.keep_for_all, [self.rows]).atexit = False
        self._written: dict[int, list[Row | None]] = {}
        self._lock = threading.Lock()

    def update(self, read: Mapping[int, Sequence[LayerWeights | None]]) -> Iterable[int]:
        """Bring the rows of these slots up to date. Copies nothing if nothing changed.

        Args:
            read: the weights of each slot, which the caller keeps alive as long as the slot is in use.

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
        """The table as an argument of kernels that read only these slots."""
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
        for slot, rows in changed.items():
            self._numbers[slot] = [
                (row.a, row.b, row.rank, *_BITS.unpack(_FLOAT.pack(row.scaling)))
                for row in (each or NO_ROW for each in rows)
            ]
        span = slice(min(changed), max(changed) + 1)
        with torch.inference_mode(False), streams.writing(self.rows.device):
            # a copy from the host instead of a kernel, because kernels read tables before they wait for the kernel
            # that was launched right before them
            self.rows[span].copy_(self._mirror[span], non_blocking=True)


def dtype_of(part: LayerWeights) -> torch.dtype | None:
    """The common dtype of ``lora_A`` and ``lora_B``; None if they differ or aren't contiguous."""
    a, b = part.lora_a, part.lora_b
    return a.dtype if a.dtype == b.dtype and a.is_contiguous() and b.is_contiguous() else None


def is_aligned(part: LayerWeights) -> bool:
    """Whether weights can be read 16 bytes at a time."""
    return _aligned(part.lora_a.data_ptr(), part.lora_b.data_ptr(), len(part.lora_a))


def _aligned(a: int, b: int, rank: int) -> bool:
    return a % 16 == b % 16 == rank % 8 == 0
