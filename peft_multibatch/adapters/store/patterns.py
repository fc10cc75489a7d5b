"""Matching the patterns of adapters' configurations, which aren't trusted, with a limit on time and memory."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

import regex  # type: ignore[import-untyped]

from peft_multibatch.errors import AdapterUnsupportedError


LONGEST = 1000
"""The most characters of a pattern."""

DEEPEST = 20
"""The most groups inside of each other."""

MOST_PATTERNS = 2048
"""The most patterns of a configuration."""

SECONDS = 5.0
"""The most seconds that matching the patterns of a configuration with a model's modules may take."""

QUICK = 0.001
"""Seconds for which a match holds the GIL. If all of thousands of matches released it, each might wait for it."""

NAME = re.compile(r"[\w.-]+")
SINGLE = (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN)
REPEATED = (ops.MAX_REPEAT, ops.MIN_REPEAT)


class Patterns:
    """Matches patterns with modules' names, until the time for an adapter is over.

    Args:
        name: the adapter's name, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name, self._left = name, SECONDS

    def matches(self, pattern: str, module: str) -> bool:
        """Whether a pattern matches all of a module's name, as PEFT matches ``target_modules``.

        Raises:
            AdapterUnsupportedError: matching the adapter's patterns takes too long.
        """
        if NAME.fullmatch(pattern):
            return _is_name(pattern, module)
        return self._match(_whole, pattern, module)

    def first(self, values: Sequence[tuple[str, Any]], module: str, otherwise: Any) -> Any:
        """The value of the first pattern that matches the end of a module's name, as PEFT looks up ``rank_pattern``.

        Args:
            values: (pattern, value) pairs.
            module: the module's name.
            otherwise: the value if none matches.

        Raises:
            AdapterUnsupportedError: as in ``matches``.
        """
        for pattern, value in values:
            if NAME.fullmatch(pattern):
                before = module[: -len(pattern)]
                is_end = _is_name(pattern, module[len(before) :]) and (not before or before[-1] == ".")
            else:
                is_end = self._match(_end, pattern, module)
            if is_end:
                return value
        return otherwise

    def _match(self, compiled: Callable[[str], Any], pattern: str, module: str) -> bool:
        begin = time.perf_counter()
        try:
            if self._left <= 0:
                raise TimeoutError
            whole = compiled(pattern)  # which takes time as well
            try:
                return bool(whole.match(module, timeout=QUICK, concurrent=False))
            except TimeoutError:
                return bool(whole.match(module, timeout=self._left, concurrent=True))
        except TimeoutError as error:
            raise AdapterUnsupportedError(
                f"adapter {self._name!r} has the pattern {pattern[:80]!r}, and matching its patterns with the model's "
                f"modules takes more than {SECONDS:g} s: expected simpler ones. Write module names instead, or use "
                "load_adapter."
            ) from error
        finally:
            self._left -= time.perf_counter() - begin


def is_safe(pattern: str) -> bool:
    """Whether a valid pattern can be matched without much memory, and means the same to ``re`` and ``regex``.

    Only single characters are repeated, and all of the characters may occur in modules' names.
    """
    found = parser.parse(pattern)
    depth = max(accumulate((character == "(") - (character == ")") for character in f" {pattern}"))
    is_small = len(pattern) <= LONGEST and depth <= DEEPEST
    return is_small and found.state.flags == re.UNICODE.value and _are_safe(found)


def _are_safe(items: Any) -> bool:
    return all(_is_safe(op, value) for op, value in items)


def _is_safe(op: Any, value: Any) -> bool:
    if op in REPEATED:
        _, most, repeated = value
        return _are_safe(repeated) and (most <= 1 or (len(repeated) == 1 and repeated[0][0] in SINGLE))
    if op is ops.SUBPATTERN:
        _, added, removed, inner = value
        return not added and not removed and _are_safe(inner)
    if op is ops.BRANCH:
        return all(map(_are_safe, value[1]))
    if op in (ops.ASSERT, ops.ASSERT_NOT):
        direction, inner = value
        shortest, longest = inner.getwidth()  # equal in a look-behind, or `re` refuses it
        return _are_safe(inner) and (direction > 0 or shortest == longest)
    if op is ops.IN:
        return all(map(_is_safe_in_set, value))
    if op in (ops.LITERAL, ops.NOT_LITERAL):
        return _is_plain(value)
    return op in (ops.ANY, ops.AT)


def _is_safe_in_set(item: tuple[Any, Any]) -> bool:
    op, value = item
    if op is ops.RANGE:
        return all(map(_is_plain, value))
    return op in (ops.NEGATE, ops.CATEGORY) or (op is ops.LITERAL and _is_plain(value))


def _is_name(pattern: str, name: str) -> bool:
    """Whether a pattern that is a name, in which a dot is any character, matches a name."""
    return pattern == name or (
        len(pattern) == len(name) and all(own in (".", other) for own, other in zip(pattern, name))
    )


def _is_plain(character: int) -> bool:
    return chr(character).isalnum() or chr(character) in "_.-"


@functools.lru_cache(MOST_PATTERNS)
def _whole(pattern: str) -> Any:
    return regex.compile(f"(?:{pattern})\\Z", regex.VERSION0)


@functools.lru_cache(MOST_PATTERNS)
def _end(pattern: str) -> Any:
    return regex.compile(f"(?:.*\\.)?(?:{pattern})$", regex.VERSION0)
