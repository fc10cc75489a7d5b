"""The registry of a model's adapters: names, states, and the current version of each.

Calls look up adapters by id and get versions of them, which don't change. Where an adapter's weights come from is
known only to its source: ``PeftModules`` or an ``AdapterStore``.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from peft_multibatch.adapters import notices
from peft_multibatch.adapters.adapter import AnyAdapter
from peft_multibatch.adapters.checks import check_kind
from peft_multibatch.adapters.dropout import DropoutState
from peft_multibatch.adapters.slots import Slots
from peft_multibatch.adapters.tables import Tables
from peft_multibatch.adapters.weights import Adapter, ReadLayer
from peft_multibatch.errors import AdapterMismatchError, ModelStateError, MultibatchError, UnsupportedError
from peft_multibatch.plan.names import AdapterNames
from peft_multibatch.report import AdapterReport, Source, State


if TYPE_CHECKING:
    from peft_multibatch.adapters.store.store import AdapterStore

READY: State = "ready"
REFUSED: State = "refused"
BROKEN: State = "broken"
"""States of an adapter. A refused adapter can't run in mixed batches; a broken one can't run in PEFT either."""

IDLE_LOOKS = 16
"""The number of idle adapters that are checked as well, whenever an adapter in use has changed."""

MOST_IDLE = 1024
"""The most versions that are kept although no running call needs them."""


class PeftModules:
    """Adapters whose weights are in PEFT's modules inside the model.

    Attributes:
        layers: the model's PEFT layers.
        configs: PEFT's configurations, by adapter name.
    """

    kind: Source = "PEFT"

    def __init__(self, slots: Slots) -> None:
        self.layers: Sequence[ReadLayer] = ()
        self.configs: Mapping[str, Any] = {}
        self._slots = slots

    def read(self, name: str) -> Adapter:
        """The current version of an adapter in PEFT's modules.

        Raises:
            UnsupportedError: it can't run in mixed batches.
            AdapterMismatchError: it doesn't fit the model.
        """
        check_kind(name, self.configs.get(name))
        adapter = Adapter(name, self._slots)
        try:
            adapter.read(self.layers)
        except MultibatchError:
            raise
        except Exception as error:
            raise AdapterMismatchError(
                f"adapter {name!r} can't be read ({type(error).__name__}: {error}): expected weights and a scaling "
                "that PEFT's modules can run. Load it again; rows of other adapters aren't affected."
            ) from error
        if not adapter.reaches_any:
            raise AdapterMismatchError(
                f"adapter {name!r} has no weights in any layer of the model, so it would equal the base model: "
                "expected weights in at least one layer. Check its target_modules, and load it again."
            )
        return adapter


class Guard(Protocol):
    """A manager of continuous batching, as changes of adapters see it."""

    def check(self) -> None:
        """Check that this thread doesn't pause the manager.

        Raises:
            ModelStateError: it does.
        """
        ...

    def stopped(self) -> AbstractContextManager[None]:
        """A block in which no step runs."""
        ...

    def has_begun(self, ids: Collection[int]) -> bool:
        """Whether a request that started with one of these adapters hasn't ended yet."""
        ...

    def drain(self, ids: Collection[int]) -> None:
        """Wait until all requests that started with these adapters have ended, and until no step runs."""
        ...

    def wake(self) -> None:
        """Let requests start that waited."""
        ...


class Registry:
    """All adapters of a model.

    Attributes:
        names: names and ids.
        slots: the pool of slots for versions in use.
        tables: the tables of all banks.
        source: reads weights from PEFT's modules.
        store: adapters whose weights are in files, or None.
        held: ids whose requests may not start -> the number of changes that wait for them. Replaced when it changes.
    """

    def __init__(self) -> None:
        self.names = AdapterNames()
        self.slots = Slots()
        self.tables = Tables()
        self.source = PeftModules(self.slots)
        self.store: AdapterStore | None = None
        self.held: Counter[int] = Counter()
        self._guards: list[weakref.ref[Guard]] = []
        self._changing = threading.RLock()
        self._current: OrderedDict[int, Adapter] = OrderedDict()
        self._lock = threading.Lock()
        self._drops = 0  # how often versions were dropped, so that none is kept that was read before
        self._dropout: dict[int, DropoutState] = {}
        self._check_count = 0
        self._last_checks: dict[int, int] = {}  # the value of _check_count when each was compared

    def adapters(self, ids: Iterable[int], checks: int | None = None) -> dict[int, AnyAdapter]:
        """The current versions of adapters, by id. Waits until stored ones are in memory.

        Args:
            ids: the adapters.
            checks: the most adapters to compare with PEFT's state, starting with those compared longest ago; the
                others may be a few calls old. By default all are compared, as when a call begins.

        Raises:
            UnsupportedError: one can't run in mixed batches.
            ModelStateError: one doesn't fit the model, can't be read, or doesn't fit into memory.
        """
        ids = list(ids)
        stored = [each for each in ids if self.store.has(each)] if self.store is not None else []
        if not stored:
            return self._of_peft(ids, checks)
        assert self.store is not None
        found: dict[int, AnyAdapter] = {**self.store.adapters(stored, is_new=checks is None)}
        if len(stored) < len(ids):
            found.update(self._of_peft([each for each in ids if each not in found], checks))
            found = {each: found[each] for each in ids}
        return found

    def _of_peft(self, ids: list[int], checks: int | None) -> dict[int, AnyAdapter]:
        due = set(ids)
        if checks is not None and checks < len(ids):
            self._check_count += 1
            due = set(sorted(ids, key=lambda each: self._last_checks.get(each, 0))[:checks])
            self._last_checks.update(dict.fromkeys(due, self._check_count))
        noticed = notices.now()
        found: dict[int, AnyAdapter] = {}
        for each in ids:
            adapter = self._current.get(each)
            # requests continue with the version of a deleted adapter that they began with
            if adapter is not None and each in due and each in self.names.by_id and not adapter.holds(noticed):
                adapter = None
                self._drop_changed_idle(noticed)
            if adapter is None:
                adapter = self._read(each)
            found[each] = adapter
        return found

    def of_peft(self) -> list[int]:
        """Ids of the adapters in PEFT's modules."""
        found = map(self.names.ids.get, list(self.source.configs))
        return [number for number in found if number is not None]  # others were deleted just now

    def check_any_runs(self) -> None:
        """Check that at least one of the adapters, if there are any, can run.

        Raises:
            UnsupportedError: all of them are refused.
        """
        refusals = []
        for number in list(self.names.by_id):
            try:
                self.adapters([number])
                return
            except UnsupportedError as error:
                refusals.append(error)
            except MultibatchError:
                return
        if refusals:
            raise refusals[0]

    def describe(self, check_weights: bool = False) -> Iterator[AdapterReport]:
        """Report every adapter, whether it can run, and if not, why.

        Args:
            check_weights: whether to read all weights as well.
        """
        stored = self.names.stored
        for number, name in sorted(item for item in self.names.by_id.items() if item[1] not in stored):
            state, reason, version = READY, "", -1
            ranks: tuple[int, ...] = ()
            dtypes, size, layers = "", 0, 0
            try:
                adapter = self._of_peft([number], None)[number]
                assert isinstance(adapter, Adapter)
            except MultibatchError as error:
                state, reason = REFUSED if isinstance(error, UnsupportedError) else BROKEN, str(error)
            else:
                tensors = adapter.tensors()
                version, ranks, layers = adapter.serial, adapter.ranks(), adapter.num_layers
                dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
                size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
                if adapter.apart:
                    reason = f"runs per segment, because {', '.join(dict.fromkeys(adapter.apart.values()))}"
                if check_weights and not all(bool(tensor.isfinite().all()) for tensor in tensors):
                    state, reason = BROKEN, "some of its weights are not finite"
                elif check_weights and adapter.is_zero():
                    reason = "it equals the base model: every lora_B is zero, as after loading files with other keys"
            yield AdapterReport(number, name, self.source.kind, version, ranks, dtypes, size, layers, state, reason)
        if self.store is not None:
            yield from self.store.describe()

    def version(self, number: int) -> int:
        """A number that changes with every change of the adapter that was noticed."""
        if self.store is not None and self.store.has(number):
            return self.store.serial(number)
        adapter = self._current.get(number)
        return -1 if adapter is None else adapter.serial

    def guard_with(self, guard: Guard) -> None:
        """Let changes wait for the requests of a manager, as long as it exists."""
        with self._lock:
            self._guards = [*(each for each in self._guards if each() is not None), weakref.ref(guard)]

    @contextmanager
    def changing(self, *numbers: int) -> Iterator[None]:
        """A block in which adapters may be changed: no request runs with them, and no step of any manager so far."""
        for guard in self._live_guards():
            guard.check()
        with self._lock:
            self.held = self.held + Counter(numbers)
        try:
            while True:
                guards = self._live_guards()
                for guard in guards if len(guards) > 1 else ():
                    guard.drain(())  # so that others run while one is paused
                with self._changing, ExitStack() as stopped:  # one change at a time, because each stops all managers
                    guards = self._live_guards()
                    for guard in guards:
                        stopped.enter_context(guard.stopped())
                    begun = [guard for guard in guards if guard.has_begun(numbers)]
                    if not begun:
                        try:
                            yield
                        finally:
                            if self._live_guards():
                                self.renew(numbers)
                        return
                for guard in begun:  # without stopping other managers
                    guard.drain(numbers)
        finally:
            with self._lock:
                self.held = self.held - Counter(numbers)
            for guard in self._live_guards():
                guard.wake()

    def _live_guards(self) -> list[Guard]:
        return [guard for each in self._guards if (guard := each()) is not None]

    def current(self, number: int) -> AnyAdapter | None:
        """The version that was read last, which may be out of date."""
        if self.store is not None and self.store.has(number):
            return self.store.current(number)
        return self._current.get(number)

    def dropout_state(self, number: int) -> DropoutState:
        """The seed and step of an adapter's dropout masks; the same object for all of its versions."""
        return self._dropout.setdefault(number, DropoutState(self.names.by_id[number]))

    def renew(self, ids: Iterable[int]) -> None:
        """Read these adapters again, because their weights were written in place, which isn't noticed."""
        with self._lock:
            self._drops += 1
            for each in ids:
                self._current.pop(each, None)

    def forget(self) -> None:
        """Drop all versions, so that adapters are read again."""
        with self._lock:
            self._drops += 1
            self._current.clear()

    def forget_gone(self) -> None:
        """Drop adapters that were deleted, and free their memory."""
        there = self.names.by_id
        for known in (self._current, self._last_checks, self._dropout):
            for each in [each for each in list(known) if each not in there]:
                known.pop(each, None)

    def _drop_changed_idle(self, noticed: object) -> None:
        """Drop idle adapters that changed too, so that the memory of their old weights is freed."""
        for number in list(self._current)[:IDLE_LOOKS]:
            adapter = self._current.get(number)
            if adapter is not None and not adapter.holds(noticed):
                self._current.pop(number, None)
            elif adapter is not None:
                self._current.move_to_end(number)

    def _read(self, number: int) -> Adapter:
        name = self.names.by_id.get(number)
        if name is None:
            raise ModelStateError(
                f"the adapter with id {number} was deleted while a call that uses it was starting: expected it to "
                "exist. Delete adapters when no call needs them."
            )
        self._current.pop(number, None)
        drops = self._drops
        adapter = self.source.read(name)
        adapter.dropout_state = self.dropout_state(number)
        with self._lock:
            if drops == self._drops:  # otherwise PEFT may have been in the middle of adding it
                self._current[number] = adapter
        while len(self._current) > MOST_IDLE:
            self._current.popitem(last=False)
        return adapter
