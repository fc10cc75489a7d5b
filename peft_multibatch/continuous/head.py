"""Route the LM head, which gets only the last token of every request in a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_multibatch.calls.call import Call
from peft_multibatch.calls.graphs import Graph


if TYPE_CHECKING:
    from peft_multibatch.calls.router import Router


class HeadRouter:
    """The LM head's router, which returns a separate call for it during steps of continuous batching.

    Args:
        router: the model's router.
    """

    def __init__(self, router: Router) -> None:
        self._router = router

    def current(self, layer: Any) -> Call | Graph | None:
        """As ``Router.current``."""
        call = self._router.current(layer)
        return call.head or call if isinstance(call, Call) else call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._router, name)
