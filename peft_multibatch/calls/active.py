"""A ``with`` block in which the ids of a call are active, and the promise that they never outlive it.

A signal handler such as Ctrl-C's may raise nearly anywhere: before the first instruction of an ``__exit__``, or in a
generator that nobody will ever resume. So ids aren't active until somebody says otherwise; they are active while a
certain object lives, which nothing holds but the ``with`` statement itself. Python fetches ``__exit__`` before it
enters a block, keeps it on the stack of the frame, and drops it when the block is left, however that happens. What it
fetches here is made for this one block, and its end is the end of the ids. No frame that a traceback keeps holds it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import ContextDecorator
from contextvars import ContextVar, Token
from typing import Any

from peft_multibatch.calls.call import Call, over
from peft_multibatch.calls.graphs import Graph
from peft_multibatch.errors import ModelStateError


class _Exit:
    """``__exit__`` as a ``with`` statement fetches it: an object for this block alone, whose life is the block's."""

    def __get__(self, block: ActiveCall | None, owner: type) -> Callable[..., None]:
        if block is None:  # what contextlib.ExitStack asks for
            return _leave_by_hand
        if block._by_hand is not None:
            return functools.partial(_leave_by_hand, block)
        end = functools.partial(_leave, block)
        block._end = weakref.ref(end)
        return end


class ActiveCall(ContextDecorator):
    """Makes ids active for this thread or task; what was active before is so again afterwards.

    Args:
        begin: makes the call, or raises where it can't run. Called when the block is entered.
        call: the call that began last, on each thread and task.
        live: gives the one that is active.
        graph: what compiled code sees.

    Raises:
        ModelStateError: the block is left on another thread or task than it was entered on, or before a block that was
            entered later.
    """

    def __init__(
        self,
        begin: Callable[[], Call],
        call: ContextVar[Call | None],
        live: Callable[[], Call | None],
        graph: Graph,
    ) -> None:
        self._begin, self._calls, self._live, self._graph = begin, call, live, graph
        self._call: Call | None = None
        self._token: Token | None = None
        self._end: Callable[[], Any] | None = None
        self._by_hand: Any = None  # the end, where no ``with`` statement holds it

    def _recreate_cm(self) -> ActiveCall:  # for every call of a function that it decorates
        return ActiveCall(self._begin, self._calls, self._live, self._graph)

    def __enter__(self) -> Call:
        call = self._begin()
        end = self._end() if self._end is not None else None
        if end is None:
            end = self._by_hand = functools.partial(_leave, self)
        call.end = weakref.ref(end, self._graph.drop_ended)
        end = None  # a frame that a traceback keeps must not keep the ids
        call.outer = self._live()
        self._call = call
        self._token = self._calls.set(call)
        self._graph.enter(call)
        return call

    __exit__: Any = _Exit()


def _leave(block: ActiveCall, *error: Any) -> None:
    call = block._call
    if call is None or block._token is None:  # it was never entered
        return
    try:
        if block._live() is not call:
            raise ValueError  # ids that became active later still are, and stay so
        block._calls.reset(block._token)
    except ValueError:
        call.ended = True
        block._graph.leave(call)
        raise ModelStateError(
            "ids were put in force on one thread or task and taken back on another, so that calls in between may have "
            "run without them, or taken back before ids that came later: expected both on the same one, the last ids "
            "first. A generator that holds mb.batch() open must not be passed between threads, nor end inside a block "
            "that began after it; pass adapter_ids to each call instead."
        ) from None
    outer = block._calls.get()
    if outer is not None and outer.ended and (outer.thread, outer.task) == (call.thread, call.task):
        while outer is not None and outer.ended:  # it was left before this one, and told so
            outer = outer.outer
        block._calls.set(outer)
    call.ended = True  # and where an exception comes before this, the call is over because its end is gone
    block._graph.leave(call)
    call.end = over  # and nobody needs to hear of the end any more


def _leave_by_hand(block: ActiveCall, *error: Any) -> None:
    try:
        block._by_hand(*error)
    finally:
        block._by_hand = None
