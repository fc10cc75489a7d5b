"""Stored adapters as the registry asks for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from peft_multibatch.adapters.slots import Slots
from peft_multibatch.adapters.store import files
from peft_multibatch.adapters.store.arena import parse_size
from peft_multibatch.adapters.store.layout import Layers, StoreDtype
from peft_multibatch.adapters.store.layouts import Layouts
from peft_multibatch.adapters.store.loading import Loader
from peft_multibatch.adapters.store.streams import streams_of
from peft_multibatch.adapters.store.version import StoredAdapter, Version
from peft_multibatch.errors import ModelStateError, UnsupportedError
from peft_multibatch.plan.names import AdapterNames
from peft_multibatch.report import AdapterReport, Source


class StoredAdapters:
    """Adapters in files, of which those in use are in memory.

    Args:
        model: the layers.
        names: of all of the model's adapters.
        slots: which adapters in use take.
        device: where calls compute.
        max_host_memory: most bytes in host memory.
        max_device_memory: most bytes on the device; a CPU has none beside its own.
        max_rank: largest rank of any adapter.
        roots: folders inside of which adapters have to lie; anywhere where it is None.
        dtype: of weights in memory.
        timeout: seconds that a batch waits for its adapters at most.
        let_go: drops plans of calls that have ended, when there is no room.
        guard: makes a block in which an adapter may change.
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
        guard: Callable[[int], AbstractContextManager[None]],
    ) -> None:
        self._model, self._names, self._slots = model, names, slots
        self._roots = files.resolve_roots(roots)
        self._layouts = Layouts(model, max_rank, dtype)
        self._device, self._streams = device, streams_of(device)
        sizes = parse_size("max_host_memory", max_host_memory), parse_size("max_device_memory", max_device_memory)
        self._loader = Loader(device, *sizes, timeout, self._streams)
        self._loader.let_go, self._guard = let_go, guard
        self._lock = self._loader.lock
        self._versions: dict[int, Version] = {}  # by id
        self._hits = self._misses = 0
        self._is_closed = False

    def has(self, number: int) -> bool:
        """Whether an id is that of a stored adapter."""
        return number in self._versions

    def serial(self, number: int) -> int:
        """The version of an adapter."""
        return self._versions[number].serial

    def adapters(self, ids: Collection[int], is_new: bool = True) -> dict[int, StoredAdapter]:
        """Adapters in memory, by id; those that weren't are loaded.

        Args:
            ids: which.
            is_new: whether a call begins, for which hits and misses count; not so for steps of continuous batching.

        Raises:
            AdapterFileError: files can't be read any more.
            AdapterMismatchError: the model changed, and one doesn't fit it any more.
            StoreFullError: there is no room for all of them within the time limit.
            UnsupportedError: one has dropout, and the model trains.
        """
        tier = self._loader.final
        with self._lock:
            versions = {number: self._find(number) for number in ids}
            wanted = list(dict.fromkeys(versions.values()))
            there = sum(tier.touch(version) for version in wanted)
            found = tier.get_all(wanted) if there == len(wanted) else {}
        if is_new:
            self.count(there, len(wanted) - there)
        self._check(wanted)
        self._streams.note()
        if there < len(wanted):  # while it waits it holds no memory, for which another one may be waiting
            found = self._loader.fetch(wanted)
        names = self._model.names
        return {number: version.in_memory(found[version], self._slots, names) for number, version in versions.items()}

    def lease(self, ids: Sequence[int], ahead: Sequence[int]) -> list[StoredAdapter] | None:
        """Adapters if all of them are in memory, where they stay for as long as this is held; else they begin to load.

        Args:
            ids: which.
            ahead: others, which don't go for the sake of these.

        Raises:
            AdapterFileError: one couldn't be loaded.
            StoreFullError: there would never be room for all of them.
        """
        tier = self._loader.final
        with self._lock:
            wanted = [self._find(number) for number in ids]
            stay = [*wanted, *(self._versions[number] for number in ahead if number in self._versions)]
            self._loader.check_possible(wanted)
            for version in wanted:
                error, version.error = version.error, None
                if error is not None:
                    raise type(error)(*error.args)
                if not tier.touch(version):
                    self._loader.prefetch(version, stay)
            found = tier.get_all(wanted) if all(version in tier for version in wanted) else None
        if found is None:
            return None
        self._check(wanted)
        return [version.in_memory(found[version], self._slots, self._model.names) for version in wanted]

    def count(self, hits: int, misses: int) -> None:
        """Note how many adapters were in memory for a call or request that begins, and how many weren't."""
        with self._lock:
            self._hits += hits
            self._misses += misses

    def is_loaded(self, number: int) -> bool:
        """Whether an adapter is in memory, where calls compute."""
        version = self._versions.get(number)
        return version is not None and version in self._loader.final

    def is_coming(self, number: int) -> bool:
        """Whether an adapter is in memory, or on its way."""
        version = self._versions.get(number)
        return version is None or version.loading is not None or version in self._loader.final

    def load(self, ids: Sequence[int]) -> None:
        """Begin to load adapters, as far as there is room that no batch waits for."""
        with self._lock:
            versions = [self._find(number) for number in ids]
            for version in versions:
                self._loader.prefetch(version, versions)

    def on_loaded(self, call: Callable[[], object]) -> None:
        """Have something called whenever an adapter was loaded."""
        self._loader.on_loaded = call

    def current(self, number: int) -> StoredAdapter | None:
        """An adapter as calls under way use it; None where none does."""
        version = self._versions.get(number)
        return version.adapter() if version is not None and version.adapter is not None else None

    def covers(self, number: int, layer: Any) -> bool:
        """Whether an adapter has anything in a layer."""
        return self._model.names.get(layer, "") in self._find(number).layout.layers

    def close(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._is_closed = True
            self._loader.close()
            for version in self._versions.values():
                self._forget(version)
                self._names.remove_stored(version.name)
            self._versions.clear()

    def expect(self, layers: Iterable[Any]) -> dict[torch.dtype | None, tuple[int, bool]]:
        """As ``Layouts.expect``."""
        return self._layouts.expect([self._model.names.get(layer, "") for layer in layers])

    def describe(self) -> Iterator[AdapterReport]:
        """The adapters that are where calls compute; all others are only counted."""
        with self._lock:
            found = [(number, each) for number, each in self._versions.items() if each in self._loader.final]
        for number, version in sorted(found, key=lambda pair: pair[0]):
            layout = version.layout
            dtypes = sorted({str(layer.dtype).removeprefix("torch.") for layer in layout.layers.values()})
            yield AdapterReport(
                number, version.name, self.kind, version.serial, layout.ranks(), ", ".join(dtypes), layout.size,
                len(layout.layers), "ready",
            )  # fmt: skip

    def _check(self, versions: Iterable[Version]) -> None:
        if self._model.device() != self._device:
            raise ModelStateError(
                f"the model was moved to {self._model.device()}, and its adapter store keeps adapters for "
                f"{self._device}: expected it to stay. Move the model first, and make its store afterwards."
            )
        for version in versions:
            self._layouts.check(version.name, version.layout)
            if version.layout.dropout and self._model.is_training():
                raise UnsupportedError(
                    f"adapter {version.name!r} has a dropout of {version.layout.dropout:g}, the model is in train "
                    "mode, and stored adapters are for inference: expected eval mode. Call model.eval(), or use "
                    "load_adapter."
                )

    def _find(self, number: int) -> Version:
        version = self._versions.get(number)
        if version is None:
            raise ModelStateError(
                f"the adapter with the id {number} was unregistered while a call that names it began: expected it to "
                "stay. Unregister adapters when no call needs them."
            )
        return version

    def _forget(self, version: Version) -> None:
        version.is_gone, version.is_pinned = True, False
        self._loader.host.drop(version)
        self._loader.final.drop(version)
