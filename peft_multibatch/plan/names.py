"""The integer ids of adapters' names. Ids are given in order, and never reused for another name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peft_multibatch.errors import ModelStateError


MOST_GONE = 65_536
"""The number of deleted adapters whose ids are remembered, in case they are added again."""


class AdapterNames:
    """Names and ids of adapters. An adapter that is added again gets its previous id.

    Attributes:
        ids: the id of each existing adapter, by name.
        by_id: its name, by id.
        count: the number of ids that were ever given.
        changes: how often one of PEFT's adapters was added or deleted.
        removals: how often any adapter was deleted or unregistered.
        stored: the names of adapters that are in a store instead of in PEFT's modules.

    Args:
        names: the adapters that exist at the start.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.ids: dict[str, int] = {}
        self.by_id: dict[int, str] = {}
        self.count = 0
        self.changes = 0
        self.removals = 0
        self.stored: set[str] = set()
        self._gone: dict[str, int] = {}
        self.update(names)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def of_peft(self) -> int:
        """The number of PEFT's adapters."""
        return len(self.ids) - len(self.stored)

    def add(self, name: str) -> None:
        """Record that one of PEFT's adapters was added or replaced.

        Raises:
            ModelStateError: a stored adapter has this name.
        """
        self.check(name)
        self._add(name)
        self.changes += 1

    def remove(self, name: str) -> None:
        """Record that one of PEFT's adapters was deleted."""
        if name not in self.stored:
            self._remove(name)
            self.changes += 1

    def check(self, name: str) -> None:
        """Check that one of PEFT's adapters can have this name.

        Raises:
            ModelStateError: a stored adapter has it.
        """
        if name in self.stored:
            raise ModelStateError(
                f"an adapter called {name!r} was added to a model whose adapter store has another one with this name: "
                "expected different names. Call store.unregister first, or choose another name."
            )

    def check_stored(self, name: str) -> None:
        """Check that a stored adapter can have this name.

        Raises:
            ModelStateError: one of PEFT's adapters has it.
        """
        if name in self.ids and name not in self.stored:
            raise ModelStateError(
                f"an adapter called {name!r} was registered in the store of a model that has another PEFT adapter "
                "with this name: expected different names. Delete that adapter first, or choose another name."
            )

    def add_stored(self, name: str) -> int:
        """Record that a stored adapter was registered, possibly a new version of one; returns its id.

        Raises:
            ModelStateError: one of PEFT's adapters has this name.
        """
        self.check_stored(name)
        self.stored.add(name)
        self._add(name)
        return self.ids[name]

    def remove_stored(self, name: str) -> None:
        """Record that a stored adapter was unregistered."""
        self._remove(name)
        self.stored.discard(name)

    def update(self, names: Iterable[str]) -> None:
        """Set the names of all of PEFT's adapters."""
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
            self.ids[name] = number  # last, because other threads read it without a lock

    def _remove(self, name: str) -> None:
        if name in self.ids:
            number = self._gone[name] = self.ids.pop(name)
            del self.by_id[number]
            self.removals += 1
            if len(self._gone) > MOST_GONE:
                del self._gone[next(iter(self._gone))]

    def listed(self) -> list[str | None]:
        """Names by id; None for deleted adapters."""
        return [self.by_id.get(number) for number in range(self.count)]
