"""Copying stored adapters to a device on a separate stream, which waits for readers of the reused memory."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from peft_multibatch import streams
from peft_multibatch.compat import disable_current_modes


class Copy:
    """A copy to a device, which may still be running.

    Args:
        begin: recorded before it.
        end: recorded after it.
    """

    def __init__(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._begin, self._end = begin, end

    def is_done(self) -> bool:
        """Whether it has finished, so that calls may read it on any stream."""
        with _relaxed():
            return self._end.query()

    def seconds(self) -> float:
        """How long it took."""
        with _relaxed():
            return self._begin.elapsed_time(self._end) / 1000


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

    def copy(self, target: Tensor, source: Tensor, mark: Any) -> Copy:
        """Begin to copy a block to the device. Both must exist until the copy has finished."""
        raise NotImplementedError


class CudaStreams(Streams):
    """The streams of a CUDA device."""

    has_memory = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._copies = torch.cuda.Stream(device)
        self._last: Any = None  # for which the stream for copies has waited
        self._reads: dict[int, torch.cuda.Event] = {}  # the end of the last copy from each pinned block, by address

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
        weakref.finalize(block, _unpin, address, self._reads).atexit = False

    def copy(self, target: Tensor, source: Tensor, mark: list[torch.cuda.Event] | None) -> Copy:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with disable_current_modes(), _relaxed(), torch.cuda.stream(self._copies):
            if mark is not self._last:  # many blocks have the same
                for event in mark or ():
                    self._copies.wait_event(event)
                self._last = mark
            begin.record()
            self._reads[source.data_ptr()] = end
            target.copy_(source, non_blocking=True)
            end.record()
        return Copy(begin, end)


@contextmanager
def _relaxed() -> Iterator[None]:
    """A block in which this thread may allocate, free and wait while another one captures a CUDA graph.

    torch captures in CUDA's global mode, in which such calls invalidate the capture, whichever thread makes them.
    """
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED
    exchange = _driver().cuThreadExchangeStreamCaptureMode
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


@functools.cache
def _driver() -> Any:
    return ctypes.PyDLL("libcuda.so.1")  # without giving up the GIL, which takes longer than these calls


def _unpin(address: int, reads: dict[int, torch.cuda.Event]) -> None:
    end = reads.pop(address, None)
    with _relaxed():
        if end is not None:
            with suppress(RuntimeError):  # of a device that has failed
                end.synchronize()  # a copy may still read the block if its store was closed or dropped
        torch.cuda.cudart().cudaHostUnregister(address)


def streams_of(device: torch.device) -> Streams:
    """The streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else Streams(device)
