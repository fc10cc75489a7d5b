"""A store's memory beside what runs: copies to a device have a stream of their own, and wait for a block's readers."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from peft_multibatch import streams


class Streams:
    """What reads and writes an arena's blocks on a device. On a CPU everything has ended when it returns.

    Attributes:
        has_memory: whether the device has memory of its own.

    Args:
        device: where calls compute.
    """

    has_memory = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def note(self) -> None:
        """A call begins on the stream that is the current one."""

    def mark(self) -> Any:
        """What has to end before a block is written that nobody holds from now on."""
        return None

    def make(self, size: int) -> Tensor:
        """Memory of the device, uint8 ``[size]``, for ``copy`` alone to write."""
        raise NotImplementedError

    def let_go(self, block: Any) -> None:
        """A block is dropped that may still be read."""

    def pin(self, block: Any) -> None:
        """Let the device read host memory by itself."""

    def copy(self, target: Tensor, source: Tensor, mark: Any) -> None:
        """Copy a block to the device, and return when it is there."""
        target.copy_(source)


class CudaStreams(Streams):
    """The streams of a CUDA device."""

    has_memory = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._copies = torch.cuda.Stream(device)

    def note(self) -> None:
        streams.note(self.device)

    def mark(self) -> list[torch.cuda.Event]:
        return streams.marks(self.device)

    def make(self, size: int) -> Tensor:
        # of the stream that will write it: on another one, kernels may still use what was there before
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
        with _relaxed(), torch.cuda.stream(self._copies):
            for event in mark or ():
                self._copies.wait_event(event)
            target.copy_(source, non_blocking=True)
            self._copies.record_event().synchronize()  # calls may read it on any stream from now on


@contextmanager
def _relaxed() -> Iterator[None]:
    """A block that may take and give back memory, and wait, while a graph is captured that has nothing to do with it.

    torch captures in CUDA's global mode, in which such a call of any thread ends the capture.
    """
    mode = ctypes.c_int(2)  # cudaStreamCaptureModeRelaxed
    exchange = _driver().cuThreadExchangeStreamCaptureMode
    exchange(ctypes.byref(mode))  # which is now the mode that the thread had
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _unpin(address: int) -> None:
    with _relaxed():
        torch.cuda.cudart().cudaHostUnregister(address)


def streams_of(device: torch.device) -> Streams:
    """The streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else Streams(device)
