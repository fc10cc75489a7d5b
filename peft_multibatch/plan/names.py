"""Which integer id each adapter's name has: ids follow from what came and went, and nobody else is ever given one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peft_multibatch.errors import ModelStateError


MOST_GONE = 65_536
"""Adapters that are gone whose ids are remembered, for the case that they come again."""


class AdapterNames:
    """Names and ids of adapters. An adapter that comes again has the id that it had.

    Attributes:
        ids: the id of every adapter that is there, by name.
        by_id: its name, by id.
        count: how many ids were ever given.
        changes: how often one of PEFT's adapters came or went.
        stored: names of those that aren't PEFT's but in a store.

    Args:
        names: those that are there from the beginning.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.ids: dict[str, int] = {}
        self.by_id: dict[int, str] = {}
        self.count = 0
        self.changes = 0
        self.stored: set[str] = set()
        self._gone: dict[str, int] = {}
        self.update(names)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def of_peft(self) -> int:
        """How many of PEFT's adapters there are."""
        return len(self.ids) - len(self.stored)

    def add(self, name: str) -> None:
        """One of PEFT's adapters came, or another one in its place.

        Raises:
            ModelStateError: a stored adapter has this name.
        """
        self.check(name)
        self._add(name)
        self.changes += 1

    def remove(self, name: str) -> None:
        """One of PEFT's adapters went."""
        if name not in self.stored:
            self._remove(name)
            self.changes += 1

    def check(self, name: str) -> None:
        """Raise where a name can't be that of one of PEFT's adapters.

        Raises:
            ModelStateError: a stored adapter has it.
        """
        if name in self.stored:
            raise ModelStateError(
                f"an adapter called {name!r} was added to a model in whose adapter store another one has this name: "
                "expected different names. Call store.unregister first, or choose another name."
            )

    def check_stored(self, name: str) -> None:
        """Raise where a name can't be that of a stored adapter.

        Raises:
            ModelStateError: one of PEFT's adapters has it.
        """
        if name in self.ids and name not in self.stored:
            raise ModelStateError(
                f"an adapter called {name!r} was registered in the store of a model to which PEFT added another one "
                "by this name: expected different names. Delete that one first, or choose another name."
            )

    def add_stored(self, name: str) -> int:
        """A stored adapter came, or another version of one; gives its id.

        Raises:
            ModelStateError: one of PEFT's adapters has this name.
        """
        self.check_stored(name)
        self.stored.add(name)
        self._add(name)
        return self.ids[name]

    def remove_stored(self, name: str) -> None:
        """A stored adapter went."""
        self._remove(name)
        self.stored.discard(name)

    def update(self, names: Iterable[str]) -> None:
        """These are PEFT's adapters, and no others."""
        there: Mapping[str, None] = dict.fromkeys(names)
        for name in there:
            self.check(name)
        for name in [name for name in self.ids if name not in there and name not in self.stored]:
            self.remove(name)
        for name in there:
            self.add(name)

    def _add(self, name: str) -> None:
        if name not in self.ids:
            number = self._gone.pop(name, self.count)
            self.count = max(self.count, number + 1)
            self.by_id[number] = name
            self.ids[name] = number  # last, because others may be looking

    def _remove(self, name: str) -> None:
        if name in self.ids:
            number = self._gone[name] = self.ids.pop(name)
            del self.by_id[number]
            if len(self._gone) > MOST_GONE:
                del self._gone[next(iter(self._gone))]

    def listed(self) -> list[str | None]:
        """Names by id; None where the adapter is gone."""
        return [self.by_id.get(number) for number in range(self.count)]
