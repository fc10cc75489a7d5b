"""Replacing a layer's ``forward`` with a handler, and the state that the handler needs."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_multibatch.adapters import shards
from peft_multibatch.adapters.bank import Bank
from peft_multibatch.adapters.views import STATE
from peft_multibatch.errors import MergedAdaptersError, UnsupportedError


if TYPE_CHECKING:
    from peft_multibatch.calls.router import Router
    from peft_multibatch.calls.threads import ThreadState
    from peft_multibatch.layers.fusion import Group


class PatchedLayer:
    """A PEFT layer whose forward is a handler. Copies and pickles of the layer have None instead, and are plain PEFT.

    The handler doesn't depend on the adapters, so adding or deleting them doesn't replace it while calls are running.

    Attributes:
        module: the layer.
        place: the module whose forward is replaced: the layer, or the base module that it represents.
        inner: that module without the handler, with all hooks; see ``plain.py``.
        name: its name in the model.
        handler: the function that replaces its forward.
        reason: why this isn't the fast handler, or the empty string.
        is_fast: whether it is the fast handler.
        refusal: why adapters on this layer can't run in mixed batches, or the empty string.
        router: finds the active call.
        original: the layer's own ``forward``, bound.
        bank: the layer's own bank; None if it runs per segment.
        group: its projection group and its slice in it; None if it runs by itself.
        outputs: the structure of its outputs, once all of them were seen to have rows of samples.
        encoder: the ``MediaEncoder`` that it belongs to, if the model calls it outside of a method that encodes media.
    """

    def __init__(
        self,
        router: Router,
        module: Any,
        name: str,
        handler: Callable[..., Any],
        reason: str,
        refusal: str,
        place: Any = None,
        inner: Any = None,
    ) -> None:
        self.module, self.name, self.router = module, name, router
        self.place, self.inner = module if place is None else place, inner
        self.outputs: Any = None
        self.encoder: Any = None
        self._choose(handler, reason, refusal)
        attributes = self.place.__dict__
        for method in ("forward", "enable_adapters"):
            if is_handler(attributes.get(method)) and attributes.get(STATE) is None:
                del attributes[method]  # this is a copy, and the method is bound to the original
        attribute = own_attribute(self.place, "forward")
        self.original: Callable[..., Any] = getattr(self.place, attribute)
        attributes[STATE] = module.__dict__[STATE] = self
        self._forward = Replacement(self.place, attribute, self._bound(handler))
        self._enable = Replacement(module, "enable_adapters", types.MethodType(_enable_adapters, module))
        # whether threads that disable adapters are known; never reset, because others read PEFT's flag first
        self._knows_threads = False

    @property
    def is_disabled(self) -> bool:
        """Whether the layer's adapters are disabled on this thread or task, or on all of them."""
        return self.module._disable_adapters and (not self._knows_threads or self.module in self.router.disabled.get())

    def is_disabled_on(self, thread: ThreadState) -> bool:
        """As ``is_disabled``, if PEFT's flag is set, for compiled code, which can't read context variables."""
        return not self._knows_threads or thread.has_disabled

    @property
    def is_in_place(self) -> bool:
        """Whether calling its place runs its handler, without a library's hook or another replacement around it."""
        return self._forward.holds("forward")

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or buffer of the model, and so the same for all samples."""
        if isinstance(tensor, nn.Parameter):
            return True
        return any(tensor is each for buffers in self.router.buffers for each in buffers.values())

    def note(self, is_enabled: bool) -> None:
        """Record that PEFT enables or disables the layer's adapters on this thread or task."""
        disabled = self.router.disabled.get()
        self._knows_threads = self._knows_threads or not is_enabled
        if is_enabled != (self.module not in disabled):
            disabled = disabled - {self.module} if is_enabled else disabled | {self.module}
            self.router.disabled.set(disabled)
            self.router.graph.here.thread.has_disabled = bool(disabled)

    def change(self, handler: Callable[..., Any], reason: str, refusal: str) -> None:
        """Switch to another handler."""
        self._choose(handler, reason, refusal)
        self._forward.change(self._bound(handler))

    def _bound(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        return types.MethodType(handler if self.place is self.module else plain, self.place)

    def _choose(self, handler: Callable[..., Any], reason: str, refusal: str) -> None:
        self.handler, self.reason, self.refusal = handler, reason, refusal
        self.is_fast = getattr(handler, "is_fast", False)
        self.bank = Bank([self.module], self.router.registry.tables) if self.is_fast else None
        self.group: tuple[Group, int] | None = None

    def remove(self) -> None:
        """Restore the layer's own forward."""
        self._forward.undo()
        self._enable.undo()
        self.place.__dict__.pop(STATE, None)

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


def handles(is_fast: bool = False) -> Callable[[Callable], Callable]:
    """Mark a function as a handler."""

    def mark(function: Any) -> Any:
        function.is_handler, function.is_fast = True, is_fast
        function.__name__ = "forward"  # bound methods are pickled by name, so an unpickled layer gets its class's
        return function

    return mark


@handles(is_fast=True)
def plain(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Handler for a module of the base model: calls the handler of the layer that represents it."""
    patch = self._multibatch
    if patch is None:
        return type(self).forward(self, x, *args, **kwargs)
    return patch.handler(patch.module, x, *args, **kwargs)


def is_handler(method: Any) -> bool:
    """Whether a bound method is a handler."""
    return getattr(getattr(method, "__func__", None), "is_handler", False)


def is_replaced(layer: Any) -> bool:
    """Whether a module's forward was replaced, other than by a handler or a library that is supported."""
    forward = layer.__dict__.get("forward")
    is_own = getattr(forward, "__func__", None) is type(layer).forward or is_handler(forward)
    is_known = shards.is_split_forward(forward) or "_hf_hook" in layer.__dict__
    return forward is not None and not is_own and not is_known


def _enable_adapters(self: Any, enabled: bool) -> None:
    """Called by ``disable_adapter()``: records on which thread or task, because batches on others aren't affected."""
    patch = self.__dict__.get(STATE)
    if patch is not None:
        patch.note(enabled)
    type(self).enable_adapters(self, enabled)


_enable_adapters.__name__ = "enable_adapters"  # bound methods are pickled by name
_enable_adapters.is_handler = True  # type: ignore[attr-defined]


def own_attribute(module: nn.Module, method: str) -> str:
    """The attribute with the method that accelerate's hooks call, after moving inputs and weights."""
    # replacing the hooked method instead would lose the replacement when hooks are added or removed
    return "_old_forward" if method == "forward" and {"_hf_hook", "_old_forward"} <= module.__dict__.keys() else method


class Replacement:
    """A method of a module replaced by another one."""

    def __init__(self, module: nn.Module, attribute: str, method: Callable) -> None:
        self._module, self._attribute, self._method = module, attribute, method
        self._before = module.__dict__.get(attribute, _MISSING)
        module.__dict__[attribute] = method

    def change(self, method: Callable) -> None:
        """Replace the method again, without restoring the original in between."""
        for name in self._names():
            if self.holds(name):
                self._module.__dict__[name] = method
        self._method = method

    def holds(self, attribute: str) -> bool:
        """Whether an attribute of the module is the replacement."""
        return self._module.__dict__.get(attribute) is self._method

    def undo(self) -> None:
        """Restore the original, even if the replacement was moved to another attribute in the meantime."""
        attributes = self._module.__dict__
        for name in self._names():
            if attributes.get(name) is not self._method:
                continue
            if self._before is not _MISSING:
                attributes[name] = self._before
            elif name == self._attribute:
                del attributes[name]
            else:
                attributes[name] = types.MethodType(getattr(type(self._module), self._attribute), self._module)

    def _names(self) -> tuple[str, ...]:
        # accelerate renames forward when it adds a hook, and back when it removes one
        moved = ("forward", "_old_forward")
        return moved if self._attribute in moved else (self._attribute,)


_MISSING: Any = object()


def check_merged(name: str, layer: Any) -> None:
    """Check that no adapter is merged into a layer's base weights.

    Raises:
        MergedAdaptersError: one is.
    """
    if layer.merged_adapters:
        raise MergedAdaptersError(
            f"adapter_ids was passed while {layer.merged_adapters} is merged into the base weights of {name}: "
            "expected unmerged adapters. Call model.unmerge_adapter() first."
        )


def check_not_capturing(device: torch.device) -> None:
    """Check that no CUDA graph is being captured, where replaying it would repeat this batch's routing.

    Raises:
        UnsupportedError: one is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            "a CUDA graph is being captured of a layer that needs more than the Triton kernels, and its replays would "
            "use the adapters of this batch: expected float16, bfloat16 or float32, the triton backend, and no DoRA "
            "or layers that run per segment (see mb.report()). Run it without CUDA graphs."
        )
