"""Reading and validating an adapter's files: their location, their header, and whether they changed.

Files aren't trusted: nothing is unpickled or memory-mapped, nothing is allocated because of what a file claims, and
only regular files inside the roots are read.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from peft_multibatch.errors import AdapterFileError


CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")

MOST_CONFIG = 1 << 20
"""The largest configuration that is read, in bytes."""

MOST_HEADER = 16 << 20
"""The largest header that is read, in bytes. One with a thousand tensors has about 100 kB."""

FIRST_READ = 1 << 16
"""The size of the first read in bytes, which contains most headers completely."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file.

    Attributes:
        key: its name.
        dtype: its dtype.
        shape: its shape.
        start: its offset after the header, in bytes.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class AdapterFiles(NamedTuple):
    """An adapter's files.

    Attributes:
        path: the path of the weights, with links resolved.
        size: the size of the weights file in bytes.
        identity: the identity of the weights file; see ``identify``.
        header: the contents of its header.
        config: the contents of the configuration.
    """

    path: str
    size: int
    identity: bytes
    header: bytes
    config: bytes


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
    except TypeError:
        path = "\0"
    if "\0" in path:
        raise AdapterFileError(
            f"a folder of adapters was named {folder!r:.80}: expected a path, as a string or a pathlib.Path, without "
            "null characters. Check the path."
        )
    return path


def find(name: str, folder: str | os.PathLike, roots: Sequence[str]) -> AdapterFiles:
    """Read an adapter's files, except for the weights.

    Args:
        name: the adapter's name, for messages.
        folder: the folder that PEFT saved.
        roots: the result of ``resolve_roots``.

    Raises:
        AdapterFileError: a file is missing, outside of the roots, not a regular file, or too large.
    """
    folder = path_of(folder)
    real = os.path.realpath(folder)
    _check_inside(name, real, roots)
    if not os.path.isdir(real):
        raise AdapterFileError(
            f"adapter {name!r} was registered from {folder!r}, which is no folder: expected one written by PEFT's "
            "save_pretrained. Download adapters from the Hub first."
        )
    with _open(name, real, CONFIG, roots) as (descriptor, _):
        size = os.fstat(descriptor).st_size
        if size > MOST_CONFIG:
            raise AdapterFileError(
                f"adapter {name!r} has a configuration of {size} bytes: expected {MOST_CONFIG} at most. "
                "Save the adapter again."
            )
        config = _pread(descriptor, size, 0)
    with _open(name, real, WEIGHTS, roots) as (descriptor, path):
        size = os.fstat(descriptor).st_size
        return AdapterFiles(path, size, identify(descriptor), read_header(name, descriptor, size), config)


def identify(descriptor: int) -> bytes:
    """The identity of an open file: device, inode, size and time of last change."""
    found = os.fstat(descriptor)
    return struct.pack("<4Q", found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns % (1 << 64))


def read_header(name: str, descriptor: int, size: int) -> bytes:
    """Read the header of a safetensors file.

    Raises:
        AdapterFileError: it is missing, incomplete or too large.
    """
    first = _pread(descriptor, min(FIRST_READ, size), 0)
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or length > min(MOST_HEADER, size - 8):
        raise AdapterFileError(
            f"adapter {name!r} has a weights file of {size} bytes that claims a header of {length if first else 'no'} "
            f"bytes: expected a complete safetensors file, with a header of {MOST_HEADER} bytes at most. Save the "
            "adapter again."
        )
    rest = b"" if len(first) >= 8 + length else _pread(descriptor, 8 + length - len(first), len(first))
    return first[8 : 8 + length] + rest


def parse_header(name: str, header: bytes, size: int) -> tuple[StoredTensor, ...]:
    """The tensors of a safetensors file, in the order of their offsets.

    Args:
        name: the adapter's name, for messages.
        header: the result of ``read_header``.
        size: the size of the file in bytes.

    Raises:
        AdapterFileError: the header is invalid, or doesn't agree with the file's size.
    """

    def wrong(what: str) -> AdapterFileError:
        return AdapterFileError(
            f"adapter {name!r} has a safetensors header in which {what}: expected contiguous floating-point tensors "
            "up to the end of the file, as safetensors writes them. Save the adapter again."
        )

    entries = _parse_json(header)
    if not isinstance(entries, dict):
        raise wrong("there is no JSON object, or a name occurs twice")
    entries.pop("__metadata__", None)
    found = []
    for key, entry in entries.items():
        known = entry if isinstance(entry, dict) else {}
        dtype: Any = known.get("dtype")
        shape: Any = known.get("shape")
        offsets: Any = known.get("data_offsets")
        if not (isinstance(dtype, str) and dtype in DTYPES and _are_sizes(shape) and _are_sizes(offsets)):
            raise wrong(f"{_short(key)} is {_short(entry)}")
        if len(shape) > 8 or len(offsets) != 2:
            raise wrong(f"{_short(key)} has {len(shape)} dimensions and {len(offsets)} offsets")
        count = math.prod(shape)
        if offsets[1] - offsets[0] != count * DTYPES[dtype].itemsize:
            raise wrong(f"{_short(key)} has {_short(shape)} numbers of {dtype} in the bytes {_short(offsets)}")
        found.append((offsets[0], offsets[1], StoredTensor(key, DTYPES[dtype], tuple(shape), offsets[0])))
    found.sort(key=lambda each: each[:2])
    end = 0
    for start, stop, tensor in found:
        if start != end:
            raise wrong(f"{_short(tensor.key)} starts at {start}, and the tensor before it ends at {end}")
        end = stop
    if 8 + len(header) + end != size:
        raise wrong(f"tensors end at byte {8 + len(header) + end}, and the file at {size}")
    return tuple(tensor for _, _, tensor in found)


def parse_config(name: str, config: bytes) -> dict[str, Any]:
    """Parse an adapter's configuration.

    Raises:
        AdapterFileError: it isn't a JSON object with unique names.
    """
    found = _parse_json(config)
    if not isinstance(found, dict):
        raise AdapterFileError(
            f"adapter {name!r} has a {CONFIG} that is no JSON object, or in which a name occurs twice: expected one "
            "written by PEFT's save_pretrained. Save the adapter again."
        )
    return found


def read_weights(name: str, path: str, identity: bytes, header: int, target: memoryview) -> None:
    """Read everything after the header.

    Args:
        name: the adapter's name, for messages.
        path: the path of the weights.
        identity: the file's identity at registration.
        header: the length of the header in bytes.
        target: the memory to read into, as long as the weights.

    Raises:
        AdapterFileError: the file is missing, or has changed.
    """
    try:
        descriptor = os.open(path, FLAGS)
    except OSError as error:
        raise AdapterFileError(
            f"the weights of adapter {name!r} at {path!r} can't be opened any more ({error.strerror}): expected the "
            "file to stay in place as long as the adapter is registered. Register it again."
        ) from error
    try:
        if identify(descriptor) != identity:
            raise _changed(name, path)
        done, start = 0, 8 + header
        while done < len(target):
            count = os.preadv(descriptor, [target[done:]], start + done)
            if not count:
                raise _changed(name, path)
            done += count
        if identify(descriptor) != identity:
            raise _changed(name, path)
    finally:
        os.close(descriptor)


def _changed(name: str, path: str) -> AdapterFileError:
    return AdapterFileError(
        f"the weights of adapter {name!r} at {path!r} changed since they were registered: expected the same file. "
        "Register the adapter again, which makes a new version, and write new files to new folders."
    )


FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # opening a pipe must not wait for its writer


@contextmanager
def _open(name: str, folder: str, file: str, roots: Sequence[str]) -> Iterator[tuple[int, str]]:
    path = os.path.join(folder, file)
    if os.path.islink(path):  # as in the Hub's cache
        path = os.path.realpath(path)
        _check_inside(name, path, roots)
    try:
        descriptor = os.open(path, FLAGS)
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


def _check_inside(name: str, path: str, roots: Sequence[str]) -> None:
    if roots and not any(path == root or path.startswith(os.path.join(root, "")) for root in roots):
        raise AdapterFileError(
            f"adapter {name!r} is at {path!r} (links resolved), outside of the store's roots: expected a folder "
            "inside one of them. Move it there, or add its folder to adapter_store(roots=[...])."
        )


def _pread(descriptor: int, count: int, offset: int) -> bytes:
    found = b""
    while len(found) < count:
        part = os.pread(descriptor, count - len(found), offset + len(found))
        if not part:
            break
        found += part
    return found


def _parse_json(text: bytes) -> Any:
    """The parsed text; None if it isn't JSON, or if names aren't unique."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError
        return found

    try:
        return json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(each) is int and 0 <= each < 1 << 48 for each in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
