"""Which cached prefixes requests share in continuous batching: those under the same version of the same adapter."""

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
"""Attribute of a request that tells under what it began; it is forked with it."""

HELD = "_multibatch_held"
"""Attribute of a request that has its id, and the blocks that were completed before it had logits."""

_version = operator.attrgetter("_version")

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
        # how often the weights of a version had been written when somebody began under it
        self._writes: weakref.WeakKeyDictionary[AnyAdapter, tuple[list[Tensor], list[int]]] = (
            weakref.WeakKeyDictionary()
        )

    def version(self, entry: Entry) -> tuple[int, ...]:
        """Versions of an entry's adapters."""
        return tuple(map(self._registry.version, ids_of(entry)))

    def key(self, state: RequestState) -> tuple[Entry, tuple[int, ...]]:
        """What requests have in common that share prefixes: an entry, and the versions of its adapters."""
        entry = entry_of(state)
        return entry, self.version(entry)

    def begin(self, state: RequestState, tokens: list[int]) -> list[int] | None:
        """A request begins: its salted tokens, or None where its adapters can't be read."""
        ids = ids_of(entry_of(state))
        try:
            self._notice_writes(ids)
            self._registry.adapters(ids, len(ids))  # so that their versions are known
        except MultibatchError:
            return None
        state.__dict__[BEGUN] = self.key(state)
        return self.salted(tokens, state.__dict__[BEGUN])

    def salted(self, tokens: list[int], key: tuple[Entry, tuple[int, ...]]) -> list[int]:
        """Tokens of which the first two tell the adapter and its version, too: blocks are hashed by their tokens."""
        if key[0] == BASE or len(tokens) < 2:  # no block is that short
            return tokens
        salt = self._salts.pop(key, 0) or next(self._next_salt)
        if -1 not in key[1]:  # of what nobody knows, nobody finds anything again
            self._salts[key] = salt
        if len(self._salts) > KEPT:  # whoever comes again finds no prefixes, and that is all
            del self._salts[next(iter(self._salts))]
        high, low = divmod(salt, (2**31 - 1) // self._vocabulary - 1)
        return [tokens[0] + self._vocabulary * low, tokens[1] + self._vocabulary * high, *tokens[2:]]

    def _notice_writes(self, ids: Iterable[int]) -> None:
        """Adapters whose weights were written in place since somebody began under them are others from now on."""
        for number in ids:
            adapter = self._registry.current(number)
            if adapter is None:
                continue
            if adapter not in self._writes:  # inference tensors don't count, and can't be written in the usual ways
                tensors = [each for each in adapter.tensors() if not each.is_inference()]
                self._writes[adapter] = tensors, list(map(_version, tensors))
            tensors, writes = self._writes[adapter]
            if list(map(_version, tensors)) != writes:
                self._registry.renew([number])

    def salted_mark(self, mark: Callable[..., None]) -> Callable[..., None]:
        """What marks blocks as complete, with salted tokens, once a request has logits: before nobody knows whether
        its keys and values are finite."""

        def salted_mark(state: RequestState, complete: Any) -> None:
            name, held = state.__dict__.get(HELD, (None, None))
            if held and name == state.request_id:  # and of no fork, which has its parent's blocks, but not to mark
                is_named = isinstance(held, dict)  # by attention; older transformers have one number
                complete = dict(Counter(held) + Counter(complete)) if is_named else held + complete
            key = self.key(state)
            if not complete or state.__dict__.get(BEGUN, key) != key:  # none is, or they are of two versions
                return
            if not state.generated_tokens:
                state.__dict__[HELD] = state.request_id, complete
                return
            state.__dict__.pop(HELD, None)
            salted = copy.copy(state)
            # a prompt of one token fills its first block with what was generated; the last token isn't in the cache
            tokens = [*state.initial_tokens, *state.generated_tokens[:-1]]
            salted.initial_tokens = self.salted(tokens, key)
            salted.generated_tokens = []
            mark(salted, complete)

        return salted_mark
