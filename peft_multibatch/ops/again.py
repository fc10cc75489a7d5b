"""Code that ``backward`` may run again: what runs inside of the ``forward`` of an ``autograd.Function``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from peft_multibatch import compat
from peft_multibatch.errors import UnsupportedError


def in_function() -> bool:
    """Whether an ``autograd.Function`` runs its ``forward``, which ``torch.no_grad`` alone doesn't look like."""
    return not compat.is_forward_mode_enabled() and not torch.is_inference_mode_enabled()


def functions() -> Iterator[Any]:
    """The ``ctx`` of all functions whose ``forward`` is under way, the innermost first."""
    found: Any = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames:  # of no other: to read locals keeps them alive
            first = frame.f_locals.get(code.co_varnames[0])
            if not code.co_argcount and isinstance(first, tuple) and first:  # of a decorator: *args
                first = first[0]
            if isinstance(first, compat.FunctionNode) and first is not found:
                found = first
                yield first
        frame = frame.f_back


def check_not_run_again() -> None:
    """Raise where compiled code runs without gradients inside of a function that ``backward`` may run again.

    Compiled training is such a function itself, of torch's own, and ``backward`` doesn't run it again.

    Raises:
        UnsupportedError: it does. Nothing would ask for ids the second time.
    """
    if in_function() and not all(map(_is_compiled, functions())):
        raise UnsupportedError(
            "compiled code was called with ids inside of a reentrant checkpoint, or another autograd.Function, "
            "and backward would run it again without them: expected a checkpoint that isn't reentrant. Pass "
            "use_reentrant=False, or checkpoint inside of what is compiled."
        )


def _is_compiled(function: Any) -> bool:
    return type(function)._forward_cls.__module__.startswith("torch._functorch.")
