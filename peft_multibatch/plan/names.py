"""Which integer id each adapter's name has: ids follow from what came and went, and nobody else is ever given one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


MOST_GONE = 65_536
"""Adapters that are gone whose ids are remembered, for the case that they come again."""


class AdapterNames:
    """Names and ids of adapters. An adapter that comes again has the id that it had.

    Attributes:
        ids: the id of every adapter that is there, by name.
        by_id: its name, by id.
        count: how many ids were ever given.
        changes: how often an adapter came or went.

    Args:
        names: those that are there from the beginning.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.ids: dict[str, int] = {}
        self.by_id: dict[int, str] = {}
        self.count = 0
        self.changes = 0
        self._gone: dict[str, int] = {}
        self.update(names)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, name: str) -> None:
        """An adapter came, or another one in its place."""
        if name not in self.ids:
            number = self._gone.pop(name, self.count)
            self.count = max(self.count, number + 1)
            self.by_id[number] = name
            self.ids[name] = number  # last, because others may be looking
        self.changes += 1

    def remove(self, name: str) -> None:
        """An adapter went."""
        if name in self.ids:
            number = self._gone[name] = self.ids.pop(name)
            del self.by_id[number]
            if len(self._gone) > MOST_GONE:
                del self._gone[next(iter(self._gone))]
        self.changes += 1

    def update(self, names: Iterable[str]) -> None:
        """These and no others are there."""
        there: Mapping[str, None] = dict.fromkeys(names)
        for name in [name for name in self.ids if name not in there]:
            self.remove(name)
        for name in there:
            self.add(name)

    def listed(self) -> list[str | None]:
        """Names by id; None where the adapter is gone."""
        return [self.by_id.get(number) for number in range(self.count)]
