"""The ``with`` block in which a call is active, which ends reliably even if ``__exit__`` never runs.

A signal handler such as Ctrl-C's may raise nearly anywhere: before the first instruction of an ``__exit__``, or in a
generator that is never resumed. So a call isn't active until it is told to end, but as long as an object lives that
only the ``with`` statement references. Python fetches ``__exit__`` before it enters a block, keeps it on the stack of
the frame, and drops it when the block is left, however that happens. Here, ``__exit__`` is an object made for one
block, and the call ends when that object is freed. Frames that a traceback keeps don't reference it.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator
from contextvars import ContextVar, Token
from types import FrameType
from typing import Any

from peft_multibatch.calls.call import Call, over
from peft_multibatch.calls.graphs import Graph
from peft_multibatch.errors import ModelStateError


class _Exit:
    """``__exit__`` as a ``with`` statement fetches it: an object that lives exactly as long as the block."""

    def __get__(self, block: ActiveCall | None, owner: type) -> Callable[..., None]:
        if block is None:  # contextlib.ExitStack reads it from the class
            return _leave_by_hand
        if block._by_hand is not None:
            return functools.partial(_leave_by_hand, block)
        end = functools.partial(_leave, block)
        block._end = weakref.ref(end)
        return end


class ActiveCall(ContextDecorator):
    """Makes a call active on this thread or task, and restores the previous one afterwards.

    Args:
        begin: makes the call, or raises if it can't run. Called when the block is entered.
        call: the call that began last on each thread and task.
        live: returns the active one.
        graph: the state that compiled code reads.

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
        self._by_hand: Any = None  # the exit object, if __enter__ was called without a ``with`` statement

    def _recreate_cm(self) -> ActiveCall:  # called by ContextDecorator for every call of the function
        return ActiveCall(self._begin, self._calls, self._live, self._graph)

    def __enter__(self) -> Call:
        call = self._begin()
        end = self._end() if self._end is not None else None
        if end is None:
            end = self._by_hand = functools.partial(_leave, self)
        else:
            call.frame = id(sys._getframe(1))  # a reference would keep the call active
        call.end = weakref.ref(end, self._graph.drop_ended)
        end = None  # a traceback that keeps this frame must not keep the call active
        call.outer = self._live()
        if call.outer is not None:
            call.suspended = {*_frames_around(call)} - {*map(id, _stack(sys._getframe(1)))}
        self._call = call
        self._token = self._calls.set(call)
        try:
            self._graph.enter(call)
        except BaseException:  # a call that was refused must not stay active, or keep its adapters in memory
            self._calls.reset(self._token)
            self._call = self._token = self._by_hand = None
            call.ended = True
            self._graph.leave(call)
            raise
        return call

    __exit__: Any = _Exit()


def check_running(call: Call) -> None:
    """Check that no generator runs whose own block is open around a call that began while it was suspended.

    Raises:
        ModelStateError: one runs, with the ids of a block that isn't its own.
    """
    # without those that have ended, because another frame may have the memory of theirs, and thus its id
    suspended = call.suspended.intersection(_frames_around(call))
    if suspended and not suspended.isdisjoint(map(id, _stack(sys._getframe(1)))):
        raise ModelStateError(
            "a generator with an open mb.batch block called the model while a block that began after it, in another "
            "generator, was still open, so the call would have used the other's ids: expected one generator with an "
            "open block at a time on a thread or task. Pass adapter_ids to each call instead."
        )


def _frames_around(call: Call) -> Iterator[int]:
    outer = call.outer
    while outer is not None:
        if outer.frame and outer.is_active:
            yield outer.frame
        outer = outer.outer


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _leave(block: ActiveCall, *error: Any) -> None:
    call = block._call
    if call is None or block._token is None:  # it was never entered
        return
    try:
        if block._live() is not call:
            raise ValueError  # a block that was entered later is still open, and stays so
        block._calls.reset(block._token)
    except ValueError:
        call.ended = True
        block._graph.leave(call)
        if any(isinstance(each, Exception) for each in error):  # says more than this one would
            return
        raise ModelStateError(
            "an mb.batch block was left on another thread or task than it was entered on, so calls in between may "
            "have run without its ids, or was left before a block that was entered later: expected nested blocks on "
            "one thread or task. Don't pass a generator that holds mb.batch open between threads, or end it inside a "
            "block that began after it; pass adapter_ids to each call instead."
        ) from None
    outer = block._calls.get()
    if outer is not None and outer.ended and (outer.thread, outer.task) == (call.thread, call.task):
        while outer is not None and outer.ended:  # it was left before this one, which raised the error above
            outer = outer.outer
        block._calls.set(outer)
    call.ended = True  # if an exception prevents this, the call ends when its exit object is freed
    block._graph.leave(call)
    call.end = over  # the graph doesn't have to be notified any more


def _leave_by_hand(block: ActiveCall, *error: Any) -> None:
    try:
        block._by_hand(*error)
    finally:
        block._by_hand = None
