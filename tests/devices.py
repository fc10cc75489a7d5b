"""A CPU as a device with memory of its own, for adapter stores."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft_multibatch.adapters.store.streams import Streams


class FakeCopy:
    """A copy that takes half a second of the device's time, and writes its target when it finishes.

    Attributes:
        failure: the error that the device reports when it is asked.
    """

    def __init__(self, target: Tensor, source: Tensor) -> None:
        self._tensors: tuple[Tensor, ...] = target, source
        self.failure = ""

    def finish(self) -> None:
        target, source = self._tensors
        target.copy_(source)
        self._tensors = ()

    def is_done(self) -> bool:
        if self.failure:
            raise RuntimeError(self.failure)
        return not self._tensors

    def seconds(self) -> float:
        return 0.5


class Device(Streams):
    """The fake device.

    Attributes:
        late: copies that have to be told to finish, in the order in which they were launched; None if all finish at
            once.
        copied: the target's address and the mark of each copy.
        marks: the number of marks.
        pinned: the number of pinned bytes.
    """

    has_memory = True
    late: list[FakeCopy] | None = None

    def __init__(self, device: Any) -> None:
        super().__init__(device)
        self.copied: list[tuple[int, Any]] = []
        self.marks = self.pinned = 0

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def pin(self, block: Any) -> None:
        self.pinned += len(block)

    def copy(self, target: Tensor, source: Tensor, mark: Any) -> Any:
        self.copied.append((target.data_ptr(), mark))
        copy = FakeCopy(target, source)
        if self.late is None:
            copy.finish()
        else:
            self.late.append(copy)
        return copy
