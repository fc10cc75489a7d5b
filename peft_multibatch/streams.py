"""CUDA streams: synchronizes tensors that are kept between calls, which may run on different streams.

torch only orders operations on the same stream. A tensor that outlives its call may be read on another stream, or
freed while another one still reads it, and users can't know about it. So tensors of a plan are made once per stream
(``key``), and those that all streams share, tables and plans at fixed addresses, are written inside ``writing`` and
read after ``before_read``. Nothing here blocks the host.

On a CPU, operations are synchronous, and none of this does anything.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from peft_multibatch.compat import is_fake, outside_of_tracing


class _Device:
    """The streams of a device that calls have used."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.streams: dict[int, torch.cuda.Stream] = {}  # streams that read or wrote shared tensors
        self.writes: dict[int, tuple[int, torch.cuda.Event]] = {}  # the last write on each stream
        self.count = 0
        self.seen: dict[int, int] = {}  # the number of writes for which each stream has waited


_devices: dict[torch.device, _Device] = {}


class _Inside(threading.local):
    """The devices and streams on which this thread is inside a ``writing`` block."""

    def __init__(self) -> None:
        self.places: set[tuple[torch.device, int]] = set()


_inside = _Inside()


def key(device: torch.device) -> int:
    """The current stream of a device as a number, for cache keys; 0 on a CPU."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def note(device: torch.device) -> int:
    """Register the current stream as one that reads shared tensors.

    Returns:
        The same as ``key``.
    """
    number = key(device)
    if device.type == "cuda" and number not in _known(device).streams and not _is_capturing(device):
        _known(device).streams[number] = torch.cuda.current_stream(device)
    return number


def before_read(device: torch.device) -> None:
    """Make the current stream wait for writes on other streams.

    Not during a capture, because ``torch.cuda.graph`` synchronizes the device before.
    """
    number = note(device)
    if device.type != "cuda":
        return
    known = _known(device)
    if known.seen.get(number) == known.count or _is_capturing(device):
        return
    with known.lock:
        stream, seen = torch.cuda.current_stream(device), known.seen.get(number, 0)
        for writer, (count, event) in known.writes.items():
            if writer != number and count > seen:
                stream.wait_event(event)
        known.seen[number] = known.count


@contextmanager
def writing(device: torch.device) -> Iterator[None]:
    """A block that writes shared tensors.

    First, the current stream waits for other streams, which may still read them; afterwards, the others wait before
    they read next. Nested blocks don't wait.
    """
    number = note(device)
    if device.type != "cuda" or _is_capturing(device) or (device, number) in _inside.places:
        yield
        return
    stream = torch.cuda.current_stream(device)
    for event in _record(device, number):
        stream.wait_event(event)
    _inside.places.add((device, number))
    try:
        yield
    finally:
        _inside.places.discard((device, number))
        after_write(device)


def after_write(device: torch.device) -> None:
    """Make other streams wait for the current one's writes before they read next."""
    if device.type == "cuda" and not _is_capturing(device):
        known, stream = _known(device), torch.cuda.current_stream(device)
        with known.lock:
            known.count += 1
            known.writes[stream.cuda_stream] = known.count, stream.record_event()


def marks(device: torch.device) -> list[torch.cuda.Event]:
    """Events to wait for before writing memory that calls on any stream have read."""
    return _record(device, None)


def keep_for_all(tensors: Iterable[Tensor]) -> None:
    """Keep the memory of freed tensors until all streams have finished the work launched so far.

    Finalizers call this at any moment, such as while torch.compile traces a graph, which must not contain it.
    """
    with outside_of_tracing():
        for tensor in tensors:
            if tensor.is_cuda and not is_fake(tensor):  # code that is traced makes tensors without memory
                for stream in list(_known(tensor.device).streams.values()):
                    tensor.record_stream(stream)


def _known(device: torch.device) -> _Device:
    known = _devices.get(device)
    return known if known is not None else _devices.setdefault(device, _Device())


def _record(device: torch.device, number: int | None) -> list[torch.cuda.Event]:
    """Record an event on all streams but one, except on streams that are being captured, where nothing runs."""
    found = []
    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        try:
            for other, stream in list(_known(device).streams.items()):
                if other != number:
                    torch.cuda.set_stream(stream)  # faster than a block for each
                    if not torch.cuda.is_current_stream_capturing():
                        found.append(stream.record_event())
        finally:
            torch.cuda.set_stream(current)
    return found


def _is_capturing(device: torch.device) -> bool:
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
