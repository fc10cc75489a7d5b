"""What is around a call where it begins: the backward pass, functions and checkpoints that may run it again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from peft_multibatch import compat
from peft_multibatch.ops.again import functions, in_function


NO_BACKWARD = -1
"""Number of the backward pass where none is under way."""


class Origin(NamedTuple):
    """Where a call began. What is around it there runs the call again, and isn't run again under its ids.

    Attributes:
        backward: number of the backward pass in which it began.
        trains: whether gradients were enabled.
        hooks: the innermost hook for tensors that autograd saves.
        function: gives the innermost ``autograd.Function`` whose ``forward`` was under way.
    """

    backward: int = NO_BACKWARD
    trains: bool = False
    hooks: Any = None
    function: Callable[[], Any] = lambda: None

    @classmethod
    def here(cls) -> Origin:
        """That of a call that begins now."""
        hooks = compat.saved_tensors_hooks(True)
        origin = cls(compat.current_backward(), torch.is_grad_enabled(), hooks and hooks[0])
        function = next(functions(), None) if in_function() else None
        return origin if function is None else origin._replace(function=weakref.ref(function))


def checkpoint_frame() -> Any:
    """The frame of the innermost of torch's checkpoints that aren't reentrant, or None where it is something else."""
    hooks = compat.saved_tensors_hooks(True)
    return hooks and _frame_of(hooks[0])


def checkpoint_frames(first: Any) -> list[Any]:
    """All such frames, the innermost first, as far as a hook that was there before."""
    return [frame for frame in map(_frame_of, _hooks_since(first)) if frame is not None]


def _frame_of(pack: Any) -> Any:
    cells = getattr(pack, "__closure__", None) or ()
    return next((cell.cell_contents for cell in cells if isinstance(cell.cell_contents, compat.CheckpointFrame)), None)


def _hooks_since(first: Any) -> list[Any]:
    """Hooks that pack what autograd saves. Only the innermost can be seen, so they are taken off and put back."""
    found: list[tuple[Any, Any]] = []
    try:
        while (hooks := compat.saved_tensors_hooks(True)) is not None and hooks[0] is not first:
            found.append(hooks)
            compat.pop_saved_tensors_hooks()
    finally:
        hooks = compat.saved_tensors_hooks(True)
        if found and hooks is not None and hooks[0] is found[-1][0]:  # an exception came before it was taken off
            found.pop()
        for pack, unpack in reversed(found):
            compat.push_saved_tensors_hooks(pack, unpack)
    return [pack for pack, _ in found]
