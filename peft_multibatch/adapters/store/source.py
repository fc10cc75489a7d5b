"""The registry's interface to stored adapters."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from peft_multibatch.adapters.slots import Slots
from peft_multibatch.adapters.store.arena import parse_size
from peft_multibatch.adapters.store.layout import Layers, StoreDtype
from peft_multibatch.adapters.store.layouts import Layouts
from peft_multibatch.adapters.store.loading import Loader, Turn
from peft_multibatch.adapters.store.paths import resolve_roots
from peft_multibatch.adapters.store.streams import streams_of
from peft_multibatch.adapters.store.version import StoredAdapter, Version
from peft_multibatch.errors import ModelStateError, UnsupportedError
from peft_multibatch.plan.names import AdapterNames
from peft_multibatch.report import AdapterReport, Source


class StoredAdapters:
    """Adapters in files, of which those in use are in memory.

    Args:
        model: the model's layers.
        names: the names of all adapters of the model.
        slots: the pool of slots for adapters in use.
        device: the device where calls compute.
        max_host_memory: the most bytes in host memory.
        max_device_memory: the most bytes on a CUDA device; not used on a CPU.
        max_rank: the largest allowed rank.
        roots: folders that may contain adapters; None allows any folder.
        dtype: the dtype of weights in memory.
        timeout: the most seconds that a batch waits for its adapters.
        let_go: called when memory runs out, to drop plans of calls that have ended.
        is_nested: whether a call would begin inside another one.
        guard: returns a block in which an adapter may be changed.
    """

    kind: Source = "store"

    def __init__(
        self,
        model: Layers,
        names: AdapterNames,
        slots: Slots,
        device: torch.device,
        max_host_memory: int | str,
        max_device_memory: int | str,
        max_rank: int,
        roots: Sequence[str | os.PathLike] | None,
        dtype: StoreDtype,
        timeout: float,
        let_go: Callable[[], None],
        is_nested: Callable[[], bool],
        guard: Callable[[int], AbstractContextManager[None]],
    ) -> None:
        self._model, self._names, self._slots = model, names, slots
        self._roots = resolve_roots(roots)
        self._layouts = Layouts(model, max_rank, dtype)
        self._device, self._streams = device, streams_of(device)
        sizes = parse_size("max_host_memory", max_host_memory), parse_size("max_device_memory", max_device_memory)
        self._loader = Loader(device, *sizes, timeout, self._streams, let_go, is_nested)
        self._guard = guard
        self._lock = self._loader.lock
        self._versions: dict[int, Version] = {}  # by id
        self._hits = self._misses = 0
        self._is_closed = False

    def has(self, number: int) -> bool:
        """Whether an id belongs to a stored adapter."""
        return number in self._versions

    def serial(self, number: int) -> int:
        """The serial number of an adapter's current version."""
        return self._versions[number].serial

    def adapters(self, ids: Collection[int], is_new: bool = True) -> dict[int, StoredAdapter]:
        """Adapters in memory, by id. Loads them if needed.

        Args:
            ids: the adapters.
            is_new: whether to count hits and misses; False for steps of continuous batching.

        Raises:
            AdapterFileError: files can't be read any more.
            AdapterMismatchError: the model changed, and an adapter doesn't fit it any more.
            StoreFullError: there was no room for all of them within the timeout.
            UnsupportedError: an adapter has dropout, and the model is in train mode.
        """
        running = None if is_new else self._running(ids)
        if running is not None:
            self.check(running.values())
            self._streams.note()
            return running
        tier = self._loader.final
        with self._lock:
            versions = {number: self._find(number) for number in ids}
            wanted = list(dict.fromkeys(versions.values()))
            there = sum(tier.touch(version) for version in wanted)
            waits = there < len(wanted) or (is_new and self._loader.is_starved())
            found = {} if waits else tier.get_all(wanted)
        if is_new:
            self.count(there, len(wanted) - there)
        self._check(wanted)
        self._streams.note()
        if waits:  # a waiting batch references no memory, so that batches can't block each other
            found = self._loader.fetch(wanted)
        names = self._model.names
        return {number: version.in_memory(found[version], self._slots, names) for number, version in versions.items()}

    def _running(self, ids: Collection[int]) -> dict[int, StoredAdapter] | None:
        """Adapters that requests keep in memory, by id; None if one isn't.

        Without the lock, for which every step would wait as long as a loading thread holds it.
        """
        found = {number: adapter for number in ids if (adapter := self.current(number)) is not None}
        return found if len(found) == len(ids) else None

    def note_use(self, adapters: Iterable[StoredAdapter]) -> None:
        """Record that adapters were used until now, by a request that has ended; steps don't record it."""
        self._loader.final.used.extend(adapter.version for adapter in adapters)

    def begin_turn(self) -> Turn:
        """A turn of ``lease``. Other reads start in place of those that hang."""
        self._loader.transfers.readers.start()
        return Turn()

    def lease(self, ids: Sequence[int], turn: Turn, since: float | None) -> list[StoredAdapter] | None:
        """Adapters that stay in memory as long as they are referenced; if any isn't there yet, None, and loads it.

        Args:
            ids: the adapters, which aren't evicted for others in this turn from now on.
            turn: the turn in which they are needed.
            since: when the caller began to wait for them, as ``time.monotonic``; None the first time, when errors of
                earlier loads don't count.

        Raises:
            AdapterFileError: one couldn't be loaded.
            StoreFullError: they don't fit into memory together, or the caller has waited longer than the timeout while
                one was loaded.
        """
        tier = self._loader.final
        wanted = [self._find(number) for number in ids]
        turn.stay.update(wanted)
        if wanted and since is not None and all(each.loading is not None for each in wanted):  # without the lock
            for version in wanted:
                self._loader.check_time(version, since)
            return None
        with self._lock:
            self._loader.check_possible(wanted)
            for version in wanted:
                error, version.error = version.error, None
                if since is not None:
                    if error is not None:
                        raise type(error)(*error.args)
                    self._loader.check_time(version, since)
                if not tier.touch(version):
                    self._loader.prefetch(version, turn)
            found = tier.get_all(wanted) if all(version in tier for version in wanted) else None
        if found is None:
            return None
        self._check(wanted)
        return [version.in_memory(found[version], self._slots, self._model.names) for version in wanted]

    def count(self, hits: int, misses: int) -> None:
        """Count adapters that were in memory when a call or request began, and those that weren't."""
        with self._lock:
            self._hits += hits
            self._misses += misses

    def is_loaded(self, number: int) -> bool:
        """Whether an adapter is in memory on the device where calls compute."""
        version = self._versions.get(number)
        return version is not None and version in self._loader.final

    def loaded(self) -> list[int]:
        """Ids of the adapters in memory on the device where calls compute."""
        found = map(self._names.ids.get, [version.name for version in self._loader.final.versions()])
        return [number for number in found if number is not None]  # others were unregistered just now

    def is_coming(self, number: int) -> bool:
        """Whether an adapter is in memory, or being loaded."""
        version = self._versions.get(number)
        return version is None or version.loading is not None or version in self._loader.final

    def load(self, ids: Sequence[int]) -> None:
        """Start loading adapters, as far as there is room that no batch waits for."""
        with self._lock:
            turn = Turn(versions := [self._find(number) for number in ids])
            for version in versions:
                self._loader.prefetch(version, turn)

    def look_ahead(self, ids: Sequence[int], stay: Sequence[int]) -> None:
        """Start loading adapters that are needed next; see ``Loader.look_ahead``.

        Args:
            ids: the adapters, in the order in which they are needed; those that were unregistered are left out.
            stay: other adapters, which must not be evicted for these.
        """
        with self._lock:
            wanted, others = (
                [self._versions[each] for each in some if each in self._versions] for some in (ids, stay)
            )
            self._loader.look_ahead(wanted, Turn([*wanted, *others]))

    def wake(self, event: threading.Event) -> None:
        """Set an event whenever an adapter was loaded, as long as the event exists."""
        if event not in self._loader.transfers.to_wake:
            with self._lock:
                self._loader.transfers.to_wake.add(event)

    def current(self, number: int) -> StoredAdapter | None:
        """The version of an adapter that running calls use; None if none does."""
        version = self._versions.get(number)
        return version.adapter() if version is not None and version.adapter is not None else None

    def covers(self, number: int, layer: Any) -> bool:
        """Whether an adapter has weights in a layer."""
        return self._model.names.get(layer, "") in self._find(number).layout.layers

    def close(self) -> None:
        """Unregister all adapters and stop loading."""
        with self._lock:
            self._is_closed = True
            self._loader.close()
            for version in self._versions.values():
                self._forget(version)
                self._names.remove_stored(version.name)
            self._versions.clear()

    def expect(
        self, layers: Iterable[Any], can_run: Callable[[torch.dtype | None, int, torch.device], bool]
    ) -> dict[torch.dtype | None, tuple[int, bool]]:
        """As ``Layouts.expect``, with layers instead of their names."""
        names = [self._model.names.get(layer, "") for layer in layers]
        return self._layouts.expect(names, lambda dtype, rank: can_run(dtype, rank, self._device))

    def formats(self, number: int) -> set[tuple[torch.dtype, int, torch.device]]:
        """The dtypes, ranks and device of an adapter's weights."""
        layers = self._find(number).layout.layers.values()
        return {(each.dtype, each.lora_a.shape[0], self._device) for each in layers}

    def describe(self) -> Iterator[AdapterReport]:
        """Reports on the adapters in memory where calls compute; the others are only counted in ``stats``."""
        with self._lock:
            found = [(number, each) for number, each in self._versions.items() if each in self._loader.final]
        for number, version in sorted(found, key=lambda pair: pair[0]):
            layout = version.layout
            dtypes = sorted({str(layer.dtype).removeprefix("torch.") for layer in layout.layers.values()})
            yield AdapterReport(
                number, version.name, self.kind, version.serial, layout.ranks(), ", ".join(dtypes), layout.size,
                len(layout.layers), "ready",
            )  # fmt: skip

    def check(self, adapters: Iterable[StoredAdapter]) -> None:
        """Check that adapters in memory still fit the model.

        Raises:
            AdapterMismatchError: the model changed, and one doesn't.
            ModelStateError: the model was moved.
            UnsupportedError: one has dropout, and the model is in train mode.
        """
        self._check(adapter.version for adapter in adapters)

    def _check(self, versions: Iterable[Version]) -> None:
        if self._model.device() != self._device:
            raise ModelStateError(
                f"the model was moved to {self._model.device()}, and its adapter store has adapters on "
                f"{self._device}: expected the same device. Move the model before you make its store."
            )
        for version in {version.layout: version for version in versions}.values():  # many share one
            self._layouts.check(version.name, version.layout)
            if version.layout.dropout and self._model.is_training():
                raise UnsupportedError(
                    f"adapter {version.name!r} has a dropout of {version.layout.dropout:g}, the model is in train "
                    "mode, and stored adapters support only inference: expected eval mode. Call model.eval(), or use "
                    "load_adapter."
                )

    def _find(self, number: int) -> Version:
        version = self._versions.get(number)
        if version is None:
            raise ModelStateError(
                f"the adapter with id {number} was unregistered while a call that uses it was starting: expected it "
                "to exist. Unregister adapters when no call needs them."
            )
        return version

    def _forget(self, version: Version) -> None:
        version.is_gone = True
        self._loader.pin(version, False)
        self._loader.host.drop(version)
        self._loader.final.drop(version)
