"""What users call to keep thousands of adapters in files, and what the registry asks for those that calls name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from transformers.utils import logging

from peft_multibatch.adapters.store import files
from peft_multibatch.adapters.store.files import AdapterFiles
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


class Registered(NamedTuple):
    """What ``register_folder`` found.

    Attributes:
        names: adapters that are registered now.
        refused: adapters that aren't, by name, and why.
    """

    names: list[str]
    refused: dict[str, MultibatchError]


class AdapterStore(StoredAdapters):
    """Adapters in files, of which those in use are in memory. ``mb.adapter_store`` makes one."""

    def register(self, name: str, folder: str | os.PathLike, pin: bool = False) -> None:
        """Make an adapter known. Its configuration and the header of its weights are read and checked, and no weights.

        Args:
            name: what batches call it. One that is registered gets a new version, which counts for calls that begin
                from now on; those under way end with the one that they began with.
            folder: what PEFT's ``save_pretrained`` wrote, with weights as safetensors. The files have to stay.
            pin: keep it in memory once it is there.

        Raises:
            AdapterFileError: the files are missing, damaged or outside of ``roots``.
            AdapterUnsupportedError: it is anything but plain LoRA on linear layers.
            AdapterMismatchError: it doesn't fit the model.
            StoreFullError: it is larger than all of the store's memory.
            AdapterIdsError: the name is none that batches could use.
        """
        self._check_name(name)
        self._register(name, files.find(name, folder, self._roots), pin)

    def register_folder(self, folder: str | os.PathLike) -> Registered:
        """Register all adapters that are folders of this one, each by its folder's name.

        One that can't be registered stops none of the others. One that is registered from the same files already
        stays as it is, so that this may be called again when adapters were added.

        Returns:
            Names of the adapters that are registered, and why others aren't.

        Raises:
            AdapterFileError: there is no such folder.
        """
        folder = files.path_of(folder)
        try:
            found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        except OSError as error:
            raise AdapterFileError(
                f"register_folder got {folder!r}, which can't be read ({error.strerror}): expected a "
                "folder of adapters' folders. Look at the path."
            ) from error
        names: list[str] = []
        refused: dict[str, MultibatchError] = {}
        for name in tracked("registering adapters", found):
            path = os.path.join(folder, name)
            if not os.path.exists(os.path.join(path, files.CONFIG)):
                continue
            try:
                self._check_name(name)
                self._register(name, files.find(name, path, self._roots), None)
                names.append(name)
            except MultibatchError as error:
                refused[name] = error.with_traceback(None)
        if refused:
            why = next(iter(refused.values()))
            logger.warning(f"{len(refused)} of {len(refused) + len(names)} adapters weren't registered: {why}")
        return Registered(names, refused)

    def unregister(self, name: str) -> None:
        """Forget an adapter. Calls under way end with it.

        Raises:
            UnknownAdapterError: no adapter of the store has this name.
        """
        with self._changing(name), self._lock:
            version = self._version(name)
            self._forget(version)
            del self._versions[self._names.ids[name]]
            self._names.remove_stored(name)

    def prefetch(self, *names: str) -> None:
        """Begin to load adapters that will be needed soon, as far as there is room that no batch waits for.

        Raises:
            UnknownAdapterError: no adapter of the store has one of these names.
        """
        with self._lock:
            for version in [self._version(name) for name in names]:
                self._loader.prefetch(version)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter in memory once it is there, and begin to load it; or, with False, let it go when need be.

        Raises:
            UnknownAdapterError: no adapter of the store has this name.
            StoreFullError: there would be no room beside all that is pinned.
        """
        with self._lock:
            version = self._version(name)
            if pinned:
                self._pin(version)
                self._loader.prefetch(version)
            version.is_pinned = pinned

    def stats(self) -> StoreStats:
        """How many adapters there are and where, and what happened so far."""
        loader = self._loader
        with self._lock:
            host, final = loader.host, loader.final
            for tier in (host, final):
                tier.arena.collect()
            has_device = final is not host
            return StoreStats(
                registered=len(self._versions),
                pinned=sum(version.is_pinned for version in self._versions.values()),
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
                loads=loader.loads,
                evictions=host.evictions + (final.evictions if has_device else 0),
                bytes_read=loader.bytes_read,
                load_seconds=loader.seconds,
            )

    def __repr__(self) -> str:
        """What can be read without the lock, for which loading threads may make others wait."""
        loader = self.__dict__.get("_loader")
        if loader is None or self._is_closed:
            return "AdapterStore(closed)"
        tier = loader.final
        memory = f"{tier.arena.used / 1e6:.1f} of {tier.arena.limit / 1e6:.1f} MB on {self._device}"
        return f"AdapterStore(registered={len(self._versions)}, in_memory={len(tier)}, {memory})"

    def __len__(self) -> int:
        return len(self._versions)

    def __contains__(self, name: object) -> bool:
        return self._names.ids.get(name, -1) in self._versions  # type: ignore[call-overload]

    def __iter__(self) -> Iterator[str]:
        return iter([version.name for version in list(self._versions.values())])

    def _register(self, name: str, found: AdapterFiles, pin: bool | None) -> None:
        """Register an adapter; where it isn't said whether it is pinned, one from the same files stays as it is."""
        if self._is_closed:
            raise ModelStateError(
                "an adapter was registered in a store whose model was disabled: expected an enabled model. Call "
                "enable and adapter_store again."
            )
        layout = self._layouts.find(name, found)
        version = Version(name, found.path, found.identity, len(found.header), hash(found.config), layout)
        self._loader.check_size(version)
        with self._changing(name), self._lock:
            known = self._versions.get(self._names.ids.get(name, -1))
            if known is not None and pin is None:
                if (known.path, known.identity, known.config) == (version.path, version.identity, version.config):
                    return
                pin = known.is_pinned
            if pin:
                self._pin(version)
            number = self._names.add_stored(name)
            self._versions[number] = version
            if known is not None:
                self._forget(known)
            if pin:
                self._loader.prefetch(version)

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or name == BASE_NAME or not re.fullmatch(r"[^\x00-\x1f]{1,256}", name):
            raise AdapterIdsError(
                f"an adapter was registered by the name {name!r:.80}: expected a string of 1 to 256 characters, none "
                f"of them a control character, other than {BASE_NAME!r}. Choose another name."
            )
        self._names.check_stored(name)

    def _changing(self, name: str) -> AbstractContextManager[None]:
        """A block in which no request of continuous batching is under way that began with an adapter of this name."""
        number = self._names.ids.get(name, -1)
        return self._guard(number) if number in self._versions else nullcontext()

    def _version(self, name: str) -> Version:
        version = self._versions.get(self._names.ids.get(name, -1)) if isinstance(name, str) else None
        if version is None:
            raise UnknownAdapterError(
                f"no adapter of the store is called {name!r:.80}: expected {nearest(name, self._names)}. Register it "
                "first."
            )
        return version

    def _pin(self, version: Version) -> None:
        others = [each for each in self._versions.values() if each.is_pinned and each.name != version.name]
        self._loader.check_pins([*others, version])
        version.is_pinned = True
