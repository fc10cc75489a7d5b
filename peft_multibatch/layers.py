"""How each PEFT layer class runs a mixed batch: one handler per class, found through the table at the end.

A handler is a function in the place of the layer's ``forward``. Without a call in force it does what PEFT does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from peft_multibatch import ops
from peft_multibatch.errors import ModelStateError, UnsupportedError
from peft_multibatch.routing import Call, Graph
from peft_multibatch.segments import BASE


if TYPE_CHECKING:
    from peft_multibatch.bank import Bank
    from peft_multibatch.fusion import Group
    from peft_multibatch.routing import Router

STATE = "_multibatch"
"""Attribute of a patched module that holds its ``Patch``."""


class Patch:
    """What a patched layer needs to know. A copy or a pickle of the layer has None in its place, and is plain PEFT.

    Attributes:
        router: tells which call is in force.
        original: the layer's own ``forward``, bound.
        banks: the layer's bank, alone.
        group: the projection group it belongs to, or None where it runs by itself.
        index: its slice in the group.
        names: adapter names by slot.
    """

    def __init__(self, router: Router, original: Callable[..., Tensor], names: list[str | None]) -> None:
        self.router = router
        self.original = original
        self.names = names
        self.bank: Bank | None = None
        self.group: Group | None = None
        self.index = 0

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


def linear(self: LoraLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``lora.Linear``: the base layer's output plus every row's own delta; siblings that read the same run as one."""
    patch = getattr(self, STATE)
    if patch is None:
        return type(self).forward(self, x, *args, **kwargs)
    call = patch.router.current()
    if call is None:
        return patch.original(x, *args, **kwargs)
    if isinstance(call, Call) and self.training and _uses_dropout(self):
        return per_segment(self, x, *args, **kwargs)

    group = patch.group
    if group is None or args or kwargs:
        y = self.base_layer(x, *args, **kwargs)
        return _add_deltas(call, patch.bank, [y], x)[0]
    if patch.index == 0:
        ys = _add_deltas(call, group.bank, [layer.base_layer(x) for layer in group.layers], x)
        call.stash[group.key] = x, [None, *ys[1:]]
        return ys[0]
    source, waiting = call.stash.get(group.key, (None, []))
    if source is x and waiting[patch.index] is not None:
        y = waiting[patch.index]
        waiting[patch.index] = None
        if all(other is None for other in waiting):
            del call.stash[group.key]
        return y
    if isinstance(call, Call) and source is not None and source is not x:
        group.split("its projections read different tensors")
    return _add_deltas(call, patch.bank, [self.base_layer(x)], x)[0]


def _uses_dropout(layer: LoraLayer) -> bool:
    return any(not isinstance(dropout, nn.Identity) and dropout.p > 0 for dropout in layer.lora_dropout.values())


def _add_deltas(call: Call | Graph, bank: Bank, ys: Sequence[Tensor], x: Tensor) -> Sequence[Tensor]:
    """Add to each slice's output ``[..., N]`` the deltas of ``x`` ``[..., K]``, row by row."""
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(call, Graph):
        lora_a, lora_b = bank.lora_a, bank.lora_b
        inputs = call.buffer.packed, lora_a, lora_b, bank.ranks, bank.scalings
        return _add_through_ops(inputs, bank, ys, rows)
    call.segments.rows(len(x), x.device)  # dimension 0 has to map to samples, not just all rows together
    weights, trained = call.weights(bank)
    if not weights:
        return ys
    with torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else nullcontext():
        if torch.is_grad_enabled() and (trained or x.requires_grad or any(y.requires_grad for y in ys)):
            return _add_through_ops(call.op_inputs(bank), bank, ys, rows)
        ys = [y if y.is_contiguous() else y.contiguous() for y in ys]
        ops.torch_backend.apply_([y.view(-1, y.shape[-1]) for y in ys], rows, call.segments, weights)
    return ys


def _add_through_ops(inputs: tuple, bank: Bank, ys: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    plan, lora_a, lora_b, ranks, scalings = inputs
    h = ops.shrink(rows, lora_a, plan, ranks)
    delta = ops.expand(h, lora_b, plan, ranks, scalings, bank.slice_offsets)
    parts = delta.split([y.shape[-1] for y in ys], dim=-1)
    return [(y + part.view(y.shape)).to(y.dtype) for y, part in zip(ys, parts)]


def per_segment(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Any other layer: PEFT's own module, once per segment on its rows, with its adapter as the active one."""
    patch = getattr(self, STATE)
    if patch is None:
        return type(self).forward(self, x, *args, **kwargs)
    call = patch.router.current()
    if call is None:
        return patch.original(x, *args, **kwargs)
    if isinstance(call, Graph):
        raise UnsupportedError(
            f"{type(self).__name__} runs PEFT's own code per segment, and the segments of a batch aren't known while "
            "a graph is compiled: expected a model all of whose adapters run segmented, see mb.report(). Run it "
            "without torch.compile."
        )
    if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
        raise UnsupportedError(
            f"{type(self).__name__} was called with more than one tensor, and only the first can be split by samples: "
            "expected a layer with one input. Remove the adapters from this layer, or run them one at a time."
        )
    outputs, order = [], []
    for slot, rows in call.segments.rows(len(x), x.device):
        view = single_adapter_view(self, None if slot == BASE else patch.names[slot])
        outputs.append(type(self).forward(view, x[rows], *args, **kwargs))
        order.append(rows)
    result = torch.cat(outputs)
    if call.segments.permutation is None:
        return result
    return result[torch.cat(order).argsort()]


def single_adapter_view(layer: nn.Module, name: str | None) -> Any:
    """The same layer, its modules and parameters shared, with one adapter active, or with none.

    The layer's own attributes stay untouched, because other threads may be using them.
    """
    if any(parameter.is_meta for parameter in layer.parameters()):
        raise ModelStateError(
            f"parameters of a {type(layer).__name__} are on the meta device, as offloading leaves them between calls: "
            "expected them on a real device. Load the model without offloading."
        )
    view: Any = copy.copy(layer)
    view._disable_adapters = name is None
    view._active_adapter = [name] if name is not None else []
    return view


for _handler in (linear, per_segment):
    _handler.__name__ = "forward"  # bound methods are pickled by this name: unpickled, a layer has its class's forward

PER_SEGMENT = "per segment"
SEGMENTED = "segmented"

# The first match in a layer class's method resolution order counts. None: rows routed through it would not be right.
HANDLERS: dict[type, Callable[..., Tensor] | None] = {
    lora.Linear: linear,
    lora.MultiheadAttention: None,  # merges weights into the module while it runs; rows may be dimension 1
    lora.ParamWrapper: None,  # swaps parameters of experts, whose rows are gathered from all samples
    LoraLayer: per_segment,
    ModulesToSaveWrapper: per_segment,
    AuxiliaryTrainingWrapper: None,
    BaseTunerLayer: None,  # another tuner than LoRA
}

# Variants whose forward depends on more than the rows and the adapter: positions in the sequence, other adapters.
CONTEXT_VARIANTS = ("ALora", "Arrow")


def find_handler(name: str, layer: nn.Module) -> tuple[Callable[..., Tensor], str]:
    """The handler of a layer and, where it is not the fast one, the reason.

    Args:
        name: the layer's name in the model, for messages.
        layer: a PEFT layer.

    Raises:
        UnsupportedError: a row of a mixed batch would not be right in this layer.
    """
    kind = type(layer).__name__
    handler = next((HANDLERS[cls] for cls in type(layer).__mro__ if cls in HANDLERS), None)
    advice = "Remove the adapters from it, or run the adapters one at a time without adapter_ids."
    if handler is None:
        raise UnsupportedError(
            f"{name} is a {type(layer).__module__}.{kind}: expected LoRA layers that see the rows of each sample "
            f"together. {advice}"
        )
    if "experts" in name.split("."):
        raise UnsupportedError(
            f"{name} is inside a mixture of experts and sees rows gathered from all samples: expected a layer that "
            f"sees the rows of each sample together. {advice}"
        )
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    if getattr(base, "_hf_device_mesh", None) is not None:
        raise UnsupportedError(f"{name} is split over devices by tensor parallelism, which is not supported. {advice}")
    if not isinstance(layer, LoraLayer):
        return handler, f"{kind} runs PEFT's own code"
    variants = {type(variant).__name__ for variant in layer.lora_variant.values()}
    for variant in variants:
        if variant.startswith(CONTEXT_VARIANTS):
            raise UnsupportedError(f"{name} has an adapter of the variant {variant}, which is not supported. {advice}")
    if handler is not linear:
        return handler, f"{kind} runs PEFT's own code"
    if type(layer) is not lora.Linear:
        return per_segment, f"{kind} is a subclass of lora.Linear with code of its own"
    if variants:
        return per_segment, f"an adapter is of the variant {', '.join(sorted(variants))}"
    if any(layer.lora_bias.values()):
        return per_segment, "an adapter has a bias (lora_bias)"
    return linear, ""
