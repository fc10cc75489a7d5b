"""Find the adapters that ``model=`` names, and register each when it is first requested.

Files are read on threads, one at a time per adapter, so that no two requests register the same adapter. No request
waits for the files of another adapter, or for another adapter to be replaced: all requests that wait for one adapter
occupy a single thread, and replacements, which wait for running requests, have threads of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from peft_multibatch.adapters.store.paths import CONFIG, WEIGHTS
from peft_multibatch.adapters.store.store import AdapterStore
from peft_multibatch.errors import AdapterFileError, MultibatchError, UnknownAdapterError
from peft_multibatch.plan.ids import BASE_NAME
from peft_multibatch.serve.errors import ApiError, from_adapter, invalid, unavailable, unknown_model
from peft_multibatch.serve.messages import Target
from peft_multibatch.serve.settings import NAME, Settings


THREADS = 32
MOST_REPLACED = 1024
"""The most adapters that are replaced or unloaded at the same time."""


class Catalog:
    """The adapters that clients may use.

    Args:
        store: the model's adapter store.
        settings: where adapters are, and how many and how large they may be.
        on_refused: called with an adapter's name and the error that registering it raised.
    """

    def __init__(
        self, store: AdapterStore, settings: Settings, on_refused: Callable[[str, Exception], None] = lambda *_: None
    ) -> None:
        self._store, self._settings, self._on_refused = store, settings, on_refused
        self._folders = dict(settings.adapters)  # of adapters not named after their folder
        self._unloaded: set[str] = set()  # unloaded by an administrator; their folders may still exist
        self._stamps: dict[str, tuple] = {}  # file stamps of registered adapters
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="adapters")
        self._replacing = ThreadPoolExecutor(MOST_REPLACED, thread_name_prefix="replaced_adapters")
        self._tasks: dict[str, asyncio.Task[None]] = {}  # the last change of each adapter, until it has ended

    async def find(self, model: str, mixture: dict[str, float] | None = None) -> Target:
        """Look up the model that a request names, and register its adapters.

        Args:
            model: the base model's name, or an adapter's.
            mixture: weights of adapters by name; only with the base model's name.

        Raises:
            ApiError: 404 if there is no such model, 400 if it can't be used.
        """
        is_base = model in self._settings.model_names
        if not mixture:
            if mixture is not None:
                raise invalid("'adapter' is empty: expected weights of adapters by name.", "adapter")
            if not is_base:
                await self._provide(model)
                return Target(model, model, (model,))
            return Target(BASE_NAME, model)
        if not is_base:
            raise invalid("'adapter' was given together with an adapter as 'model': expected the base model's name.",
                          "adapter")  # fmt: skip
        if len(mixture) > self._settings.max_mixture:
            raise invalid(f"'adapter' has {len(mixture)} adapters: expected at most {self._settings.max_mixture}.",
                          "adapter")  # fmt: skip
        for name in mixture:
            await self._provide(name)
        return Target(mixture, "mixture", tuple(mixture))

    async def load(self, name: str, folder: str, in_place: bool) -> None:
        """Register an adapter from a folder inside ``--adapters``, which is checked before anything changes.

        Raises:
            ApiError: the name or the folder can't be used, or the name is taken.
        """
        if not NAME.fullmatch(name) or name == BASE_NAME or name in self._settings.model_names:
            raise invalid(
                "'lora_name' is not a valid adapter name: expected at most 64 letters, digits, '.', '_' and '-', "
                "starting with a letter or digit, and not the base model's name.",
                "lora_name",
            )
        if "\0" in folder:
            raise invalid("'lora_path' contains a null character: expected a path.", "lora_path")
        await self._run(name, self._load, name, folder, in_place)

    async def unload(self, name: str) -> None:
        """Unregister an adapter, even if its folder is in ``--adapters``; running requests still finish with it.

        Raises:
            ApiError: there is no adapter with this name.
        """
        await self._run(name, self._unload, name)

    async def names(self) -> list[tuple[str, int]]:
        """The names of all adapters, with the modification times of their weights in seconds since 1970."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: sorted(self._list()))

    def close(self) -> None:
        """Shut down the threads."""
        for threads in (self._threads, self._replacing):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, name: str, function: Callable[..., None], *args: Any) -> None:
        """Run a function on a thread, after earlier ones for the same adapter, even if the request is cancelled."""
        task = asyncio.create_task(self._after(self._tasks.get(name), name, function, *args))
        self._tasks[name] = task

        def ended(task: asyncio.Task[None]) -> None:
            if self._tasks.get(name) is task:
                del self._tasks[name]
            if not task.cancelled():
                task.exception()  # or asyncio would log it if the request was cancelled

        task.add_done_callback(ended)
        await asyncio.shield(task)

    async def _after(
        self, before: asyncio.Task[None] | None, name: str, function: Callable[..., None], *args: Any
    ) -> None:
        if before is not None:
            await asyncio.wait([before])
        threads = self._replacing if name in self._store else self._threads
        await asyncio.get_running_loop().run_in_executor(threads, function, *args)

    async def _provide(self, name: str) -> None:
        if not NAME.fullmatch(name) or name == BASE_NAME:
            raise unknown_model(name)
        if name in self._store and self._stamp(name) == self._stamps.get(name):
            return
        await self._run(name, self._register_known, name)

    def _folder(self, name: str) -> Path | None:
        """The folder in which an adapter with this name should be."""
        if name in self._unloaded:
            return None
        root = self._settings.adapters_dir
        folder = self._folders.get(name, root / name if root is not None else None)
        return folder if folder is not None and os.path.exists(folder / CONFIG) else None

    def _stamp(self, name: str) -> tuple | None:
        """A value that changes when an adapter's files are replaced; None if they don't exist."""
        root = self._settings.adapters_dir
        folder = self._folders.get(name, root / name if root is not None else None)
        return None if folder is None else _stamp_of(folder)

    def _register_known(self, name: str) -> None:
        folder = self._folder(name)
        if folder is None:
            if name in self._store:  # its files are gone, but it may still be in memory
                return
            raise unknown_model(name)
        stamp = self._stamp(name)
        if name not in self._store or stamp != self._stamps.get(name):
            self._register(name, folder)
            self._stamps[name] = stamp or ()

    def _register(self, name: str, folder: Path) -> None:
        settings = self._settings
        if name not in self._store and len(self._store) >= settings.max_adapters:
            raise unavailable(f"The server has {len(self._store)} adapters, which is its limit.", "too_many_adapters")
        try:
            size = _size_of(folder)
            if size > settings.max_adapter_mb * 1e6:
                raise AdapterFileError(
                    f"adapter {name!r} has weights of {size} bytes: expected at most {settings.max_adapter_mb:g} MB. "
                    "Raise --max-adapter-mb."
                )
            self._store.register(name, folder)
        except MultibatchError as error:
            self._on_refused(name, error)
            raise from_adapter(error, name) from error

    def _load(self, name: str, folder: str, in_place: bool) -> None:
        root = self._settings.adapters_dir
        assert root is not None
        if (name in self._store or self._folder(name) is not None) and not in_place:
            raise ApiError(
                409,
                f"The adapter `{name}` is loaded: unload it first, or set 'load_inplace' to true.",
                "adapter_exists",
                "lora_name",
            )
        stamp = _stamp_of(root / folder)  # registering may take long
        self._register(name, root / folder)
        self._folders[name] = root / folder
        self._unloaded.discard(name)
        self._stamps[name] = stamp or ()
        self._store.prefetch(name)

    def _unload(self, name: str) -> None:
        if name not in self._store and self._folder(name) is None:
            raise ApiError(404, f"The adapter `{name:.80}` does not exist.", "adapter_not_found", "lora_name")
        self._unloaded.add(name)
        self._folders.pop(name, None)
        self._stamps.pop(name, None)
        with contextlib.suppress(UnknownAdapterError):  # it was never requested
            self._store.unregister(name)

    def _list(self) -> Iterator[tuple[str, int]]:
        root = self._settings.adapters_dir
        found = {name: folder for name, folder in list(self._folders.items()) if name not in self._unloaded}
        if root is not None and root.is_dir():
            for each in os.scandir(root):
                if NAME.fullmatch(each.name) and each.name not in {*found, *self._unloaded}:
                    found[each.name] = Path(each.path)
        for name, folder in found.items():
            if name not in self._settings.model_names:
                try:
                    yield name, int(os.stat(folder / CONFIG).st_mtime)
                except OSError:
                    continue


def _stamp_of(folder: Path) -> tuple | None:
    try:
        found = [os.stat(folder / file) for file in (CONFIG, WEIGHTS)]
    except OSError:
        return None
    return tuple((each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns) for each in found)


def _size_of(folder: Path) -> int:
    """The size of an adapter's weights in bytes; 0 if they don't exist, which registering reports."""
    try:
        return os.stat(folder / WEIGHTS).st_size
    except OSError:
        return 0
