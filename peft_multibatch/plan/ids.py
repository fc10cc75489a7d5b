"""What users pass as ``adapter_ids`` → an entry for every sample."""

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
"""Name of a row without adapter, as in PEFT's own ``adapter_names``."""

SHOWN = 3
"""Adapters that an error names at most."""

COMPARED = 200
"""Names that are compared letter by letter with one that nobody has, which takes long."""

T_co = TypeVar("T_co", covariant=True)


class _ListOf(Protocol[T_co]):
    """A list, tuple or other sequence, and not a string, whose ``in`` takes nothing but strings."""

    def __contains__(self, value: object, /) -> bool: ...
    def __getitem__(self, index: SupportsIndex, /) -> T_co: ...
    def __iter__(self) -> Iterator[T_co]: ...
    def __len__(self) -> int: ...


class _Array(Protocol):
    """A 1-D tensor or array of integers."""

    def tolist(self) -> Any: ...


AdapterId = SupportsIndex | str | Mapping[str, float] | Mapping[int, float] | Mapping[int | str, float]
"""What users pass for one sample: an id, a name, or a mixture such as ``{"sql": 0.7, "poet": 0.3}``."""

AdapterIds = _ListOf[AdapterId] | _Array
"""What users pass as ``adapter_ids``: a list or tuple with one entry for every sample, or a 1-D integer tensor."""

DESCRIPTION = """\
With peft_multibatch:
    adapter_ids (`AdapterIds`, *optional*):
        The adapter of every {each}: a list, tuple or 1-D integer tensor with one entry for each. An entry is an
        adapter's integer id (its index in `mb.adapter_names`) or its name, `-1` or `"__base__"` for the base model
        alone, or a mixture such as `{{"sql": 0.7, "poet": 0.3}}`. Without it the call runs as it does without
        peft_multibatch."""
"""What docstrings of methods that take ids say about them."""

Entry = int | tuple[tuple[int, float], ...]
"""What one sample runs under: an id, or a mixture of several, each with its weight, in the order of the ids."""


def resolve(adapter_ids: Any, names: AdapterNames) -> list[Entry]:
    """Turn what users pass into ids.

    Args:
        adapter_ids: a list or tuple of ids, names and mixtures, a 1-D integer tensor or array; ``-1`` and
            ``"__base__"`` stand for the base model alone, ``{"sql": 0.7, "poet": 0.3}`` for a weighted sum.
        names: the adapters that are there.

    Returns:
        One entry per sample.

    Raises:
        AdapterIdsTypeError: something else was passed, or an entry is neither an integer nor a string nor a mixture.
        UnknownAdapterError: no adapter has this id or name.
        AdapterIdsError: an adapter has the name that stands for the base model.
        NoAdaptersError: there is no adapter at all.
    """
    if isinstance(adapter_ids, torch.Tensor):
        if adapter_ids.dim() != 1 or adapter_ids.is_floating_point() or adapter_ids.dtype == torch.bool:
            raise AdapterIdsTypeError(
                f"adapter_ids is a tensor of shape {list(adapter_ids.shape)} and dtype {adapter_ids.dtype}: expected "
                "a 1-D integer tensor with one id for every sample."
            )
        adapter_ids = adapter_ids.tolist()
    elif hasattr(adapter_ids, "tolist"):
        adapter_ids = adapter_ids.tolist()
    if isinstance(adapter_ids, str) or not isinstance(adapter_ids, Sequence):
        raise AdapterIdsTypeError(
            f"adapter_ids is {_show(adapter_ids)}: expected a list, tuple or tensor with one id or name for every "
            "sample, such as [0, 0, 1] or ['sql', '__base__']."
        )
    if not names:
        raise NoAdaptersError(
            "adapter_ids was passed, but the model has no adapters: add one first, with model.load_adapter(...) or "
            "model.add_adapter(...), or register some in mb.adapter_store(...)."
        )
    return [
        _mixture(entry, index, names) if isinstance(entry, Mapping) else _id(entry, index, names)
        for index, entry in enumerate(adapter_ids)
    ]


def components(entries: Sequence[Entry]) -> list[tuple[list[int], list[float] | None]]:
    """Take mixtures apart: the n-th component has the id and the weight of every entry's n-th adapter.

    Without mixtures that is one component, whose weights are None.
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
    """Raise where ids came under a keyword that nothing reads, so that they would be ignored.

    Args:
        method: what was called.
        given: its keyword arguments, without those that are read.
        is_known: whether the model reads a keyword that looks like one for adapters.
        takes: the keyword for ids.

    Raises:
        AdapterIdsTypeError: they did.
    """
    for keyword, value in given.items():
        if value is not None and _is_like_ids(keyword) and not is_known(keyword):
            raise AdapterIdsTypeError(
                f"{method} got the argument {keyword}, which nothing reads: expected {takes} where adapters are "
                f"meant. Write {takes}=..., or leave it out."
            )


def speaks_of_adapters(keyword: str) -> bool:
    """Whether a keyword has a word for adapters in it. Compiled code may ask."""
    word = keyword.lower()
    return "adapter" in word or "adaptor" in word or word.startswith(("lora", "peft")) or "_lora" in word


@functools.lru_cache(1024)
def _is_like_ids(keyword: str) -> bool:
    near = difflib.get_close_matches(keyword.lower(), ("adapter_ids", "adapter_names"), 1, 0.8)
    return speaks_of_adapters(keyword) or bool(near)


def check_requests(entries: Sequence[Any], prompts: Sequence[Any]) -> None:
    """Raise where ids and prompts differ in number.

    Raises:
        AdapterIdsLengthError: they do.
    """
    if len(entries) != len(prompts):
        raise AdapterIdsLengthError(
            f"adapter_ids has {len(entries)} entries for {len(prompts)} prompts: expected one for every prompt."
        )


def label_of(entry: Entry, names: AdapterNames) -> str:
    """How an entry is named for people: an adapter's name, or the names of a mixture and their weights."""
    if isinstance(entry, tuple):
        return " + ".join(f"{weight:g} {names.by_id.get(each)}" for each, weight in entry)
    return BASE_NAME if entry == BASE else str(names.by_id.get(entry))


def without(entry: Entry, ids: Collection[int]) -> Entry:
    """What is left of an entry without some adapters."""
    if not isinstance(entry, tuple):
        return BASE if entry in ids else entry
    return tuple(pair for pair in entry if pair[0] not in ids) or BASE


def ids_of(entry: Entry) -> tuple[int, ...]:
    """The ids of an entry's adapters; none for the base model alone."""
    if isinstance(entry, tuple):
        return tuple(each for each, _ in entry)
    return () if entry == BASE else (entry,)


def check_live(ids: Iterable[int], names: AdapterNames) -> None:
    """Raise where an adapter is gone that a block of ``mb.batch()`` names.

    Raises:
        UnknownAdapterError: it was deleted.
    """
    for each in ids:
        if each not in names.by_id:
            raise UnknownAdapterError(
                f"the adapter with the id {each} was deleted while ids that name it are in force: expected "
                f"{nearest(each, names)}. Leave mb.batch() before you delete an adapter that it uses."
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
        if not abs(value) <= torch.finfo(torch.float32).max:  # which is how weights travel
            raise AdapterIdsTypeError(
                f"adapter_ids[{index}] gives {key!r} the weight {_show(weight)}: expected a finite number in float32, "
                "as in {'sql': 0.7, 'poet': 0.3}."
            )
        if number == BASE:
            raise AdapterIdsTypeError(
                f"adapter_ids[{index}] gives the base model a weight: expected adapters alone, because a row is the "
                "base model's output plus the weighted sum of its adapters' deltas. Leave it out."
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
                f"adapter_ids[{index}] is {BASE_NAME!r}, which stands for the base model alone, and an adapter has "
                f"this name: expected another name for it. Write {BASE} for the base model, or "
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
            f"'{BASE_NAME}' for the base model alone, or a mixture such as {{'sql': 0.7, 'poet': 0.3}}."
        )
    if number != BASE and number not in names.by_id:
        gone = " (any more: it was deleted)" if 0 <= number < names.count else ""
        raise UnknownAdapterError(
            f"adapter_ids[{index}] is {number}, and no adapter has this id{gone}: expected {nearest(number, names)}."
        )
    return number


def nearest(wanted: str | int, names: AdapterNames) -> str:
    """What may have been meant, for messages: few adapters, however many there are, because others may be others'."""
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
    """How many letters two names begin with alike."""
    return next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _show(value: Any) -> str:
    return f"{value!r} of type {type(value).__name__}"
