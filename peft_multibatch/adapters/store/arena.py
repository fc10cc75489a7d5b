"""Bounded memory in blocks, which are reused once no tensor references them any more.

A block returns when its last tensor is freed: running calls, cached plans, autograd's saved tensors and any other view
of the weights keep it. So an adapter's memory is never overwritten while it is read.
"""

from __future__ import annotations

import re
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from peft_multibatch.adapters.store.streams import Streams
from peft_multibatch.errors import StoreFullError


STEPS = 8
"""The number of size classes between two powers of two, so that at most an eighth of a block is unused."""


def size_class(size: int) -> int:
    """The block size for an allocation of this many bytes."""
    step = max(64, 1 << max(size.bit_length() - 1, 0)) // STEPS
    return -(-max(size, 1) // step) * step


class Reserved(NamedTuple):
    """Reserved room for a block.

    Attributes:
        size: the requested bytes.
        block: a block to reuse, or None.
        mark: what to wait for before the block is written.
    """

    size: int
    block: Any
    mark: Any


class Arena:
    """Blocks of bytes up to a limit. Not thread-safe: callers hold a lock.

    Free blocks are kept for reuse within their size class, because their pages are mapped, and pinned if there is a
    CUDA device; reading into new memory takes ten times as long.

    Args:
        limit: the most bytes, including free blocks that are kept.
        device: the device of the blocks.
        is_pinned: whether blocks in host memory are pinned, so that a CUDA device can read them.
        streams: the streams that read them.
    """

    def __init__(self, limit: int, device: torch.device, is_pinned: bool, streams: Streams) -> None:
        self.limit = limit
        self.used = 0
        self.kept = 0
        self._device, self._is_pinned, self._streams = device, is_pinned, streams
        self._free: dict[int, deque[tuple[Any, Any]]] = {}
        self._unmade: deque[int] = deque()  # reserved bytes whose allocation failed
        self._returned: deque[Any] = deque()  # appended without a lock, by any thread that frees a last tensor

    def missing(self, sizes: Iterable[int]) -> int:
        """How many bytes have to be freed before there is room for all of these at once."""
        self.collect()
        return self.used + sum(map(size_class, sizes)) - self.limit

    def take(self, size: int) -> tuple[Tensor, Any]:
        """Take a block; there must be room for it.

        Returns:
            uint8 ``[size]``, and what to wait for before it is written; see ``Streams.mark``.

        Raises:
            StoreFullError: as in ``make``.
        """
        return self.make(self.reserve(size))

    def reserve(self, size: int) -> Reserved:
        """Reserve room for a block, which ``make`` allocates; there must be enough."""
        whole = size_class(size)
        self.collect()
        assert self.used + whole <= self.limit, (self.used, whole, self.limit)
        found = self._free.get(whole)
        block = mark = None
        if found:
            block, mark = found.popleft()
            self.kept -= whole
        else:
            self.trim(whole)
        self.used += whole
        return Reserved(size, block, mark)

    def make(self, reserved: Reserved) -> tuple[Tensor, Any]:
        """Allocate a reserved block; returns the same as ``take``. Called without a lock, because pinning is slow.

        Raises:
            StoreFullError: the device has less memory than the limit.
        """
        size, block, mark = reserved
        if block is None:
            try:
                block = self._make(size_class(size))
            except BaseException as error:
                self._unmade.append(size_class(size))
                if not isinstance(error, (MemoryError, RuntimeError)):  # torch's are RuntimeErrors
                    raise
                option = "max_device_memory" if self._device.type == "cuda" else "max_host_memory"
                raise StoreFullError(
                    f"an adapter store uses {self.used + self.kept - size_class(size)} of {self.limit} bytes, and "
                    f"{size} more couldn't be allocated on {self._device} ({type(error).__name__}: {error}): expected "
                    f"that much free memory. Pass a smaller {option} to adapter_store, or use less memory elsewhere."
                ) from error
        return self._lend(block, size), mark

    def trim(self, size: int = 0) -> None:
        """Free blocks that are kept, until there is room for this many bytes more."""
        for others in list(self._free.values()):
            while others and self.used + self.kept + size > self.limit:
                other, _ = others.popleft()
                self.kept -= len(other)
                self._streams.let_go(other)

    def collect(self) -> None:
        """Take back blocks that were freed."""
        while self._unmade:
            self.used -= self._unmade.popleft()
        count = len(self._returned)  # blocks that return later may have been read after the mark
        # copies are all that reads pinned memory, and keep it until they have ended
        mark = self._streams.mark() if count and not self._is_pinned else None
        for _ in range(count):
            block = self._returned.popleft()
            self.used -= len(block)
            self.kept += len(block)
            self._free.setdefault(len(block), deque()).append((block, mark))

    def _make(self, size: int) -> Any:
        if self._device.type == "cuda":
            return self._streams.make(size)
        block = np.empty(size, dtype=np.uint8)
        if self._is_pinned:
            block.fill(0)  # maps its pages, for which pinning would block the driver, and with it all launches
            self._streams.pin(block)
        return block

    def _lend(self, block: Any, size: int) -> Tensor:
        # torch keeps the object that it gets as long as any tensor with this storage exists, in Python or in C++
        piece = block[:size] if isinstance(block, np.ndarray) else _DevicePiece(block.data_ptr(), size)
        weakref.finalize(piece, self._returned.append, block).atexit = False
        with torch.inference_mode(False):
            if isinstance(piece, np.ndarray):
                return torch.from_numpy(piece)
            return torch.as_tensor(piece, dtype=torch.uint8, device=self._device)


class _DevicePiece:
    """GPU memory that torch can use without a copy."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def parse_size(what: str, size: int | str) -> int:
    """The bytes of a size such as ``"8GB"`` or ``"512MiB"``.

    Raises:
        StoreFullError: it isn't a size, or isn't positive.
    """
    units = {"": 1, "B": 1}
    units.update({f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)})
    units.update({f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)})
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", str(size).strip().upper())
    if found is None or found[2] not in units or isinstance(size, bool) or float(found[1]) <= 0:
        raise StoreFullError(
            f"adapter_store got {what}={size!r}: expected a positive number of bytes, or a string. Pass a size such "
            "as '8GB' or '512MiB'."
        )
    return int(float(found[1]) * units[found[2]])
