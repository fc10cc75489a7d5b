"""Whose rows the layer gets that gives logits: a step hands it the last token of every request alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_multibatch.calls.call import Call
from peft_multibatch.calls.graphs import Graph


if TYPE_CHECKING:
    from peft_multibatch.calls.router import Router


class HeadRouter:
    """The router that this one layer asks: the same but for steps of continuous batching, which have a call for it.

    Args:
        router: of the model.
    """

    def __init__(self, router: Router) -> None:
        self._router = router

    def current(self, layer: Any) -> Call | Graph | None:
        """As ``Router.current``."""
        call = self._router.current(layer)
        return call.head or call if isinstance(call, Call) else call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._router, name)
