"""Which cached prefixes requests share in continuous batching: those under the same version of the same adapter."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_multibatch.continuous.scheduler import entry_of
from peft_multibatch.plan.ids import Entry, slots_of
from peft_multibatch.plan.segments import BASE


if TYPE_CHECKING:
    from transformers.generation.continuous_batching.requests import RequestState

    from peft_multibatch.adapters.weights import Adapter


KEPT = 4096
"""Entries of which something is remembered. There are as many as there are mixtures, which nobody can count."""


class Prefixes:
    """Salts for the tokens by which transformers finds cached blocks: one for each entry and version of its adapters.

    Args:
        vocabulary: how many tokens the model knows; a salted token is none of them.

    Attributes:
        versions: of the adapters, by slot.
    """

    def __init__(self, vocabulary: int) -> None:
        self.versions: defaultdict[int, int] = defaultdict(int)
        self._vocabulary = vocabulary
        self._salts: dict[tuple, int] = {}  # the one that was used last is the last
        self._next_salt = itertools.count(1)
        self._seen: dict[int, Adapter] = {}  # adapters as they were when requests last ran under them

    def version(self, entry: Entry) -> tuple[int, ...]:
        """Versions of an entry's adapters."""
        return tuple(self.versions[slot] for slot in slots_of(entry))

    def renew(self, slots: Iterable[int]) -> None:
        """Give adapters that changed another version."""
        for slot in slots:
            self.versions[slot] += 1

    def see(self, adapters: Mapping[int, Adapter]) -> None:
        """Give adapters another version where they were replaced without a word since requests last ran under them."""
        for slot, adapter in adapters.items():
            seen = self._seen.get(slot)
            if seen is not adapter:
                self._seen[slot] = adapter
                if seen is not None and not seen.holds():
                    self.renew([slot])

    def forget(self, names: Sequence[str | None]) -> None:
        """Let go of adapters that were deleted.

        Args:
            names: adapter names by slot; None where an adapter was deleted.
        """
        self._seen = {slot: adapter for slot, adapter in self._seen.items() if names[slot] is not None}

    def salted(self, tokens: list[int], entry: Entry) -> list[int]:
        """Tokens of which the first two tell the adapter and its version, too: blocks are hashed by their tokens."""
        if entry == BASE or len(tokens) < 2:  # no block is that short
            return tokens
        key = entry, self.version(entry)
        salt = self._salts[key] = self._salts.pop(key, 0) or next(self._next_salt)
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
