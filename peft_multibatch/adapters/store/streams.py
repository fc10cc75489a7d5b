"""What runs beside the host: on a CUDA device, a stream for copies, and the streams on which calls read weights."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


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
        self._readers: dict[int, torch.cuda.Stream] = {}  # on which calls began

    def note(self) -> None:
        stream = torch.cuda.current_stream(self.device)
        if stream.cuda_stream not in self._readers:
            self._readers[stream.cuda_stream] = stream

    def mark(self) -> list[torch.cuda.Event]:
        return [stream.record_event() for stream in list(self._readers.values())]

    def let_go(self, block: Any) -> None:
        if isinstance(block, Tensor):
            for stream in list(self._readers.values()):
                block.record_stream(stream)

    def pin(self, block: Any) -> None:
        runtime = torch.cuda.cudart()
        address = block.ctypes.data
        torch.cuda.check_error(runtime.cudaHostRegister(address, block.nbytes, 0))
        weakref.finalize(block, runtime.cudaHostUnregister, address).atexit = False

    def copy(self, target: Tensor, source: Tensor, mark: list[torch.cuda.Event] | None) -> None:
        with torch.cuda.stream(self._copies):
            for event in mark or ():
                self._copies.wait_event(event)
            target.copy_(source, non_blocking=True)
            self._copies.record_event().synchronize()  # calls may read it on any stream from now on


def streams_of(device: torch.device) -> Streams:
    """The streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else Streams(device)
