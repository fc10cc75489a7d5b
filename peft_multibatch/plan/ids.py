"""Parsing ``adapter_ids`` into one entry per sample."""

from __future__ import annotations

import difflib
import functools
import heapq
import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, SupportsIndex, TypeVar

import torch

from peft_multibatch.errors import (
    AdapterIdsError,
    AdapterIdsLengthError,
    AdapterIdsTypeError,
    NoAdaptersError,
    UnknownAdapterError,
)
from peft_multibatch.plan.names import AdapterNames
from peft_multibatch.plan.segments import BASE


BASE_NAME = "__base__"
"""The name that stands for the base model, as in PEFT's own ``adapter_names``."""

SHOWN = 3
"""The most adapters that an error names."""

COMPARED = 200
"""The most names that are compared in full with an unknown one, because comparing is slow."""

T_co = TypeVar("T_co", covariant=True)


class _ListOf(Protocol[T_co]):
    """A list, tuple or other sequence. Not a string, because ``in`` accepts only strings there."""

    def __contains__(self, value: object, /) -> bool: ...
    def __getitem__(self, index: SupportsIndex, /) -> T_co: ...
    def __iter__(self) -> Iterator[T_co]: ...
    def __len__(self) -> int: ...


class _Array(Protocol):
    """A 1-D tensor or array of integers."""

    def tolist(self) -> Any: ...


AdapterId = SupportsIndex | str | Mapping[str, float] | Mapping[int, float] | Mapping[int | str, float]
"""The adapter of one sample: an id, a name, or a mixture such as ``{"sql": 0.7, "poet": 0.3}``."""

AdapterIds = _ListOf[AdapterId] | _Array
"""The type of ``adapter_ids``: a list or tuple with one entry per sample, or a 1-D integer tensor or array."""

DESCRIPTION = """\
With peft_multibatch:
    adapter_ids (`AdapterIds`, *optional*):
        The adapter of each {each}: a list, tuple or 1-D integer tensor with one entry per {each}. An entry is an
        adapter's integer id (its index in `mb.adapter_names`) or its name, `-1` or `"__base__"` for the base model,
        or a mixture such as `{{"sql": 0.7, "poet": 0.3}}`. Without `adapter_ids`, the call runs as it does without
        peft_multibatch."""
"""The paragraph on ``adapter_ids`` in the docstrings of methods that take them."""

Entry = int | tuple[tuple[int, float], ...]
"""The parsed adapter of one sample: an id, or a mixture as (id, weight) pairs in the order of the ids."""


def resolve(adapter_ids: Any, names: AdapterNames) -> list[Entry]:
    """Parse and check ``adapter_ids``.

    Args:
        adapter_ids: a list or tuple of ids, names and mixtures, or a 1-D integer tensor or array; ``-1`` and
            ``"__base__"`` stand for the base model, ``{"sql": 0.7, "poet": 0.3}`` for a weighted sum.
        names: the existing adapters.

    Returns:
        One entry per sample.

    Raises:
        AdapterIdsTypeError: ``adapter_ids`` or an entry has the wrong type.
        UnknownAdapterError: no adapter has this id or name.
        AdapterIdsError: an adapter has the name that stands for the base model.
        NoAdaptersError: the model has no adapters.
    """
    if isinstance(adapter_ids, torch.Tensor):
        if adapter_ids.dim() != 1 or adapter_ids.is_floating_point() or adapter_ids.dtype == torch.bool:
            raise AdapterIdsTypeError(
                f"adapter_ids is a tensor of shape {list(adapter_ids.shape)} and dtype {adapter_ids.dtype}: expected "
                "a 1-D integer tensor with one id per sample."
            )
        adapter_ids = adapter_ids.tolist()
    elif hasattr(adapter_ids, "tolist"):
        adapter_ids = adapter_ids.tolist()
    if isinstance(adapter_ids, str) or not isinstance(adapter_ids, Sequence):
        raise AdapterIdsTypeError(
            f"adapter_ids is {_show(adapter_ids)}: expected a list, tuple or tensor with one id or name per sample, "
            "such as [0, 0, 1] or ['sql', '__base__']."
        )
    if not names:
        raise NoAdaptersError(
            "adapter_ids was passed, but the model has no adapters: expected at least one. Add it with "
            "model.load_adapter(...) or model.add_adapter(...), or register some with mb.adapter_store(...)."
        )
    return [
        _mixture(entry, index, names) if isinstance(entry, Mapping) else _id(entry, index, names)
        for index, entry in enumerate(adapter_ids)
    ]


def components(entries: Sequence[Entry]) -> list[tuple[list[int], list[float] | None]]:
    """Split entries into components: the n-th one has the id and weight of every entry's n-th adapter.

    Without mixtures there is a single component, whose weights are None.
    """
    mixtures = [entry for entry in {*entries} if isinstance(entry, tuple)]
    if not mixtures:
        return [(list(entries), None)]  # type: ignore[arg-type]
    parts = [entry if isinstance(entry, tuple) else ((entry, 1.0),) for entry in entries]
    found: list[tuple[list[int], list[float] | None]] = []
    for index in range(max(map(len, mixtures))):
        pairs = [part[index] if index < len(part) else (BASE, 1.0) for part in parts]
        found.append(([each for each, _ in pairs], [weight for _, weight in pairs]))
    return found


def check_keywords(
    method: str,
    given: Mapping[str, Any],
    is_known: Callable[[str], bool] = lambda name: False,
    takes: str = "adapter_ids",
) -> None:
    """Check that ids weren't passed under another keyword, where they would be ignored.

    Args:
        method: the name of the called method.
        given: its other keyword arguments.
        is_known: whether the model reads a keyword that seems to be about adapters.
        takes: the keyword for ids.

    Raises:
        AdapterIdsTypeError: a keyword seems to be about adapters, but isn't read.
    """
    for keyword, value in given.items():
        if value is not None and _is_like_ids(keyword) and not is_known(keyword):
            raise AdapterIdsTypeError(
                f"{method} got the argument {keyword}, which nothing reads: expected {takes} for adapters. Write "
                f"{takes}=..., or leave it out."
            )


def speaks_of_adapters(keyword: str) -> bool:
    """Whether a keyword contains a word for adapters. Also called by compiled code."""
    word = keyword.lower()
    return "adapter" in word or "adaptor" in word or word.startswith(("lora", "peft")) or "_lora" in word


@functools.lru_cache(1024)
def _is_like_ids(keyword: str) -> bool:
    near = difflib.get_close_matches(keyword.lower(), ("adapter_ids", "adapter_names"), 1, 0.8)
    return speaks_of_adapters(keyword) or bool(near)


def check_requests(entries: Sequence[Any], prompts: Sequence[Any]) -> None:
    """Check that there are as many ids as prompts.

    Raises:
        AdapterIdsLengthError: there aren't.
    """
    if len(entries) != len(prompts):
        raise AdapterIdsLengthError(
            f"adapter_ids has {len(entries)} entries for {len(prompts)} prompts: expected one per prompt. Use -1 for "
            "the base model."
        )


def label_of(entry: Entry, names: AdapterNames) -> str:
    """An entry's label for users: the adapter's name, or a mixture's weights and names."""
    if isinstance(entry, tuple):
        return " + ".join(f"{weight:g} {names.by_id.get(each)}" for each, weight in entry)
    return BASE_NAME if entry == BASE else str(names.by_id.get(entry))


def without(entry: Entry, ids: Collection[int]) -> Entry:
    """An entry with some adapters removed."""
    if not isinstance(entry, tuple):
        return BASE if entry in ids else entry
    return tuple(pair for pair in entry if pair[0] not in ids) or BASE


def ids_of(entry: Entry) -> tuple[int, ...]:
    """The ids of an entry's adapters; empty for the base model."""
    if isinstance(entry, tuple):
        return tuple(each for each, _ in entry)
    return () if entry == BASE else (entry,)


def check_live(ids: Iterable[int], names: AdapterNames) -> None:
    """Check that no adapter of an open ``mb.batch()`` block was deleted.

    Raises:
        UnknownAdapterError: one was.
    """
    for each in ids:
        if each not in names.by_id:
            raise UnknownAdapterError(
                f"the adapter with id {each} was deleted inside an mb.batch() block that uses it: expected "
                f"{nearest(each, names)}. Leave the block before you delete the adapter."
            )


def _mixture(entry: Mapping[Any, Any], index: int, names: AdapterNames) -> Entry:
    weights: dict[int, float] = {}
    for key, weight in entry.items():
        number = _id(key, index, names)
        try:
            is_number = not isinstance(weight, (bool, str)) and not getattr(weight, "requires_grad", False)
            value = float(weight) if is_number else math.nan
        except (TypeError, ValueError):
            value = math.nan
        if not abs(value) <= torch.finfo(torch.float32).max:  # plans store weights in float32
            raise AdapterIdsTypeError(
                f"adapter_ids[{index}] gives {key!r} the weight {_show(weight)}: expected a finite number in float32, "
                "as in {'sql': 0.7, 'poet': 0.3}."
            )
        if number == BASE:
            raise AdapterIdsTypeError(
                f"adapter_ids[{index}] gives the base model a weight: expected only adapters, because a row is the "
                "base model's output plus the weighted sum of its adapters' deltas. Leave the base model out."
            )
        if number in weights:
            raise AdapterIdsTypeError(
                f"adapter_ids[{index}] names {names.by_id[number]!r} twice: expected each adapter once, by its id or "
                "its name."
            )
        weights[number] = value
    if not weights:
        raise AdapterIdsTypeError(
            f"adapter_ids[{index}] is an empty mixture: expected at least one adapter, as in {{'sql': 0.7, "
            f"'poet': 0.3}}, or '{BASE_NAME}'."
        )
    pairs = tuple((number, weight) for number, weight in sorted(weights.items()) if weight)
    if not pairs:
        return BASE
    return pairs[0][0] if len(pairs) == 1 and pairs[0][1] == 1 else pairs


def _id(entry: Any, index: int, names: AdapterNames) -> int:
    if isinstance(entry, str):
        if entry == BASE_NAME and BASE_NAME in names.ids:
            raise AdapterIdsError(
                f"adapter_ids[{index}] is {BASE_NAME!r}, which stands for the base model, but an adapter has this "
                f"name: expected another name for the adapter. Write {BASE} for the base model, or "
                f"{names.ids[BASE_NAME]} for the adapter."
            )
        number = BASE if entry == BASE_NAME else names.ids.get(entry)
        if number is None:
            raise UnknownAdapterError(
                f"adapter_ids[{index}] is {entry!r}, and no adapter has this name: expected {nearest(entry, names)}."
            )
        return number
    try:
        number = operator.index(entry)
    except TypeError:
        number = None
    if number is None or isinstance(entry, bool):
        raise AdapterIdsTypeError(
            f"adapter_ids[{index}] is {_show(entry)}: expected an integer id or an adapter's name, -1 or "
            f"'{BASE_NAME}' for the base model, or a mixture such as {{'sql': 0.7, 'poet': 0.3}}."
        )
    if number != BASE and number not in names.by_id:
        gone = " any more, because it was deleted" if 0 <= number < names.count else ""
        raise UnknownAdapterError(
            f"adapter_ids[{index}] is {number}, and no adapter has this id{gone}: expected {nearest(number, names)}."
        )
    return number


def nearest(wanted: str | int, names: AdapterNames) -> str:
    """Suggestions for messages: only a few adapters, because the others may belong to other users."""
    known = dict(sorted(names.by_id.items()))
    is_whole = len(known) <= SHOWN
    if not is_whole:
        if isinstance(wanted, int):
            numbers = sorted(known, key=lambda number: abs(number - wanted))[:SHOWN]
        else:
            begin_alike = heapq.nlargest(COMPARED, known.values(), lambda name: _shared(wanted, name))
            close = {*difflib.get_close_matches(wanted, begin_alike, SHOWN)}
            numbers = [number for number, name in known.items() if name in close]
        known = {number: known[number] for number in sorted(numbers)}
    listed = ", ".join([*(f"{number} ({name!r})" for number, name in known.items()), f"-1 ('{BASE_NAME}')"])
    return f"one of {listed}" if is_whole else f"another, such as {listed}"


def _shared(one: str, other: str) -> int:
    """The length of the common prefix of two names."""
    return next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _show(value: Any) -> str:
    return f"{value!r} of type {type(value).__name__}"
