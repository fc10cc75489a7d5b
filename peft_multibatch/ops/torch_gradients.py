"""Training with torch's own matrix products: every device, every dtype. On a CPU this is the fast path.

Rows are read where they are, or gathered once for all slices where ids are interleaved. Products accumulate in float32
(float64 for float64 weights), and every gradient is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_multibatch.adapters.tables import LayerWeights
from peft_multibatch.ops.gradients import TrainedWeights, Wanted
from peft_multibatch.ops.torch_backend import accumulator
from peft_multibatch.plan.segments import Segments


class Share(NamedTuple):
    """What one adapter does for the rows of one segment in one slice.

    Attributes:
        i: the slice.
        part: the weights.
        scaling: the adapter's, times what it counts in a mixture.
        first: where its parameters stand among all.
    """

    i: int
    part: LayerWeights
    scaling: float
    first: int


class TorchProduct:
    """Deltas of a projection group and their gradients.

    Args:
        components: the plans.
        weights: of the adapters in use.
        wanted: the gradients that ``backward`` makes.
    """

    def __init__(self, components: Sequence[Segments], weights: TrainedWeights, wanted: Wanted) -> None:
        self.wanted = wanted
        self._components, self._weights = components, weights

    def forward(self, ys: Sequence[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """As in ``gradients.Product``; an ``h`` for each segment and slice."""
        outputs = [y.clone(memory_format=torch.contiguous_format) for y in ys]
        return outputs, self.add_(outputs, x)

    def add_(self, outputs: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """As in ``torch_frozen.InPlaceProduct``."""
        self._shape, self._dtype = x.shape, x.dtype
        flat, x_flat = [y.view(-1, y.shape[-1]) for y in outputs], x.reshape(-1, x.shape[-1])
        kept = []
        for rows, shares in self._segments(x.device):
            x_rows = x_flat[rows]
            for i, (a, b, *_), scaling, index in shares:
                y, acc = flat[i], accumulator(x, a)
                h = torch.mm(_cast(x_rows, a.dtype, acc), a.t().to(acc))
                if self.wanted.weights[index + 1]:
                    kept.append(h)
                if isinstance(rows, slice) and y.dtype == acc:
                    y[rows].addmm_(h, b.t().to(acc), alpha=scaling)
                else:
                    y[rows] = (y[rows] + torch.mm(h, b.t().to(acc)) * scaling).to(y.dtype)
        return kept

    def backward(
        self,
        grad_ys: Sequence[Tensor | None],
        x: Tensor | None,
        h: Sequence[Tensor],
        grad_x: Tensor | None = None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """As in ``torch_frozen.InPlaceProduct``."""
        given = [grad if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grad_ys]
        device = next(grad.device for grad in given if grad is not None)
        parameters, waiting = self._weights.parameters, iter(h)
        sums: list[Tensor | None] = [None] * len(parameters)
        if self.wanted.x and grad_x is None:
            acc = accumulator(torch.empty(0, dtype=self._dtype, device=device), *parameters)
            grad_x = torch.zeros(self._shape, dtype=acc, device=device)
        x_flat, grad_x_flat = (each if each is None else each.reshape(-1, self._shape[-1]) for each in (x, grad_x))
        for rows, shares in self._segments(device):
            x_rows = x_flat[rows] if x_flat is not None else None
            total: Tensor | None = None if grad_x_flat is None else grad_x_flat[rows]
            for i, (a, b, *_), scaling, index in shares:
                wants_a, wants_b = self.wanted.weights[index : index + 2]
                own_h = next(waiting) if wants_b else None
                grad = given[i]
                if grad is None:
                    continue
                acc = accumulator(torch.empty(0, dtype=self._dtype, device=device), a)
                grad_rows = _cast(grad[rows], b.dtype, acc)
                if own_h is not None:
                    sums[index + 1] = _add_product(sums[index + 1], grad_rows.t(), own_h * scaling)
                if total is None and not wants_a:
                    continue
                ds = torch.mm(grad_rows, b.to(acc)).mul_(scaling)
                if total is not None:
                    total.addmm_(ds.to(total.dtype), a.to(total.dtype))
                if x_rows is not None and wants_a:
                    sums[index] = _add_product(sums[index], ds.t(), _cast(x_rows, a.dtype, acc))
            if grad_x_flat is not None and isinstance(rows, Tensor):
                assert total is not None
                grad_x_flat[rows] = total
        grads = [each if each is None else each.to(parameter.dtype) for each, parameter in zip(sums, parameters)]
        return grad_x if grad_x is None else grad_x.to(self._dtype), grads

    def _segments(self, device: torch.device) -> Iterator[tuple[slice | Tensor, list[Share]]]:
        """The rows of every segment that has anything to do, and what is to do for them."""
        num_rows, index = self._shape[:-1].numel(), self._weights.index
        for segments in self._components:
            for (slot, rows), weight in zip(segments.rows(num_rows, device), segments.scales):
                shares = [
                    Share(i, part, part.scaling * weight, index[slot, i])
                    for i, part in enumerate(self._weights.parts.get(slot, ()))
                    if part is not None
                ]
                if shares:
                    yield rows, shares


def _cast(rows: Tensor, dtype: torch.dtype, acc: torch.dtype) -> Tensor:
    """Rounded to the adapter's dtype first, as PEFT does."""
    return rows.to(dtype).to(acc)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right) if total is None else total.addmm_(left, right)
