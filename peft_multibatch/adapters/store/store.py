"""The public API of an adapter store: registering adapters, prefetching, pinning and statistics."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

from transformers.utils import logging

from peft_multibatch.adapters.store import files
from peft_multibatch.adapters.store.files import AdapterFiles
from peft_multibatch.adapters.store.loading import Turn
from peft_multibatch.adapters.store.paths import CONFIG, path_of
from peft_multibatch.adapters.store.progress import tracked
from peft_multibatch.adapters.store.source import StoredAdapters
from peft_multibatch.adapters.store.version import Version
from peft_multibatch.errors import (
    AdapterFileError,
    AdapterIdsError,
    ModelStateError,
    MultibatchError,
    UnknownAdapterError,
)
from peft_multibatch.plan.ids import BASE_NAME, nearest
from peft_multibatch.report import StoreStats


logger = logging.get_logger(__name__)

NAME = re.compile(r"[^\x00-\x1f\ud800-\udfff]{1,256}")

FILES = operator.attrgetter("path", "identity", "config")
"""What the files of a version are known by."""


class Registered(NamedTuple):
    """The result of ``register_folder``.

    Attributes:
        names: the adapters that are registered now.
        refused: the adapters that were refused, by name, with the errors.
    """

    names: list[str]
    refused: dict[str, MultibatchError]


class AdapterStore(StoredAdapters):
    """Adapters in files, of which those in use are in memory. Created by ``mb.adapter_store``."""

    def register(self, name: str, folder: str | os.PathLike, pin: bool | None = None) -> None:
        """Register an adapter. Reads and checks its configuration and the header of its weights, but no weights.

        Args:
            name: its name in batches. If it is registered already, it gets a new version, which later calls use;
                running calls finish with the old one.
            folder: a folder written by PEFT's ``save_pretrained``, with weights as safetensors. The files must stay
                in place.
            pin: whether to load the adapter and keep it in memory, as ``pin`` does; by default, a new version of a
                pinned adapter is pinned, too, but isn't waited for.

        Raises:
            AdapterFileError: the files are missing, damaged or outside of ``roots``.
            AdapterUnsupportedError: it isn't plain LoRA on linear layers.
            AdapterMismatchError: it doesn't fit the model.
            StoreFullError: it is larger than all of the store's memory; or it is registered, but couldn't be pinned.
            AdapterIdsError: the name isn't a valid adapter name.
        """
        self._check_name(name)
        self._register(name, files.find(name, folder, self._roots), pin)
        if pin:
            self.pin(name)

    def register_folder(self, folder: str | os.PathLike) -> Registered:
        """Register every subfolder that contains an adapter, under the subfolder's name.

        Adapters that are refused don't affect others. Adapters that are registered from the same files already aren't
        changed, so this can be called again after adapters were added.

        Args:
            folder: the folder that contains the adapters' folders.

        Returns:
            The names of the registered adapters, and the errors of the others.

        Raises:
            AdapterFileError: the folder can't be read.
        """
        folder = path_of(folder)
        try:
            found = sorted(entry.name for entry in os.scandir(folder) if os.path.isdir(entry.path))
        except OSError as error:
            raise AdapterFileError(
                f"register_folder got {folder!r}, which can't be read ({error.strerror}): expected a "
                "folder that contains adapters' folders. Check the path."
            ) from error
        names: list[str] = []
        refused: dict[str, MultibatchError] = {}
        for name in tracked("registering adapters", found):
            path = os.path.join(folder, name)
            if not os.path.exists(os.path.join(path, CONFIG)):
                continue
            try:
                self._check_name(name)
                self._register(name, files.find(name, path, self._roots), None, is_lazy=True)
                names.append(name)
            except MultibatchError as error:
                refused[name] = error.with_traceback(None)
        if refused:
            why = next(iter(refused.values()))
            logger.warning(f"{len(refused)} of {len(refused) + len(names)} adapters weren't registered: {why}")
        return Registered(names, refused)

    def unregister(self, name: str) -> None:
        """Unregister an adapter. Running calls finish with it.

        Raises:
            UnknownAdapterError: no adapter of the store has this name.
        """
        with self._lock:
            self._version(name)
            number = self._names.ids[name]
        with self._guard(number), self._lock:
            version = self._version(name)
            self._forget(version)
            del self._versions[self._names.ids[name]]
            self._names.remove_stored(name)

    def prefetch(self, *names: str) -> None:
        """Start loading adapters that will be needed soon, as far as there is room that no batch waits for.

        Raises:
            UnknownAdapterError: no adapter of the store has one of these names.
        """
        with self._lock:
            turn = Turn()
            for version in [self._version(name) for name in names]:
                self._loader.prefetch(version, turn)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Load an adapter and keep it in memory; with ``pinned=False``, make it evictable again.

        Waits until it is loaded. If that fails, the adapter isn't pinned.

        Raises:
            UnknownAdapterError: no adapter of the store has this name, or it was unregistered meanwhile.
            AdapterFileError: its files can't be read any more.
            StoreFullError: it doesn't fit into memory along with the other pinned adapters, or running calls left no
                room for it within the timeout.
        """
        while True:
            with self._lock:
                version = self._version(name)
                if pinned:
                    self._check_pin(version)
                self._loader.pin(version, pinned)
            if not pinned:
                return
            try:
                self._loader.fetch([version])
            except BaseException:
                with self._lock:
                    self._loader.pin(version, False)
                raise
            if not version.is_gone:
                return

    def stats(self) -> StoreStats:
        """Counters: registered adapters, memory use, hits, misses, loads and evictions."""
        loader = self._loader
        with self._lock:
            host, final = loader.host, loader.final
            for tier in (host, final):
                tier.arena.collect()
            has_device = final is not host
            return StoreStats(
                registered=len(self._versions),
                pinned=len(loader.pinned),
                host_adapters=len(host),
                host_bytes=host.arena.used,
                host_bytes_kept=host.arena.kept,
                max_host_bytes=host.arena.limit,
                device_adapters=len(final) if has_device else 0,
                device_bytes=final.arena.used if has_device else 0,
                device_bytes_kept=final.arena.kept if has_device else 0,
                max_device_bytes=final.arena.limit if has_device else 0,
                hits=self._hits,
                misses=self._misses,
                loads=loader.transfers.loads,
                evictions=final.evictions,
                bytes_read=loader.transfers.bytes_read,
                load_seconds=loader.transfers.seconds,
            )

    def __repr__(self) -> str:
        """Doesn't take the lock, because loading threads may hold it."""
        loader = self.__dict__.get("_loader")
        if loader is None or self._is_closed:
            return "AdapterStore(closed)"
        tier = loader.final
        memory = f"{tier.arena.used / 1e6:.1f} of {tier.arena.limit / 1e6:.1f} MB on {self._device}"
        return f"AdapterStore(registered={len(self._versions)}, in_memory={len(tier)}, {memory})"

    def __len__(self) -> int:
        return len(self._versions)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._names.ids.get(name, -1) in self._versions

    def __iter__(self) -> Iterator[str]:
        return iter([version.name for version in list(self._versions.values())])

    def _register(self, name: str, found: AdapterFiles, pin: bool | None, is_lazy: bool = False) -> None:
        """Register an adapter. If lazy, one that is registered from the same files isn't changed."""
        if self._is_closed:
            raise ModelStateError(
                "an adapter was registered in a store whose model was disabled: expected an enabled model. Call "
                "enable and adapter_store again."
            )
        layout = self._layouts.find(name, found)
        version = Version(name, found.path, found.identity, len(found.header), hash(found.config), layout)
        self._loader.check_size(version)
        guarded = -1
        while True:
            with nullcontext() if guarded < 0 else self._guard(guarded), self._lock:
                number = self._names.ids.get(name, -1)
                known = self._versions.get(number)
                if known is not None and is_lazy and FILES(known) == FILES(version):
                    return
                is_pinned = (known is not None and known.is_pinned) if pin is None else pin
                if known is not None and guarded != number:  # requests may run with it
                    guarded = number
                    continue
                if is_pinned:
                    self._check_pin(version)
                number = self._names.add_stored(name)
                self._versions[number] = version
                if known is not None:
                    self._forget(known)
                if is_pinned:
                    self._loader.pin(version, True)
                    self._loader.prefetch(version, Turn())
                return

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or name == BASE_NAME or not NAME.fullmatch(name):
            raise AdapterIdsError(
                f"an adapter was registered by the name {name!r:.80}: expected a string of 1 to 256 characters, "
                f"without control characters and surrogates, other than {BASE_NAME!r}. Choose another name."
            )
        self._names.check_stored(name)

    def _version(self, name: str) -> Version:
        version = self._versions.get(self._names.ids.get(name, -1)) if isinstance(name, str) else None
        if version is None:
            raise UnknownAdapterError(
                f"no adapter of the store is called {name!r:.80}: expected {nearest(str(name), self._names)}. "
                "Register it first."
            )
        return version

    def _check_pin(self, version: Version) -> None:
        others = [each for each in self._loader.pinned if each.name != version.name]
        self._loader.check_pins([*others, version])
