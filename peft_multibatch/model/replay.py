"""Layers that ``backward`` runs once more, under the ids under which they ran first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft_multibatch.calls.router import Router
from peft_multibatch.errors import NotEnabledError


CHECKPOINT = "_gradient_checkpointing_func"
"""Attribute with which transformers' layers run themselves so that ``backward`` runs them once more."""


class WithIds:
    """A checkpointing function that runs layers again under the ids under which they ran first.

    ``backward`` comes after the call, when its ids are no longer in force, and on a GPU in a thread of its own.

    Args:
        router: holds the ids.
        original: transformers' own checkpointing function.
    """

    def __init__(self, router: Router, original: Callable[..., Any]) -> None:
        self.router = router
        self.original = original

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self.router.call.get()
        if call is None:
            return self.original(function, *args, **kwargs)

        def again(*args: Any, **kwargs: Any) -> Any:
            if not self.router.is_enabled:
                raise NotEnabledError(
                    "backward runs layers again under ids, and disable was called in the meantime: expected the model "
                    "to stay enabled until then. Call backward first."
                )
            token = self.router.call.set(call.again())
            try:
                return function(*args, **kwargs)
            finally:
                self.router.call.reset(token)

        return self.original(again, *args, **kwargs)

    def __reduce__(self) -> tuple:  # a copy or a pickle of the model has what was there before
        return _same, (self.original,)


def _same(value: Any) -> Any:
    return value
