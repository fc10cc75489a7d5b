"""Reading and validating an adapter's files: their header, and whether they changed.

Files aren't trusted: nothing is unpickled or memory-mapped, and nothing is allocated because of what a file claims.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from peft_multibatch.adapters.store.paths import CONFIG, FLAGS, WEIGHTS, located, opened
from peft_multibatch.errors import AdapterFileError


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


def find(name: str, folder: str | os.PathLike, roots: Sequence[str]) -> AdapterFiles:
    """Read an adapter's files, except for the weights.

    Args:
        name: the adapter's name, for messages.
        folder: the folder that PEFT saved.
        roots: the result of ``resolve_roots``.

    Raises:
        AdapterFileError: a file is missing, outside of the roots, not a regular file, or too large.
    """
    real = located(name, folder, roots)
    with opened(name, real, CONFIG, roots) as (descriptor, _):
        size = os.fstat(descriptor).st_size
        if size > MOST_CONFIG:
            raise AdapterFileError(
                f"adapter {name!r} has a configuration of {size} bytes: expected {MOST_CONFIG} at most. "
                "Save the adapter again."
            )
        config = _pread(name, descriptor, size, 0)
    with opened(name, real, WEIGHTS, roots) as (descriptor, path):
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
    first = _pread(name, descriptor, min(FIRST_READ, size), 0)
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or length > min(MOST_HEADER, size - 8):
        raise AdapterFileError(
            f"adapter {name!r} has a weights file of {size} bytes that claims a header of {length if first else 'no'} "
            f"bytes: expected a complete safetensors file, with a header of {MOST_HEADER} bytes at most. Save the "
            "adapter again."
        )
    rest = b"" if len(first) >= 8 + length else _pread(name, descriptor, 8 + length - len(first), len(first))
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
            raise wrong(f"{short(key)} is {short(entry)}")
        if len(shape) > 8 or len(offsets) != 2:
            raise wrong(f"{short(key)} has {len(shape)} dimensions and {len(offsets)} offsets")
        count = math.prod(shape)
        if offsets[1] - offsets[0] != count * DTYPES[dtype].itemsize:
            raise wrong(f"{short(key)} has {short(shape)} numbers of {dtype} in the bytes {short(offsets)}")
        found.append((offsets[0], offsets[1], StoredTensor(key, DTYPES[dtype], tuple(shape), offsets[0])))
    found.sort(key=lambda each: each[:2])
    end = 0
    for start, stop, tensor in found:
        if start != end:
            raise wrong(f"{short(tensor.key)} starts at {start}, and the tensor before it ends at {end}")
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
        done, start, count = 0, 8 + header, 1
        try:
            while done < len(target) and count:
                count = os.preadv(descriptor, [target[done:]], start + done)
                done += count
        finally:  # once, and afterwards, because each call to the system may hold up other threads
            if identify(descriptor) != identity or not count:
                raise _changed(name, path)
    finally:
        os.close(descriptor)


def _changed(name: str, path: str) -> AdapterFileError:
    return AdapterFileError(
        f"the weights of adapter {name!r} at {path!r} changed since they were registered: expected the same file. "
        "Register the adapter again, which makes a new version, and write new files to new folders."
    )


def _pread(name: str, descriptor: int, count: int, offset: int) -> bytes:
    found = b""
    try:
        while len(found) < count and (part := os.pread(descriptor, count - len(found), offset + len(found))):
            found += part
    except OSError as error:
        raise AdapterFileError(
            f"a file of adapter {name!r} can't be read ({error.strerror}): expected a file system that works. "
            "Register the adapter again."
        ) from error
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


def short(value: Any) -> str:
    """A value from a file, for messages."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
