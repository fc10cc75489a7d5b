"""Finding an adapter's files: only regular files inside the roots are opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft_multibatch.errors import AdapterFileError


CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")

FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # opening a pipe must not wait for its writer


def resolve_roots(roots: Sequence[str | os.PathLike] | str | os.PathLike | None) -> tuple[str, ...]:
    """The folders in which adapters may be, with links resolved; empty if they may be anywhere.

    Raises:
        AdapterFileError: one isn't a path, or the list is empty.
    """
    if roots is None:
        return ()
    found = [roots] if isinstance(roots, (str, bytes, os.PathLike)) else list(roots)
    if not found:
        raise AdapterFileError(
            "adapter_store got roots=[]: expected the folders that may contain adapters. Leave roots out to allow any "
            "folder."
        )
    return tuple(os.path.realpath(path_of(root)) for root in found)


def path_of(folder: Any) -> str:
    """A path as a string.

    Raises:
        AdapterFileError: it isn't a path.
    """
    try:
        path = os.fsdecode(folder)
        os.fsencode(path)
    except (TypeError, UnicodeError):
        path = "\0"
    if "\0" in path:
        raise AdapterFileError(
            f"a folder of adapters was named {folder!a:.80}: expected a path, as a string or a pathlib.Path, without "
            "null characters, that can be encoded. Check the path."
        )
    return path


def located(name: str, folder: str | os.PathLike, roots: Sequence[str]) -> str:
    """An adapter's folder, with links resolved.

    Args:
        name: the adapter's name, for messages.
        folder: the folder that PEFT saved.
        roots: the result of ``resolve_roots``.

    Raises:
        AdapterFileError: it isn't a folder, or is outside of the roots.
    """
    folder = path_of(folder)
    real = os.path.realpath(folder)
    _check_inside(name, real, roots)
    if not os.path.isdir(real):
        raise AdapterFileError(
            f"adapter {name!r} was registered from {folder!r}, which is no folder: expected one written by PEFT's "
            "save_pretrained. Download adapters from the Hub first."
        )
    return real


@contextmanager
def opened(name: str, folder: str, file: str, roots: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Open a file in an adapter's folder: its descriptor, and its path with links resolved.

    Args:
        name: the adapter's name, for messages.
        folder: the result of ``located``.
        file: the name of the file.
        roots: the result of ``resolve_roots``.

    Raises:
        AdapterFileError: it is missing, outside of the roots, or not a regular file.
    """
    path = os.path.join(folder, file)
    if os.path.islink(path):  # as in the Hub's cache
        path = os.path.realpath(path)
        _check_inside(name, path, roots)
    try:
        descriptor = _open_inside(path, roots)
    except OSError as error:
        pickles = [each for each in PICKLES if os.path.exists(os.path.join(folder, each))]
        if file == WEIGHTS and pickles:
            raise AdapterFileError(
                f"adapter {name!r} has its weights in {pickles[0]}, a pickle, which can run any code when it is read: "
                f"expected {WEIGHTS}. Load it with PEFT if you trust it, and save it with safe_serialization=True."
            ) from error
        raise AdapterFileError(
            f"adapter {name!r} has no {file} in {folder!r} that can be opened ({error.strerror}): expected a folder "
            "written by PEFT's save_pretrained. Check the path."
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise AdapterFileError(
                f"adapter {name!r} has a {file} that is no regular file: expected one written by PEFT's "
                "save_pretrained. Save the adapter again."
            )
        yield descriptor, path
    finally:
        os.close(descriptor)


def _open_inside(path: str, roots: Sequence[str]) -> int:
    """Open a file without following links below its root, because folders may be replaced by links at any time."""
    root = next((each for each in roots if _is_inside(path, each)), None)
    if root is None:
        return os.open(path, FLAGS)
    *folders, file = os.path.relpath(path, root).split(os.sep)
    parent = os.open(root, FLAGS | os.O_DIRECTORY)
    try:
        for folder in folders:
            child = os.open(folder, FLAGS | os.O_DIRECTORY, dir_fd=parent)
            os.close(parent)
            parent = child
        return os.open(file, FLAGS, dir_fd=parent)
    finally:
        os.close(parent)


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(os.path.join(root, ""))


def _check_inside(name: str, path: str, roots: Sequence[str]) -> None:
    if roots and not any(_is_inside(path, root) for root in roots):
        raise AdapterFileError(
            f"adapter {name!r} is at {path!r} (links resolved), outside of the store's roots: expected a folder "
            "inside one of them. Move it there, or add its folder to adapter_store(roots=[...])."
        )
