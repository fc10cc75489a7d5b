"""Layers that ``backward`` runs once more, under the ids under which they ran first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft_multibatch.calls.router import Router


CHECKPOINT = "_gradient_checkpointing_func"
"""Attribute with which transformers' layers run themselves so that ``backward`` runs them once more."""


class WithIds:
    """A checkpointing function that runs layers again under the ids under which they ran first.

    ``backward`` comes after the call, when its ids are no longer active, and on a GPU in a thread of its own.

    Args:
        router: holds the ids.
        original: transformers' own checkpointing function.
    """

    def __init__(self, router: Router, original: Callable[..., Any]) -> None:
        self.router = router
        self.original = original

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self.router.active()
        if call is None:
            return self.original(function, *args, **kwargs)

        def again(*args: Any, **kwargs: Any) -> Any:
            with self.router.routing(call.again):
                return function(*args, **kwargs)

        return self.original(again, *args, **kwargs)

    def __reduce__(self) -> tuple:  # a copy or a pickle of the model has what was there before
        return _same, (self.original,)


def _same(value: Any) -> Any:
    return value
