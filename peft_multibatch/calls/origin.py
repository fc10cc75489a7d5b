"""What surrounds a call when it begins: a backward pass, autograd functions and checkpoints."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from peft_multibatch import compat
from peft_multibatch.ops.again import functions, in_function


NO_BACKWARD = -1
"""The number that stands for no backward pass."""


class Origin(NamedTuple):
    """Where a call began. A function or checkpoint around it reruns the whole call, not layers under its ids.

    Attributes:
        backward: the number of the backward pass in which it began.
        trains: whether gradients were enabled.
        hooks: the innermost saved-tensors hook.
        function: returns the innermost ``autograd.Function`` whose ``forward`` was running.
    """

    backward: int = NO_BACKWARD
    trains: bool = False
    hooks: Any = None
    function: Callable[[], Any] = lambda: None

    @classmethod
    def here(cls) -> Origin:
        """The origin of a call that begins now."""
        hooks = compat.saved_tensors_hooks(True)
        origin = cls(compat.current_backward(), torch.is_grad_enabled(), hooks and hooks[0])
        function = next(functions(), None) if in_function() else None
        return origin if function is None else origin._replace(function=weakref.ref(function))


def checkpoint_frame() -> Any:
    """The frame of torch's non-reentrant checkpoint, if the innermost saved-tensors hook is its own; else None."""
    hooks = compat.saved_tensors_hooks(True)
    return hooks and _frame_of(hooks[0])


def checkpoint_frames(first: Any) -> list[Any]:
    """The frames of all non-reentrant checkpoints inside the hook ``first``, the innermost first."""
    return [frame for frame in map(_frame_of, _hooks_since(first)) if frame is not None]


def _frame_of(pack: Any) -> Any:
    cells = getattr(pack, "__closure__", None) or ()
    return next((cell.cell_contents for cell in cells if isinstance(cell.cell_contents, compat.CheckpointFrame)), None)


def _hooks_since(first: Any) -> list[Any]:
    """The saved-tensors hooks inside ``first``. Only the innermost is accessible, so they are popped and pushed."""
    found: list[tuple[Any, Any]] = []  # the outermost first
    push_all = itertools.starmap(compat.push_saved_tensors_hooks, found)
    try:
        while (hooks := compat.saved_tensors_hooks(True)) is not None and hooks[0] is not first:
            found.insert(0, hooks)
            compat.pop_saved_tensors_hooks()
    except BaseException:
        hooks = compat.saved_tensors_hooks(True)
        if found and hooks is not None and hooks[0] is found[0][0]:  # the exception came before it was popped
            del found[0]
        raise
    finally:
        [*push_all]  # noqa: B018  # without a call, after which a signal's exception could be raised
    return [pack for pack, _ in reversed(found)]
