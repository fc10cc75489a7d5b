"""Training: the deltas of a projection group as a single autograd node, whichever adapters are in use.

Forward saves ``x``, which the base layers save as well, and ``h = x @ A.T``, with one column per rank. Backward
computes all gradients from these: ``dS = s · dY @ B``, ``dX = dS @ A``, ``dA = dS.T @ x``, ``dB = s · dY.T @ h``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from peft_multibatch import streams
from peft_multibatch.adapters.adapter import AnyAdapter
from peft_multibatch.errors import UnsupportedError


if TYPE_CHECKING:
    from peft_multibatch.compat import LoraLayer


class Wanted(NamedTuple):
    """Which gradients a product computes.

    Attributes:
        x: whether to compute the input's gradient.
        weights: whether to compute the gradient of each of ``TrainedWeights.parameters``.
    """

    x: bool
    weights: tuple[bool, ...]

    @property
    def any_a(self) -> bool:
        """Whether any ``lora_A`` gets a gradient."""
        return any(self.weights[::2])

    @property
    def any_b(self) -> bool:
        """Whether any ``lora_B`` gets a gradient."""
        return any(self.weights[1::2])


class Product(Protocol):
    """A backend's computation of the deltas of one projection group, and of their gradients.

    Attributes:
        wanted: the gradients that it computes.
    """

    wanted: Wanted

    def forward(self, ys: Sequence[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """``ys`` plus their deltas, in new tensors, and ``h`` if any ``lora_B`` gets a gradient."""

    def backward(
        self, grad_ys: Sequence[Tensor | None], x: Tensor | None, h: Sequence[Tensor]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients of ``x`` and all parameters; None for those that aren't wanted. May be called several times.

        Args:
            grad_ys: the gradients of the outputs; None for outputs that weren't used.
            x: the input; None if no ``lora_A`` gets a gradient.
            h: the second result of ``forward``.
        """


class TrainedWeights:
    """The weights of the adapters in use in a projection group, in the order of the autograd node's inputs.

    Attributes:
        parts: the adapters' weights of each slice, by slot.
        parameters: PEFT's own ``lora_A`` and ``lora_B``, alternating, ordered by slot, then slice; missing ones are
            left out.
        places: slot and slice of each pair.
        index: the inverse: slot and slice -> the index of the pair in ``parameters``.

    Args:
        adapters: the adapters in use, by slot; their slots stay taken as long as this object exists.
        layers: the group's layers, in the order of their slices.
        slots: the number of slots.
    """

    def __init__(self, adapters: Mapping[int, AnyAdapter], layers: Sequence[LoraLayer], slots: int) -> None:
        self._adapters = adapters
        self.parts = parts = {slot: adapter.parts(layers) for slot, adapter in adapters.items()}
        self.num_slices = len(layers)
        places = [(slot, i) for slot, row in parts.items() for i, part in enumerate(row) if part is not None]
        self.places = places
        self.index = {place: 2 * number for number, place in enumerate(places)}
        self.parameters = [each for row in parts.values() for part in row if part for each in part.parameters]
        self._slots = slots
        self._layouts: dict[tuple, Layout] = {}

    def layout(self, wanted: tuple[bool, ...], device: torch.device) -> Layout:
        """The memory layout of gradients, for kernels on the current stream.

        Args:
            wanted: whether each parameter gets a gradient.
            device: the device of the kernels.
        """
        key = wanted, device, streams.key(device)
        if key not in self._layouts:
            self._layouts[key] = Layout(self, wanted, self._slots, device)
        return self._layouts[key]


class Layout:
    """Gradients in one buffer per dtype, so that kernels find them by offset.

    Attributes:
        offsets: int64 ``[S, I, 2]`` on the device: the offsets of the gradients of ``lora_A`` and ``lora_B`` in the
            buffer of their dtype, in elements; -1 for those that aren't wanted.
    """

    def __init__(self, weights: TrainedWeights, wanted: tuple[bool, ...], slots: int, device: torch.device) -> None:
        self._device = device
        self._sizes: dict[torch.dtype, int] = {}
        self._found: list[tuple[torch.dtype, tuple[int, ...], tuple[int, int], int] | None] = []
        offsets = torch.full((slots, weights.num_slices, 2), -1, dtype=torch.int64, device="cpu")
        for index, (parameter, is_wanted) in enumerate(zip(weights.parameters, wanted)):
            if not is_wanted:
                self._found.append(None)
                continue
            offset = self._sizes.get(parameter.dtype, 0)
            shape = tuple(parameter.shape)
            self._found.append((parameter.dtype, shape, (shape[1], 1), offset))
            self._sizes[parameter.dtype] = offset + -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
            offsets[(*weights.places[index // 2], index % 2)] = offset
        self.offsets = offsets.to(device, non_blocking=True)

    def buffers(self, is_zero: bool) -> dict[torch.dtype, Tensor]:
        """Allocate memory for all gradients, one tensor per dtype."""
        make = torch.zeros if is_zero else torch.empty
        return {dtype: make(size, dtype=dtype, device=self._device) for dtype, size in self._sizes.items()}

    def views(self, buffers: Mapping[torch.dtype, Tensor]) -> list[Tensor | None]:
        """The gradient of each parameter; None for those that aren't wanted."""
        return [found and buffers[found[0]].as_strided(*found[1:]) for found in self._found]


_ALIGNMENT = 16  # elements, so that kernels and optimizers can access every gradient 16 bytes at a time


def add_with_gradients(product: Product, weights: TrainedWeights, ys: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """The outputs of a projection group plus each row's delta, as an autograd node.

    Args:
        product: the computation; used for this call only.
        weights: the weights in use.
        ys: the base layer's output ``[..., N]`` of each slice.
        x: the input of all slices, ``[..., K]``.

    Returns:
        Tensors like ``ys``. Second derivatives aren't supported.
    """
    return list(_Add.apply(product, [i for _, i in weights.places], len(ys), x, *ys, *weights.parameters))


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: Product, slices: list[int], num_ys: int, x: Tensor, *tensors: Tensor) -> Any:
        ys, parameters = tensors[:num_ys], tensors[num_ys:]
        with without_autocast(x.device.type):
            outputs, h = product.forward(ys, x)
        # parameters are saved although products read their memory directly, so that autograd detects in-place writes
        ctx.save_for_backward(*([x] if product.wanted.any_a else []), *h, *parameters)
        ctx.product, ctx.slices, ctx.num_h = product, slices, len(h)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_ys: Tensor | None) -> Any:
        tensors, product = list(ctx.saved_tensors), ctx.product
        x = tensors.pop(0) if product.wanted.any_a else None
        grad_x, grads = gradients_of(ctx, grad_ys, lambda: product.backward(grad_ys, x, tensors[: ctx.num_h]))
        return None, None, None, grad_x, *grad_ys, *grads


def gradients_of(
    ctx: Any, grad_ys: Sequence[Tensor | None], run: Callable[[], tuple[Tensor | None, list[Tensor | None]]]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of a node's input and parameters.

    Args:
        ctx: the node, with its ``product`` and the slice of each pair of parameters, ``slices``.
        grad_ys: the gradients of its outputs; None for outputs that weren't used.
        run: computes the gradients.
    """
    given = [grad for grad in grad_ys if grad is not None]
    grad_x: Tensor | None = None
    grads: list[Tensor | None] = [None] * len(ctx.product.wanted.weights)
    if given:
        with torch.no_grad(), without_autocast(given[0].device.type):
            grad_x, grads = run()
    if len(given) < len(grad_ys):
        grads = [None if grad_ys[ctx.slices[index // 2]] is None else grad for index, grad in enumerate(grads)]
    if torch.is_grad_enabled() and any(grad.requires_grad for grad in given):
        source = next(grad for grad in given if grad.requires_grad)
        grad_x, *grads = (each if each is None else _Last.apply(each, source) for each in (grad_x, *grads))
    return grad_x, grads


class _Last(torch.autograd.Function):
    """A gradient that can't be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, source: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise UnsupportedError(
            "second derivatives were requested of layers that ran with adapter_ids: expected only first derivatives. "
            "Leave out create_graph=True, or run one adapter at a time without ids."
        )


def without_autocast(device_type: str) -> AbstractContextManager:
    """A block without autocast."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
