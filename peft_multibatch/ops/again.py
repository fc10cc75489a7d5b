"""Detects code inside the ``forward`` of an ``autograd.Function``, which ``backward`` may run again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from peft_multibatch import compat
from peft_multibatch.errors import UnsupportedError


def in_function() -> bool:
    """Whether this code runs inside the ``forward`` of an ``autograd.Function``, as opposed to ``torch.no_grad``."""
    return not compat.is_forward_mode_enabled() and not torch.is_inference_mode_enabled()


def functions() -> Iterator[Any]:
    """The ``ctx`` of all functions whose ``forward`` is running, the innermost first."""
    found: Any = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames:  # not of other frames, because f_locals keeps locals alive
            first = frame.f_locals.get(code.co_varnames[0])
            if not code.co_argcount and isinstance(first, tuple) and first:  # a decorator's *args
                first = first[0]
            if isinstance(first, compat.FunctionNode) and first is not found:
                found = first
                yield first
        frame = frame.f_back


def check_not_run_again() -> None:
    """Check that compiled code doesn't run inside a function that ``backward`` may run again.

    Compiled training itself is a function of torch, which ``backward`` doesn't run again.

    Raises:
        UnsupportedError: it does, and the second run wouldn't look up its ids.
    """
    if in_function() and not all(map(_is_compiled, functions())):
        raise UnsupportedError(
            "compiled code was called with ids inside a reentrant checkpoint or another autograd.Function, and "
            "backward would run it again without them: expected a non-reentrant checkpoint. Pass "
            "use_reentrant=False, or checkpoint inside the compiled code."
        )


def _is_compiled(function: Any) -> bool:
    return type(function)._forward_cls.__module__.startswith("torch._functorch.")
