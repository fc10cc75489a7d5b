"""The ids of layers that ``backward`` runs again, as gradient checkpointing does.

``backward`` runs after the call, when its ids aren't active any more, on a GPU in a separate thread, and possibly
while other ids are active. The second run is recognized by an object that it shares with the first one. There are two
kinds, which may be nested:

- An ``autograd.Function`` that runs layers in its ``forward``, as reentrant checkpoints and reversible layers do. Its
  ``ctx`` is an argument on the stack in the first run, and the node that autograd runs in the second.
- A non-reentrant checkpoint of torch. Its frame is part of the saved-tensors hooks in the first run, and has the
  function for the second run as an attribute.

Anything else that runs layers in ``backward`` is an error, unless no call with ids has ever trained.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import Function

from peft_multibatch import compat
from peft_multibatch.calls.origin import Origin, checkpoint_frame, checkpoint_frames
from peft_multibatch.errors import ModelStateError, NotEnabledError
from peft_multibatch.ops.again import check_not_run_again, functions, in_function


if TYPE_CHECKING:
    from peft_multibatch.calls.active import ActiveCall
    from peft_multibatch.calls.call import Call


class Replays:
    """The ids for everything that ``backward`` may run again, for one enabled model.

    Args:
        routing: returns a block in which a call is active.
    """

    def __init__(self, routing: Callable[[Callable[[], Call]], ActiveCall]) -> None:
        self._routing = routing
        self._calls: weakref.WeakKeyDictionary[Any, Call] = weakref.WeakKeyDictionary()
        self._running: weakref.WeakKeyDictionary[Any, tuple[int, Call]] = weakref.WeakKeyDictionary()
        self._have_trained = False

    def note(self, call: Call, origin: Origin) -> None:
        """Record the call of a layer or a model that is about to run, in case ``backward`` runs it again.

        Args:
            call: the call.
            origin: where the call began.
        """
        is_function = in_function()
        self._have_trained = self._have_trained or is_function or origin.trains or torch.is_grad_enabled()
        self._note_frames(call, origin)
        if is_function:
            outer = origin.function()
            for function in functions():
                if function is outer or function in self._calls:
                    break
                self._keep(function, call)

    def note_compiled(self, call: Call, trains: bool) -> None:
        """The same in compiled code.

        Args:
            call: the call.
            trains: whether the code was compiled with gradients.

        Raises:
            UnsupportedError: a reentrant checkpoint runs it, and the second run wouldn't look up its ids.
        """
        if trains:
            self._note_frames(call, call.origin)
        else:
            check_not_run_again()

    def _note_frames(self, call: Call, origin: Origin) -> None:
        hooks = compat.saved_tensors_hooks(True)
        if hooks is not None and hooks[0] is not origin.hooks and checkpoint_frame() not in self._calls:
            for frame in checkpoint_frames(origin.hooks):
                if frame not in self._calls:
                    frame.recompute_fn = _WithIds(self._routing, self._keep(frame, call), frame.recompute_fn)

    def _keep(self, key: Any, call: Call) -> Call:
        again = self._calls[key] = call.again()  # a separate copy, which must not reference the key
        again.origin = Origin()
        return again

    def call(self, layer: Any) -> Call | None:
        """The call for a layer or model that ``backward`` runs again; None if it ran without ids the first time.

        Args:
            layer: the ``PatchedLayer``; None for a model.

        Raises:
            ModelStateError: the ids of the first run are unknown.
        """
        node = compat.current_node()
        call = self._call_of(node) if isinstance(node, compat.FunctionNode) else None
        if call is not None or not self._have_trained or _is_known(node):
            return call
        name = "the model" if layer is None else layer.name
        raise ModelStateError(
            f"backward ran {name} again, and the adapter_ids of its first run are unknown: expected a checkpoint of "
            "torch.utils.checkpoint, or an autograd.Function with forward(ctx, ...). Use one of these, or open "
            "mb.batch(...) inside the function that is run again, with ids of -1 for the base model."
        )

    def _call_of(self, node: Any) -> Call | None:
        """The call of a function that is run again, restored to its first state in every backward pass."""
        noted, backward = self._calls.get(node), compat.current_backward()
        if noted is None:
            return None
        last, call = self._running.get(node, (None, noted))
        if last != backward:
            call = noted.again()
            call.origin = Origin()
            self._running[node] = backward, call
        return call

    def end(self) -> None:
        """Refuse to run recorded functions again, because the model is being disabled."""
        for each in list(self._calls):
            if isinstance(each, compat.FunctionNode):
                each.register_prehook(_refuse)
            else:
                each.recompute_fn = _refuse


class _WithIds:
    """A function that runs inside a call."""

    def __init__(self, routing: Callable[[Callable[[], Call]], ActiveCall], call: Call, function: Callable) -> None:
        self.routing, self.call, self.function = routing, call, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.routing(self.call.again):
            return self.function(*args, **kwargs)


def _refuse(*args: Any) -> None:
    raise NotEnabledError(
        "backward runs layers with adapter_ids again, and disable was called in the meantime: expected the model to "
        "stay enabled. Call backward first."
    )


def _is_known(node: Any) -> bool:
    """Whether the function or checkpoint that runs layers in ``backward`` is of a kind that ``note`` records."""
    hooks = compat.saved_tensors_hooks(True)
    if hooks is not None:  # non-reentrant checkpoints collect the tensors that are saved again
        return getattr(hooks[0], "__module__", "") == compat.CheckpointFrame.__module__
    return isinstance(node, compat.FunctionNode) and type(node)._forward_cls.setup_context is Function.setup_context
