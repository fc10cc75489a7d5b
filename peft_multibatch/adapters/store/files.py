"""Reading an adapter's files: where they may lie, what a header may say, and whether they are still the same.

Whoever wrote the files isn't trusted: nothing is unpickled, nothing is mapped into memory, nothing is allocated
because a file says so, and what isn't a regular file inside the roots isn't opened.
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
"""Bytes of the largest configuration that is read."""

MOST_HEADER = 16 << 20
"""Bytes of the largest header that is read; one of a thousand tensors has about 100 kB."""

FIRST_READ = 1 << 16
"""Bytes of the first read, in which most headers are whole."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file.

    Attributes:
        key: its name.
        dtype: its dtype.
        shape: its shape.
        start: where it begins behind the header, in bytes.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class AdapterFiles(NamedTuple):
    """An adapter's files as they were found.

    Attributes:
        path: of the weights, links resolved.
        size: of the weights, in bytes.
        identity: of the weights; see ``identify``.
        header: bytes of the header.
        config: bytes of the configuration.
    """

    path: str
    size: int
    identity: bytes
    header: bytes
    config: bytes


def resolve_roots(roots: Sequence[str | os.PathLike] | str | os.PathLike | None) -> tuple[str, ...]:
    """Folders in which adapters may lie, links resolved; none where everything may be read.

    Raises:
        AdapterFileError: one is no path, or there is an empty list of them.
    """
    if roots is None:
        return ()
    found = [roots] if isinstance(roots, (str, bytes, os.PathLike)) else list(roots)
    if not found:
        raise AdapterFileError(
            "adapter_store got roots=[]: expected folders inside of which adapters have to lie. Leave roots out to "
            "let them lie anywhere."
        )
    return tuple(os.path.realpath(path_of(root)) for root in found)


def path_of(folder: Any) -> str:
    """A path as text.

    Raises:
        AdapterFileError: it is none.
    """
    try:
        path = os.fsdecode(folder)
    except TypeError:
        path = "\0"
    if "\0" in path:
        raise AdapterFileError(
            f"a folder of adapters was named {folder!r:.80}: expected a path, as text or a pathlib.Path, without null "
            "characters. Look at the path."
        )
    return path


def find(name: str, folder: str | os.PathLike, roots: Sequence[str]) -> AdapterFiles:
    """Read all of an adapter's files but the weights.

    Args:
        name: the adapter's, for messages.
        folder: where PEFT saved it.
        roots: as ``resolve_roots`` gives them.

    Raises:
        AdapterFileError: something is missing, outside of the roots, no regular file, or too large to be a header.
    """
    folder = path_of(folder)
    real = os.path.realpath(folder)
    _check_inside(name, real, roots)
    if not os.path.isdir(real):
        raise AdapterFileError(
            f"adapter {name!r} was registered from {folder!r}, which is no folder: expected one that "
            "PEFT's save_pretrained wrote. Download adapters of the Hub first."
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
    """What tells whether a file is still the one that was registered: which it is, its size, when it was written."""
    found = os.fstat(descriptor)
    return struct.pack("<4Q", found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns % (1 << 64))


def read_header(name: str, descriptor: int, size: int) -> bytes:
    """The header of a safetensors file.

    Raises:
        AdapterFileError: there is none.
    """
    first = _pread(descriptor, min(FIRST_READ, size), 0)
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or length > min(MOST_HEADER, size - 8):
        raise AdapterFileError(
            f"adapter {name!r} has weights of {size} bytes whose header is said to have {length if first else 'no'} "
            f"bytes: expected a whole safetensors file, with a header of {MOST_HEADER} bytes at most. Save it again."
        )
    rest = b"" if len(first) >= 8 + length else _pread(descriptor, 8 + length - len(first), len(first))
    return first[8 : 8 + length] + rest


def parse_header(name: str, header: bytes, size: int) -> tuple[StoredTensor, ...]:
    """The tensors of a safetensors file, in the order in which they lie.

    Args:
        name: the adapter's, for messages.
        header: as ``read_header`` gives it.
        size: bytes of the file.

    Raises:
        AdapterFileError: this is no header, or the file is shorter or longer than it says.
    """

    def wrong(what: str) -> AdapterFileError:
        return AdapterFileError(
            f"adapter {name!r} has a safetensors header in which {what}: expected what safetensors writes, tensors of "
            "floating-point numbers one behind the other to the end of the file. Save the adapter again."
        )

    entries = _parse_json(header)
    if not isinstance(entries, dict):
        raise wrong("there is no JSON object, or a name comes twice")
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
            raise wrong(f"{_short(tensor.key)} begins at {start}, and what lies before it ends at {end}")
        end = stop
    if 8 + len(header) + end != size:
        raise wrong(f"tensors end at the byte {8 + len(header) + end}, and the file at {size}")
    return tuple(tensor for _, _, tensor in found)


def parse_config(name: str, config: bytes) -> dict[str, Any]:
    """The keys and values of an adapter's configuration.

    Raises:
        AdapterFileError: it isn't JSON.
    """
    found = _parse_json(config)
    if not isinstance(found, dict):
        raise AdapterFileError(
            f"adapter {name!r} has a {CONFIG} that is no JSON object, or in which a name comes twice: expected what "
            "PEFT's save_pretrained writes. Save the adapter again."
        )
    return found


def read_weights(name: str, path: str, identity: bytes, header: int, target: memoryview) -> None:
    """Read all that lies behind the header.

    Args:
        name: the adapter's, for messages.
        path: of the weights.
        identity: what they were when they were registered.
        header: bytes of the header.
        target: where to; as long as the weights are.

    Raises:
        AdapterFileError: the file isn't there any more, or is another one.
    """
    try:
        descriptor = os.open(path, FLAGS)
    except OSError as error:
        raise AdapterFileError(
            f"the weights of adapter {name!r} at {path!r} can't be opened any more ({error.strerror}): expected the "
            "file to stay for as long as the adapter is registered. Register it again."
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
        "Register the adapter again, which gives it a new version; write new files into new folders."
    )


FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # opening a pipe must not wait for its writer


@contextmanager
def _open(name: str, folder: str, file: str, roots: Sequence[str]) -> Iterator[tuple[int, str]]:
    path = os.path.join(folder, file)
    if os.path.islink(path):  # as in the cache of the Hub
        path = os.path.realpath(path)
        _check_inside(name, path, roots)
    try:
        descriptor = os.open(path, FLAGS)
    except OSError as error:
        pickles = [each for each in PICKLES if os.path.exists(os.path.join(folder, each))]
        if file == WEIGHTS and pickles:
            raise AdapterFileError(
                f"adapter {name!r} has its weights in {pickles[0]}, a pickle, which may run any code when it is read: "
                f"expected {WEIGHTS}. Load it with PEFT if you trust it, and save it with safe_serialization=True."
            ) from error
        raise AdapterFileError(
            f"adapter {name!r} has no {file} in {folder!r} that can be opened ({error.strerror}): expected a folder "
            "that PEFT's save_pretrained wrote. Look at the path."
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise AdapterFileError(
                f"adapter {name!r} has a {file} that is no regular file: expected one that PEFT's save_pretrained "
                "wrote. Save the adapter again."
            )
        yield descriptor, path
    finally:
        os.close(descriptor)


def _check_inside(name: str, path: str, roots: Sequence[str]) -> None:
    if roots and not any(path == root or path.startswith(os.path.join(root, "")) for root in roots):
        raise AdapterFileError(
            f"adapter {name!r} lies at {path!r}, links resolved, which is outside of the store's roots: expected a "
            "folder inside one of them. Move it there, or name its folder in adapter_store(roots=[...])."
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
    """What a text says; None where it isn't JSON, or where names aren't unique."""

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
