"""Training on a CPU: frozen base layers and their adapters' deltas as a single autograd node.

Nothing else reads the base layers' outputs, so deltas are added to them in place. In backward, all gradients of the
input are accumulated in one tensor, starting with those of the base layers.

If all adapters have equal numbers of contiguous rows, they are computed as one batched product, and all slices read
the input together. The weights are stacked for this in forward and again in backward, because keeping the stacks in
between would take as much memory as the adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_multibatch.ops.dropout import Masks
from peft_multibatch.ops.gradients import TrainedWeights, Wanted, gradients_of, without_autocast
from peft_multibatch.ops.torch_gradients import TorchProduct, multiply
from peft_multibatch.plan.segments import Segments


class InPlaceProduct(Protocol):
    """As ``gradients.Product``, but adds to outputs and gradients in place.

    Attributes:
        wanted: the gradients that it computes.
    """

    wanted: Wanted

    def add_(self, outputs: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """Add the deltas to ``outputs``; returns the tensors that ``backward`` needs as ``h``."""

    def backward(
        self,
        grad_ys: Sequence[Tensor | None],
        x: Tensor | None,
        h: Sequence[Tensor],
        grad_x: Tensor | None = None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """As in ``gradients.Product``. The gradient of ``x`` is added to ``grad_x`` in place, if that is given."""


def linear_with_gradients(
    product: InPlaceProduct, weights: TrainedWeights, bases: Sequence[tuple[Tensor, Tensor | None]], x: Tensor
) -> list[Tensor]:
    """The outputs of a projection group, base layers included, as an autograd node.

    Args:
        product: computes the deltas; used for this call only.
        weights: the weights of the adapters in use.
        bases: weight ``[N, K]`` and bias ``[N]`` of each slice's base layer, frozen, in the dtype of ``x``.
        x: the input of all slices, ``[..., K]``.

    Returns:
        ``[..., N]`` of each slice. Second derivatives aren't supported.
    """
    flat = [each for base in bases for each in base]
    return list(_Linears.apply(product, [i for _, i in weights.places], len(flat), x, *flat, *weights.parameters))


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, product: InPlaceProduct, slices: list[int], num_bases: int, x: Tensor, *tensors: Tensor
    ) -> Any:
        weights, biases, parameters = tensors[:num_bases:2], tensors[1:num_bases:2], tensors[num_bases:]
        with without_autocast(x.device.type):
            outputs = [F.linear(x, weight, bias).contiguous() for weight, bias in zip(weights, biases)]
            h = product.add_(outputs, x)
        ctx.save_for_backward(*weights, *([x] if product.wanted.any_a else []), *h, *parameters)
        ctx.product, ctx.slices, ctx.num_h, ctx.num_bases = product, slices, len(h), len(weights)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_ys: Tensor | None) -> Any:
        saved, product = ctx.saved_tensors, ctx.product
        weights, tensors = saved[: ctx.num_bases], [*saved[ctx.num_bases :]]
        x = tensors.pop(0) if product.wanted.any_a else None

        def run() -> tuple[Tensor | None, list[Tensor | None]]:
            grad_x: Tensor | None = None
            for weight, grad in zip(weights, grad_ys):
                if grad is None or not product.wanted.x:
                    continue
                flat = grad.reshape(-1, grad.shape[-1])
                grad_x = torch.mm(flat, weight) if grad_x is None else grad_x.addmm_(flat, weight)
            return product.backward(grad_ys, x, tensors[: ctx.num_h], grad_x)

        grad_x, grads = gradients_of(ctx, grad_ys, run)
        if grad_x is not None:
            grad_x = grad_x.view(*next(grad for grad in grad_ys if grad is not None).shape[:-1], -1)
        return None, None, None, grad_x, *(None for _ in range(2 * ctx.num_bases)), *grads


def choose_product(
    components: Sequence[Segments], weights: TrainedWeights, wanted: Wanted, x: Tensor, masks: Masks | None = None
) -> InPlaceProduct:
    """The fastest product for these rows and weights.

    Args:
        components: the segments of each component.
        weights: the weights of the adapters in use.
        wanted: the gradients that ``backward`` computes.
        x: the input, ``[..., K]``.
        masks: the dropout masks.
    """
    if not masks and len(components) == 1 and components[0].permutation is None and all(wanted.weights):
        spans, parts = components[0].spans, weights.parts
        rows = [parts.get(slot, ()) for slot, *_ in spans]
        lens = {stop - start for _, start, stop in spans}
        ranks = {tuple(0 if part is None else len(part.lora_a) for part in row) for row in rows}
        is_even = len(lens) == len(ranks) == 1 and len(spans) > 1 and len({slot for slot, *_ in spans}) == len(spans)
        if is_even and all(ranks.pop()) and all(each.dtype == x.dtype for each in weights.parameters):
            return EvenProduct(components[0], weights, wanted)
    return TorchProduct(components, weights, wanted, masks)


class EvenProduct:
    """Deltas and their gradients for adapters with equal numbers of contiguous rows, and equal ranks.

    Args:
        segments: the plan.
        weights: the weights of the adapters in use.
        wanted: the gradients that ``backward`` computes, including those of all weights.
    """

    def __init__(self, segments: Segments, weights: TrainedWeights, wanted: Wanted) -> None:
        self.wanted = wanted
        self._count = segments.num_segments
        self._index = weights.index
        self._parameters = weights.parameters
        self._slots = [slot for slot, *_ in segments.spans]
        self._rows = [weights.parts[slot] for slot in self._slots]
        first = [part for part in self._rows[0] if part is not None]
        self._ranks = [len(part.lora_a) for part in first]
        scalings = [
            [part.scaling * scale for part in row if part is not None for _ in range(len(part.lora_a))]
            for row, scale in zip(self._rows, segments.scales)
        ]
        first_one = scalings[0][0]
        is_same = all(each == first_one for row in scalings for each in row)
        self._scalings: float | list[list[float]] = first_one if is_same else scalings

    def add_(self, outputs: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """As in ``InPlaceProduct``; returns ``s · h`` of all slices, concatenated."""
        h = self._scale_(multiply(self._batch(x), self._lora_a().mT))
        for i, (y, own) in enumerate(zip(outputs, h.split(self._ranks, dim=2))):
            self._batch(y).baddbmm_(own, self._lora_b(i).mT)
        return [h]

    def backward(
        self,
        grad_ys: Sequence[Tensor | None],
        x: Tensor | None,
        h: Sequence[Tensor],
        grad_x: Tensor | None = None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """As in ``InPlaceProduct``."""
        assert x is not None
        grads: list[Tensor | None] = [None] * len(self._parameters)
        all_ds = []
        for i, (grad, own) in enumerate(zip(grad_ys, h[0].split(self._ranks, dim=2))):
            if grad is None:
                all_ds.append(torch.zeros_like(own))
                continue
            batch = self._batch(grad)
            all_ds.append(multiply(batch, self._lora_b(i)))
            for slot, found in zip(self._slots, multiply(batch.mT, own).contiguous().unbind()):
                grads[self._index[slot, i] + 1] = found
        ds = self._scale_(torch.cat(all_ds, dim=2) if len(all_ds) > 1 else all_ds[0])
        if self.wanted.x:
            if grad_x is None:
                grad_x = torch.bmm(ds, self._lora_a()).view(x.shape)
            else:
                self._batch(grad_x).baddbmm_(ds, self._lora_a())
        for slot, found in zip(self._slots, torch.bmm(ds.mT, self._batch(x)).unbind()):
            for i, part in enumerate(found.split(self._ranks)):
                grads[self._index[slot, i]] = part
        return grad_x, grads

    def _batch(self, rows: Tensor) -> Tensor:
        """``[G, rows per segment, N]``: a view if rows are contiguous."""
        return rows.reshape(self._count, -1, rows.shape[-1])

    def _lora_a(self) -> Tensor:
        """``lora_A`` of all slices, ``[G, ΣR, K]``."""
        stacked = torch.cat([part.lora_a for row in self._rows for part in row if part is not None])
        return stacked.view(self._count, -1, stacked.shape[1])

    def _lora_b(self, i: int) -> Tensor:
        """``lora_B`` of one slice, ``[G, N, R]``."""
        return torch.stack([part.lora_b for row in self._rows if (part := row[i]) is not None])

    def _scale_(self, batch: Tensor) -> Tensor:
        """Multiply ``[G, rows per segment, ΣR]`` by the scalings, in place."""
        if isinstance(self._scalings, float):
            return batch if self._scalings == 1 else batch.mul_(self._scalings)
        scalings = torch.tensor(self._scalings, dtype=batch.dtype, device=batch.device)
        return batch.mul_(scalings[:, None])
