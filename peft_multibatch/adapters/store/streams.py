"""Copying stored adapters to a device on a separate stream, which waits for readers of the reused memory."""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from peft_multibatch import streams


class Streams:
    """Order of reads and writes to an arena's blocks. On a CPU, operations are synchronous, so nothing is needed.

    Attributes:
        has_memory: whether the device has its own memory.

    Args:
        device: the device where calls compute.
    """

    has_memory = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def note(self) -> None:
        """Record that a call begins on the current stream."""

    def mark(self) -> Any:
        """What to wait for before a block that is free now is written."""
        return None

    def make(self, size: int) -> Tensor:
        """Allocate device memory, uint8 ``[size]``, which only ``copy`` writes."""
        raise NotImplementedError

    def let_go(self, block: Any) -> None:
        """Free a block that may still be read."""

    def pin(self, block: Any) -> None:
        """Pin host memory."""

    def copy(self, target: Tensor, source: Tensor, mark: Any) -> None:
        """Copy a block to the device, in one of the store's threads; returns when the copy has finished."""
        target.copy_(source)


class CudaStreams(Streams):
    """The streams of a CUDA device."""

    has_memory = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._copies = torch.cuda.Stream(device)
        self._last: Any = None  # for which the stream for copies has waited
        self._prepared = threading.local()

    def note(self) -> None:
        streams.note(self.device)

    def mark(self) -> list[torch.cuda.Event]:
        return streams.marks(self.device)

    def make(self, size: int) -> Tensor:
        # allocated on the stream that writes it: kernels on other streams may still use the memory's previous contents
        with _relaxed(), torch.cuda.stream(self._copies), torch.inference_mode(False):
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def let_go(self, block: Any) -> None:
        if isinstance(block, Tensor):
            streams.keep_for_all([block])

    def pin(self, block: Any) -> None:
        address = block.ctypes.data
        with _relaxed():
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, block.nbytes, 0))
        weakref.finalize(block, _unpin, address).atexit = False

    def copy(self, target: Tensor, source: Tensor, mark: list[torch.cuda.Event] | None) -> None:
        if not hasattr(self._prepared, "is_done"):  # for good, because nothing else runs on this thread
            _relax()
            torch.cuda.set_stream(self._copies)
            self._prepared.is_done = True
        if mark is not self._last:  # many blocks have the same
            for event in mark or ():
                self._copies.wait_event(event)
            self._last = mark
        target.copy_(source, non_blocking=True)
        self._copies.synchronize()  # calls may read it on any stream from now on


@contextmanager
def _relaxed() -> Iterator[None]:
    """As ``_relax``, for a block."""
    mode = _relax()
    try:
        yield
    finally:
        _relax(mode)


def _relax(mode: int = 2) -> int:  # cudaStreamCaptureModeRelaxed
    """Allow this thread to allocate, free and wait while another one captures a CUDA graph; returns its mode before.

    torch captures in CUDA's global mode, in which such calls invalidate the capture, whichever thread makes them.
    """
    exchanged = ctypes.c_int(mode)
    _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(exchanged))
    return exchanged.value


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _unpin(address: int) -> None:
    with _relaxed():
        torch.cuda.cudart().cudaHostUnregister(address)


def streams_of(device: torch.device) -> Streams:
    """The streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else Streams(device)
