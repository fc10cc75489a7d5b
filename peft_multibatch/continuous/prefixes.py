"""Which cached prefixes requests share in continuous batching: those under the same version of the same adapter."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peft_multibatch.continuous.scheduler import entry_of
from peft_multibatch.plan.ids import Entry, ids_of
from peft_multibatch.plan.segments import BASE


if TYPE_CHECKING:
    from transformers.generation.continuous_batching.requests import RequestState

    from peft_multibatch.adapters.registry import Registry


KEPT = 4096
"""Entries of which something is remembered. There are as many as there are mixtures, which nobody can count."""


class Prefixes:
    """Salts for the tokens by which transformers finds cached blocks: one for each entry and version of its adapters.

    Args:
        vocabulary: how many tokens the model knows; a salted token is none of them.
        registry: tells the versions of adapters.
    """

    def __init__(self, vocabulary: int, registry: Registry) -> None:
        self._vocabulary = vocabulary
        self._registry = registry
        self._salts: dict[tuple, int] = {}  # the one that was used last is the last
        self._next_salt = itertools.count(1)

    def version(self, entry: Entry) -> tuple[int, ...]:
        """Versions of an entry's adapters."""
        return tuple(map(self._registry.version, ids_of(entry)))

    def salted(self, tokens: list[int], entry: Entry) -> list[int]:
        """Tokens of which the first two tell the adapter and its version, too: blocks are hashed by their tokens."""
        if entry == BASE or len(tokens) < 2:  # no block is that short
            return tokens
        key = entry, self.version(entry)
        salt = self._salts.pop(key, 0) or next(self._next_salt)
        if -1 not in key[1]:  # of what nobody knows, nobody finds anything again
            self._salts[key] = salt
        if len(self._salts) > KEPT:  # whoever comes again finds no prefixes, and that is all
            del self._salts[next(iter(self._salts))]
        high, low = divmod(salt, (2**31 - 1) // self._vocabulary - 1)
        return [tokens[0] + self._vocabulary * low, tokens[1] + self._vocabulary * high, *tokens[2:]]

    def salted_mark(self, mark: Callable[..., None]) -> Callable[..., None]:
        """What marks blocks as complete, with salted tokens."""

        def salted_mark(state: RequestState, *args: Any) -> None:
            if not args[0]:  # no block was completed
                return
            salted = copy.copy(state)
            # a prompt of one token fills its first block with what was generated
            tokens = state.initial_tokens + state.generated_tokens
            salted.initial_tokens = self.salted(tokens, entry_of(state))
            salted.generated_tokens = []
            mark(salted, *args)

        return salted_mark
