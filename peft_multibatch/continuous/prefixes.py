"""Share cached prefixes only between requests with the same version of the same adapter."""

from __future__ import annotations

import copy
import itertools
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from peft_multibatch.continuous.scheduler import entry_of
from peft_multibatch.errors import MultibatchError
from peft_multibatch.plan.ids import Entry, ids_of
from peft_multibatch.plan.segments import BASE


if TYPE_CHECKING:
    from torch import Tensor
    from transformers.generation.continuous_batching.requests import RequestState

    from peft_multibatch.adapters.adapter import AnyAdapter
    from peft_multibatch.adapters.registry import Registry


BEGUN = "_multibatch_begun"
"""Attribute of a request: the entry and the versions it started with. Forks copy it."""

HELD = "_multibatch_held"
"""Attribute of a request: its id, and the blocks that were completed before it had logits."""

_version = operator.attrgetter("_version")

KEPT = 4096
"""Maximum number of entries remembered, because the number of different mixtures is unlimited."""


class Prefixes:
    """Salts the tokens by which transformers finds cached blocks, with one salt per entry and version of its adapters.

    Args:
        vocabulary: size of the model's vocabulary; salted tokens are outside of it.
        registry: knows the versions of adapters.
    """

    def __init__(self, vocabulary: int, registry: Registry) -> None:
        self._vocabulary = vocabulary
        self._registry = registry
        self._salts: dict[tuple, int] = {}  # least recently used first
        self._next_salt = itertools.count(1)
        # how often the weights of a version had been written when a request first used it
        self._writes: weakref.WeakKeyDictionary[AnyAdapter, tuple[list[Tensor], list[int]]] = (
            weakref.WeakKeyDictionary()
        )

    def version(self, entry: Entry) -> tuple[int, ...]:
        """The versions of an entry's adapters."""
        return tuple(map(self._registry.version, ids_of(entry)))

    def key(self, state: RequestState) -> tuple[Entry, tuple[int, ...]]:
        """The entry and the versions of its adapters; requests with the same key share prefixes."""
        entry = entry_of(state)
        return entry, self.version(entry)

    def begin(self, state: RequestState, tokens: list[int]) -> list[int] | None:
        """Start a request: returns its salted tokens, or None if its adapters can't be read."""
        ids = ids_of(entry_of(state))
        try:
            self._notice_writes(ids)
            self._registry.adapters(ids, len(ids))  # records their versions
        except MultibatchError:
            return None
        state.__dict__[BEGUN] = self.key(state)
        return self.salted(tokens, state.__dict__[BEGUN])

    def salted(self, tokens: list[int], key: tuple[Entry, tuple[int, ...]]) -> list[int]:
        """Encode the adapter and its version into the first two tokens, because blocks are hashed by their tokens."""
        if key[0] == BASE or len(tokens) < 2:  # blocks are longer than that
            return tokens
        salt = self._salts.pop(key, 0) or next(self._next_salt)
        if -1 not in key[1]:  # prefixes of unknown versions must never be found again
            self._salts[key] = salt
        if len(self._salts) > KEPT:  # dropping a salt only costs cache hits
            del self._salts[next(iter(self._salts))]
        high, low = divmod(salt, (2**31 - 1) // self._vocabulary - 1)
        return [tokens[0] + self._vocabulary * low, tokens[1] + self._vocabulary * high, *tokens[2:]]

    def _notice_writes(self, ids: Iterable[int]) -> None:
        """Give adapters a new version if their weights were modified in place since a request first used them."""
        for number in ids:
            adapter = self._registry.current(number)
            if adapter is None:
                continue
            # inference tensors have no version counter, and can't normally be modified
            if adapter not in self._writes:
                tensors = [each for each in adapter.tensors() if not each.is_inference()]
                self._writes[adapter] = tensors, list(map(_version, tensors))
            tensors, writes = self._writes[adapter]
            if list(map(_version, tensors)) != writes:
                self._registry.renew([number])

    def salted_mark(self, mark: Callable[..., None]) -> Callable[..., None]:
        """Wrap ``mark``, which marks blocks as complete, to use salted tokens and to wait until the request has
        logits: only then is it known whether its keys and values are finite."""

        def salted_mark(state: RequestState, complete: Any) -> None:
            name, held = state.__dict__.get(HELD, (None, None))
            if held and name == state.request_id:  # a fork copies this attribute, but its parent marks the blocks
                # per kind of attention; older versions of transformers use one number
                is_named = isinstance(held, dict)
                complete = dict(Counter(held) + Counter(complete)) if is_named else held + complete
            key = self.key(state)
            if not complete or state.__dict__.get(BEGUN, key) != key:  # no complete block, or blocks of two versions
                return
            if not state.generated_tokens:
                state.__dict__[HELD] = state.request_id, complete
                return
            state.__dict__.pop(HELD, None)
            salted = copy.copy(state)
            # blocks also contain generated tokens; the last one isn't in the cache yet
            tokens = [*state.initial_tokens, *state.generated_tokens[:-1]]
            salted.initial_tokens = self.salted(tokens, key)
            salted.generated_tokens = []
            mark(salted, complete)

        return salted_mark
