"""The threads that read stored adapters from files, and copy them to the device."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from peft_multibatch.adapters.store.files import read_weights
from peft_multibatch.adapters.store.streams import Streams
from peft_multibatch.adapters.store.tier import Tier
from peft_multibatch.adapters.store.version import Version
from peft_multibatch.adapters.store.workers import Workers
from peft_multibatch.errors import AdapterFileError, MultibatchError, NotEnabledError, StoreFullError


READERS = 4
"""The number of files that are read at the same time, besides those that hang."""

MOST_READERS = 64
"""The most threads that read files, including those that hang."""

POLL = 0.005
"""Seconds between checks of a waiting batch, because there is no notification when memory is freed."""

Found = TypeVar("Found")


class Load:
    """An adapter that is being loaded.

    Attributes:
        version: the adapter.
        memory: the memory for its weights, which stays reserved as long as this is referenced; None once it has ended,
            because a thread may still have the load.
        mark: what to wait for before the memory is written.
        since: when it began, as ``time.monotonic``.
        source: the weights in host memory, until they are copied to the device.
        has_ended: whether it was loaded or failed, or the model was disabled.
        error: the error, if loading failed.
        seconds: the time that threads have spent on it.
    """

    def __init__(self, version: Version, memory: Tensor, mark: Any) -> None:
        self.version, self.mark = version, mark
        self.memory: Tensor | None = memory
        self.since = time.monotonic()
        self.source: Tensor | None = None
        self.has_ended = False
        self.error: Exception | None = None
        self.seconds = 0.0


class Transfers:
    """Reads adapters into host memory, and copies them from there to a device with memory of its own.

    A few threads read files. A single one copies, because one copy at a time already uses the whole bus, and several
    threads that use CUDA delay the launches of running steps. So adapters in host memory don't wait for files either.
    All of these threads delay steps by the Python that they run, and by every call that gives up the GIL and takes it
    again, so they do little, and take the lock once where they can.

    Attributes:
        is_closed: whether the model was disabled, so that nothing starts any more.
        readers: the threads that read files.
        ahead: adapters that are being read into host memory before they are needed.
        loads: the number of adapters loaded so far.
        bytes_read: the bytes read from files.
        seconds: the time that loads which have ended took, summed over all threads.
        to_wake: loops that wait for an adapter, to wake when one was loaded or failed to load. Guarded by the lock.

    Args:
        lock: guards all of a store's state.
        host: adapters in host memory.
        final: adapters on the device where calls compute; on a CPU, the same as ``host``.
        streams: the device's streams.
        timeout: the most seconds that a load waits for host memory.
    """

    def __init__(self, lock: threading.Condition, host: Tier, final: Tier, streams: Streams, timeout: float) -> None:
        self.is_closed = False
        self.ahead: set[Version] = set()
        self.loads, self.bytes_read, self.seconds = 0, 0, 0.0
        self.to_wake: weakref.WeakSet[threading.Event] = weakref.WeakSet()
        self._lock, self._host, self._final, self._streams = lock, host, final, streams
        self._timeout = timeout
        self.readers = Workers("peft_multibatch_store", READERS, MOST_READERS)
        self._copier = Workers("peft_multibatch_copies", 1, 1)
        self._running: set[Load] = set()
        self._staging = threading.local()

    # The caller holds the lock, for which the threads wait.
    def close(self) -> None:
        """Start nothing any more, and end what waits or runs without keeping its results."""
        self.is_closed = True
        self.readers.close()
        self._copier.close()
        for load in self._running:
            self._forget(load)
        self._running.clear()

    def check_open(self) -> None:
        """Check that the model is still enabled.

        Raises:
            NotEnabledError: it isn't.
        """
        if self.is_closed:
            raise NotEnabledError(
                "the model was disabled while a call waited for its stored adapters: expected it to stay enabled. "
                "Call enable and adapter_store again."
            )

    def start(self, load: Load) -> None:
        """Load an adapter where calls compute. Whatever goes wrong is the load's error."""
        version = load.version
        try:
            version.loading, version.error = load, None
            self._running.add(load)
            load.source = self._host.get(version)
            self._submit(load)
        except BaseException as error:  # such as Ctrl-C's; a thread that has the load already changes nothing any more
            load.error = StoreFullError(
                f"loading adapter {version.name!r} was interrupted ({type(error).__name__}): expected it to end. "
                "Run the batch again."
            )
            self._end(load)
            version.error = None
            raise

    def _submit(self, load: Load) -> None:
        try:
            if load.source is None:
                self.readers.submit(partial(self._read_for, load))
            else:
                self._copier.submit(partial(self._copy, load))
        except RuntimeError as error:
            load.error = StoreFullError(
                f"adapter {load.version.name!r} can't be loaded, because no thread can be started ({error}): expected "
                "a process that may start threads. Raise its limit, or run fewer of them."
            )
            self._end(load)

    def read_ahead(self, version: Version, stay: Set[Version]) -> None:
        """Read an adapter into host memory, without evicting others (``stay``) from there."""
        self.ahead.add(version)
        try:
            self.readers.submit(partial(self._read_ahead, version, stay))
        except RuntimeError:  # no thread can be started; the load for its request says so
            self.ahead.discard(version)

    # In the threads.
    def _read_for(self, load: Load) -> None:
        if self._final is self._host:
            self._fill(load, partial(self._read, load.version))
            with self._lock:
                self.bytes_read += load.version.layout.file_size if load.error is None else 0
                self._end(load)
            return
        source = None if load.has_ended else self._try(load, partial(self._in_host, load.version))
        with self._lock:
            if source is None:
                self._end(load)
            if load.has_ended:
                return
            load.source = source
        del source  # others may wait for this memory
        try:
            self._copier.submit(partial(self._copy, load))
        except RuntimeError:  # the interpreter is about to exit, or no thread could be started
            if not self.is_closed:
                self._copy(load)

    def _copy(self, load: Load) -> None:
        self._fill(load, partial(self._copy_to, load))
        self._end(load)

    def _copy_to(self, load: Load, memory: Tensor) -> None:
        source, load.source = load.source, None  # others may wait for this memory
        if source is not None:
            self._streams.copy(memory, source, load.mark)

    def _fill(self, load: Load, write: Callable[[Tensor], None]) -> None:
        """Write a load's memory, unless it has ended."""
        memory = load.memory
        if memory is not None:
            self._try(load, partial(write, memory))

    def _read_ahead(self, version: Version, stay: Set[Version]) -> None:
        with suppress(Exception):  # the load for its request raises again
            self._in_host(version, stay, is_ahead=True)
        with self._lock:
            self.ahead.discard(version)
            self._lock.notify_all()

    def _try(self, load: Load, work: Callable[[], Found]) -> Found | None:
        """Do a part of a load, whose error is kept."""
        version, begin = load.version, time.perf_counter()
        try:
            return work()
        except MultibatchError as error:
            load.error = type(error)(*error.args)
        except Exception as error:
            load.error = AdapterFileError(
                f"adapter {version.name!r} can't be loaded from {version.path!r} ({type(error).__name__}: {error}): "
                "expected a file that can be read. Register the adapter again."
            )
        finally:
            load.seconds += time.perf_counter() - begin
        return None

    def _end(self, load: Load) -> None:
        version = load.version
        with self._lock:
            if load.has_ended:
                return
            self.seconds += load.seconds
            if load.error is None:
                assert load.memory is not None
                self.loads += 1
                if not version.is_gone:
                    self._final.put(version, load.memory)
            self._forget(load)
            self._running.discard(load)
            version.error = load.error
            self._lock.notify_all()
            for event in self.to_wake:
                event.set()

    def _forget(self, load: Load) -> None:
        """Release a load's memory, and break the reference cycle with its version."""
        load.version.loading = load.memory = load.source = None
        load.has_ended = True

    def _in_host(self, version: Version, stay: Set[Version] = frozenset(), is_ahead: bool = False) -> Tensor:
        """An adapter's weights in host memory, from which they are copied to the device."""
        deadline = time.monotonic() + self._timeout
        while True:
            with self._lock:
                memory = self._host.get(version)
                if memory is not None:
                    return memory
                self.check_open()
                is_read = version in self.ahead and not is_ahead  # by another thread
                # plans hold memory of the device, so dropping them wouldn't help
                if not is_read and self._host.make_room([version.layout.size], stay, lambda: None):
                    reserved = self._host.arena.reserve(version.layout.size)
                    break
                if time.monotonic() > deadline or is_ahead:
                    used = f"others used all {self._host.arena.limit} bytes of host memory"
                    raise late([version], self._timeout, used)
                self._lock.wait(POLL)
        memory, _ = self._host.arena.make(reserved)
        self._read(version, memory)
        with self._lock:
            self.bytes_read += version.layout.file_size
            if not version.is_gone:
                self._host.put(version, memory)
        return memory

    def _read(self, version: Version, memory: Tensor) -> None:
        layout = version.layout
        file = memory if layout.is_plain else self._stage(layout.file_size)
        target: Any = file.numpy()
        read_weights(version.name, version.path, version.identity, version.header, memoryview(target))
        if not layout.is_plain:
            layout.fill(memory, file)

    def _stage(self, size: int) -> Tensor:
        """This thread's buffer for files whose weights have to be converted."""
        known = getattr(self._staging, "memory", None)
        if known is None or len(known) < size:
            known = self._staging.memory = torch.zeros(size, dtype=torch.uint8, device="cpu")
        return known[:size]


def late(versions: Sequence[Version], timeout: float, why: str) -> StoreFullError:
    """The error of a batch that has waited too long for its adapters."""
    names = ", ".join(repr(version.name) for version in versions[:3])
    return StoreFullError(
        f"a batch waited {timeout:g} s for {len(versions)} stored adapters ({names}...), but {why}: "
        "expected memory for the adapters of all batches that run at once. Pass more memory or a longer timeout "
        "to adapter_store, or run fewer batches."
    )
