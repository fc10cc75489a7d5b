"""CUDA streams: what is kept between calls is written on one stream, and read on whichever one the next call has.

torch orders what runs on one stream. A tensor that outlives the call that made it may be read on another stream, or be
freed while another one still reads it, and no user can know of it. So what is made for a plan is made for one stream
(``key``), and what all streams share, the tables and the plans at fixed places, is written in a block of ``writing``,
and read after ``before_read``. Nothing here waits on the host.

On a CPU, where an operation has ended when it returns, none of this does anything.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Device:
    """The streams of a device on which calls ran."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.streams: dict[int, torch.cuda.Stream] = {}  # all on which something shared was read or written
        self.writes: dict[int, tuple[int, torch.cuda.Event]] = {}  # the last one on each stream, and which it was
        self.count = 0
        self.seen: dict[int, int] = {}  # how many writes each stream has waited for


_devices: dict[torch.device, _Device] = {}


class _Inside(threading.local):
    """Where the thread is inside of a block that writes: devices and streams."""

    def __init__(self) -> None:
        self.places: set[tuple[torch.device, int]] = set()


_inside = _Inside()


def key(device: torch.device) -> int:
    """The current stream of a device as a number, for keys of what is kept for one stream; 0 on a CPU."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def note(device: torch.device) -> int:
    """From now on the current stream is one of those that read what is shared.

    Returns:
        As ``key``.
    """
    number = key(device)
    if device.type == "cuda" and number not in _known(device).streams and not _is_capturing(device):
        _known(device).streams[number] = torch.cuda.current_stream(device)
    return number


def before_read(device: torch.device) -> None:
    """Let the current stream wait for what was written on others.

    While a graph is captured nothing is waited for: ``torch.cuda.graph`` has synchronized the device before.
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
    """A block that writes what other streams read: before it, the current stream waits for all that was launched on
    others, which may still read it; after it, they wait when they read next. Blocks inside of it wait for nobody.
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
    """Let other streams wait for what the current one has written, when they read next."""
    if device.type == "cuda" and not _is_capturing(device):
        known, stream = _known(device), torch.cuda.current_stream(device)
        with known.lock:
            known.count += 1
            known.writes[stream.cuda_stream] = known.count, stream.record_event()


def marks(device: torch.device) -> list[torch.cuda.Event]:
    """What has to end before memory is written that calls on any stream have read."""
    return _record(device, None)


def keep_for_all(tensors: Iterable[Tensor]) -> None:
    """When tensors are freed, don't reuse their memory before what was launched on any stream has ended."""
    for tensor in tensors:
        if tensor.is_cuda:
            for stream in list(_known(tensor.device).streams.values()):
                tensor.record_stream(stream)


def _known(device: torch.device) -> _Device:
    known = _devices.get(device)
    return known if known is not None else _devices.setdefault(device, _Device())


def _record(device: torch.device, number: int | None) -> list[torch.cuda.Event]:
    """Where all streams but one are now. On those that are being captured nothing runs."""
    found = []
    for other, stream in list(_known(device).streams.items()):
        if other != number:
            with torch.cuda.stream(stream):
                if not torch.cuda.is_current_stream_capturing():
                    found.append(stream.record_event())
    return found


def _is_capturing(device: torch.device) -> bool:
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
