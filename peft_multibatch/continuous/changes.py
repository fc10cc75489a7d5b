"""Changes of adapters between the steps of a manager's loop."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from peft_multibatch.continuous.steps import finish_writes
from peft_multibatch.errors import ModelStateError


class Changes:
    """A manager as ``Registry.changing`` sees it; see ``Guard``.

    Attributes:
        lock: held by a step of the loop, and by a change.

    Args:
        manager: the ``AdapterBatchingManager``.
    """

    def __init__(self, manager: Any) -> None:
        self.lock = threading.Condition(threading.RLock())
        self._waiting: list[int] = []  # threads that wait for the lock, or hold it for a change
        self._inside: list[int] = []  # threads inside `stopped`
        self._manager = weakref.ref(manager)  # which must not stay alive because of a cycle

    def give_way(self) -> None:
        """Let changes that wait begin; called by the loop, which holds the lock, before each step."""
        if self._waiting:
            self.lock.notify_all()
            self.lock.wait(0.001)  # releasing and re-acquiring at once would give no other thread a chance

    def check(self) -> None:
        """As in ``Guard``."""
        manager = self._manager()
        if manager is not None:
            manager._check_not_paused()

    def wake(self) -> None:
        """As in ``Guard``."""
        manager = self._manager()
        if manager is not None and hasattr(manager, "_wake_up_loop"):  # older versions of transformers poll
            manager._wake_up_loop.set()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """As in ``Guard``."""
        with self._locked() as manager:
            device = None if manager is None else manager.model.device
            self._inside.append(threading.get_ident())
            try:
                if device is not None and device.type == "cuda":
                    torch.cuda.synchronize(device)
                yield
            finally:
                self._inside.remove(threading.get_ident())
                if device is not None:
                    finish_writes(device)

    def has_begun(self, ids: Collection[int]) -> bool:
        """As in ``Guard``."""
        manager = self._manager()
        return manager is not None and manager._has_begun({*ids})

    def drain(self, ids: Collection[int]) -> None:
        """As in ``Guard``."""
        with self._locked():
            while not self.lock.wait_for(lambda: not self.has_begun(ids), 0.1):
                pass  # a loop that ended doesn't notify, hence the timeout

    def check_not_inside(self, method: str) -> None:
        """Check that this thread isn't inside a change, whose end the loop waits for.

        Raises:
            ModelStateError: it is.
        """
        if threading.get_ident() in self._inside:
            raise ModelStateError(
                f"{method} was called inside manager.changing(...), whose end the loop waits for: expected the change "
                f"to end first. Call {method} after that block."
            )

    @contextmanager
    def _locked(self) -> Iterator[Any]:
        manager = self._manager()
        self._waiting.append(threading.get_ident())
        try:
            self.wake()  # an idle loop holds the lock while it sleeps
            with self.lock:
                yield manager
        finally:
            self._waiting.remove(threading.get_ident())
