"""A store's memory beside what runs: copies to a device have a stream of their own, and wait for what reads a block."""

from __future__ import annotations

import ctypes
import weakref
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

    def begin_thread(self) -> None:
        """A thread begins that calls ``pin`` and ``copy``."""

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
        with torch.cuda.stream(self._copies), torch.inference_mode(False):
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def let_go(self, block: Any) -> None:
        if isinstance(block, Tensor):
            streams.keep_for_all([block])

    def pin(self, block: Any) -> None:
        runtime = torch.cuda.cudart()
        address = block.ctypes.data
        torch.cuda.check_error(runtime.cudaHostRegister(address, block.nbytes, 0))
        weakref.finalize(block, runtime.cudaHostUnregister, address).atexit = False

    def begin_thread(self) -> None:
        # pinning and waiting would end a graph's capture on another thread, with which this one has nothing to do
        relaxed = ctypes.c_int(2)
        ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(relaxed))

    def copy(self, target: Tensor, source: Tensor, mark: list[torch.cuda.Event] | None) -> None:
        with torch.cuda.stream(self._copies):
            for event in mark or ():
                self._copies.wait_event(event)
            target.copy_(source, non_blocking=True)
            self._copies.record_event().synchronize()  # calls may read it on any stream from now on


def streams_of(device: torch.device) -> Streams:
    """The streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else Streams(device)
