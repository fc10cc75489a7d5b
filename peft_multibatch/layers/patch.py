"""A layer of the model in whose place a handler runs, and what the handler needs to know."""

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
    from peft_multibatch.layers.fusion import Group


class PatchedLayer:
    """A PEFT layer whose forward is a handler. A copy or a pickle of the layer has None here, and is plain PEFT.

    What its handler is depends on the layer's class alone, so that adapters come and go without a layer being patched
    anew, which calls under way would notice.

    Attributes:
        module: the layer.
        place: the module in whose place the handler runs: the layer, or the one that it stands for.
        inner: that module as it runs by itself, with all hooks; see ``plain.py``.
        name: its name in the model.
        handler: what runs in the place of its forward.
        reason: why that isn't the fast one, or the empty string.
        is_fast: whether it is.
        refusal: why adapters that have anything in the layer can't take part, or the empty string.
        router: tells which call is active.
        original: the layer's own ``forward``, bound.
        bank: the layer's bank, alone; None where it runs per segment.
        group: the projection group it belongs to and its slice in it; None where it runs by itself.
        outputs: the structure of what it returns, where that was seen to have rows of samples throughout.
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
        self._choose(handler, reason, refusal)
        attributes = self.place.__dict__
        for method in ("forward", "enable_adapters"):
            if is_handler(attributes.get(method)) and attributes.get(STATE) is None:
                del attributes[method]  # of a copy: what was put there belongs to the original
        attribute = own_attribute(self.place, "forward")
        self.original: Callable[..., Any] = getattr(self.place, attribute)
        attributes[STATE] = module.__dict__[STATE] = self
        self._forward = Replacement(self.place, attribute, self._bound(handler))
        self._enable = Replacement(module, "enable_adapters", types.MethodType(_enable_adapters, module))
        self._is_disabled_somewhere = False

    @property
    def is_disabled(self) -> bool:
        """Whether somebody disabled the layer's adapters on this thread or task, or on all of them."""
        return self.module._disable_adapters and (
            not self._is_disabled_somewhere or self.module in self.router.disabled.get()
        )

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether a tensor is the model's own, and so the same for all samples."""
        if isinstance(tensor, nn.Parameter):
            return True
        return any(tensor is each for buffers in self.router.buffers for each in buffers.values())

    def note(self, is_enabled: bool) -> None:
        """PEFT was asked to enable or disable the layer's adapters on this thread or task."""
        disabled = self.router.disabled.get()
        self._is_disabled_somewhere = not is_enabled
        if is_enabled != (self.module not in disabled):
            self.router.disabled.set(disabled - {self.module} if is_enabled else disabled | {self.module})

    def change(self, handler: Callable[..., Any], reason: str, refusal: str) -> None:
        """Let another handler run."""
        self._choose(handler, reason, refusal)
        self._forward.change(self._bound(handler))

    def _bound(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        return types.MethodType(handler if self.place is self.module else plain, self.place)

    def _choose(self, handler: Callable[..., Any], reason: str, refusal: str) -> None:
        self.handler, self.reason, self.refusal = handler, reason, refusal
        self.is_fast = getattr(handler, "is_fast", False)
        self.bank = Bank([self.module]) if self.is_fast else None
        self.group: tuple[Group, int] | None = None

    def remove(self) -> None:
        """Put the layer's own forward back."""
        self._forward.undo()
        self._enable.undo()
        self.place.__dict__.pop(STATE, None)

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


def handles(is_fast: bool = False) -> Callable[[Callable], Callable]:
    """Marks a function as a handler."""

    def mark(function: Any) -> Any:
        function.is_handler, function.is_fast = True, is_fast
        function.__name__ = "forward"  # bound methods are pickled by this name: unpickled, a layer has its class's
        return function

    return mark


@handles(is_fast=True)
def plain(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A module of the base model: what the handler of the layer that stands for it gives."""
    patch = self._multibatch
    if patch is None:
        return type(self).forward(self, x, *args, **kwargs)
    return patch.handler(patch.module, x, *args, **kwargs)


def is_handler(method: Any) -> bool:
    """Whether a bound method is a handler's."""
    return getattr(getattr(method, "__func__", None), "is_handler", False)


def is_replaced(layer: Any) -> bool:
    """Whether a module's forward is anything but its class's, a handler's, or that of a library which is known."""
    forward = layer.__dict__.get("forward")
    is_own = getattr(forward, "__func__", None) is type(layer).forward or is_handler(forward)
    is_known = shards.is_split_forward(forward) or "_hf_hook" in layer.__dict__
    return forward is not None and not is_own and not is_known


def _enable_adapters(self: Any, enabled: bool) -> None:
    """What ``disable_adapter()`` of PEFT calls: notes on which thread or task it does, because ids hold on others."""
    patch = self.__dict__.get(STATE)
    if patch is not None:
        patch.note(enabled)
    type(self).enable_adapters(self, enabled)


_enable_adapters.__name__ = "enable_adapters"  # by which bound methods are pickled
_enable_adapters.is_handler = True  # type: ignore[attr-defined]


def own_attribute(module: nn.Module, method: str) -> str:
    """Where the method is that calls arrive at behind accelerate's hooks, which move inputs and weights before."""
    # put in front of the hooks, ours would go with them when somebody removes them or adds others
    return "_old_forward" if method == "forward" and {"_hf_hook", "_old_forward"} <= module.__dict__.keys() else method


class Replacement:
    """A method in the place of another one, as an attribute of a module."""

    def __init__(self, module: nn.Module, attribute: str, method: Callable) -> None:
        self._module, self._attribute, self._method = module, attribute, method
        self._before = module.__dict__.get(attribute, _MISSING)
        module.__dict__[attribute] = method

    def change(self, method: Callable) -> None:
        """Put another method in its place; in between there is no moment without one."""
        for name in self._names():
            if self._module.__dict__.get(name) is self._method:
                self._module.__dict__[name] = method
        self._method = method

    def undo(self) -> None:
        """Put back what was there before, also where somebody else moved the method in the meantime."""
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
        # accelerate moves a forward to another name when it adds a hook, and back when it removes one
        moved = ("forward", "_old_forward")
        return moved if self._attribute in moved else (self._attribute,)


_MISSING: Any = object()


def check_merged(name: str, layer: Any) -> None:
    """Raise where a layer's adapters can't be told apart by rows.

    Raises:
        MergedAdaptersError: an adapter is merged into the base weights.
    """
    if layer.merged_adapters:
        raise MergedAdaptersError(
            f"adapter_ids was passed while {layer.merged_adapters} is merged into the base weights of {name}: "
            "expected unmerged adapters. Call model.unmerge_adapter() first."
        )


def check_not_capturing(device: torch.device) -> None:
    """Raise where code of ours that a replay wouldn't run is being captured.

    Raises:
        UnsupportedError: it is.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            "a CUDA graph is being captured of a layer that doesn't run on kernels alone, and which rows belong to "
            "which adapter would be part of it for good: expected float16, bfloat16 or float32, the backend triton, "
            "and no DoRA or layers that run per segment, see mb.report(). Run it without CUDA graphs."
        )
