"""Training with torch's matrix products, for every device and dtype. On a CPU this is the fast path.

Rows are read in place, or gathered once for all slices if ids are interleaved. Products accumulate in float32 (float64
for float64 weights), and every gradient is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_multibatch.adapters.tables import LayerWeights
from peft_multibatch.ops.dropout import Mask, Masks, dropped
from peft_multibatch.ops.gradients import TrainedWeights, Wanted
from peft_multibatch.ops.torch_backend import accumulator
from peft_multibatch.plan.segments import Segments


NARROW = 16
"""Results with fewer columns are computed as their transposes, which takes MKL down to a sixth of the time. Not in
inference, where a quantized base layer could amplify roundings other than PEFT's."""


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, for matrices or batches of them, and any strides of the result."""
    product = torch.mm if left.dim() == 2 else torch.bmm
    is_narrow = right.shape[-1] < min(NARROW, left.shape[-2])
    return product(right.mT, left.mT).mT if is_narrow else product(left, right)


class Share(NamedTuple):
    """The adapter of one segment in one slice.

    Attributes:
        i: the slice.
        part: the weights.
        scaling: the adapter's scaling, multiplied by its weight in a mixture.
        first: the index of its first parameter.
        mask: its dropout mask for the slice's input, or None.
    """

    i: int
    part: LayerWeights
    scaling: float
    first: int
    mask: Mask | None


class TorchProduct:
    """Deltas of a projection group and their gradients.

    Args:
        components: the segments of each component.
        weights: the weights of the adapters in use.
        wanted: the gradients that ``backward`` computes.
        masks: the dropout masks.
    """

    def __init__(
        self, components: Sequence[Segments], weights: TrainedWeights, wanted: Wanted, masks: Masks | None = None
    ) -> None:
        self.wanted = wanted
        self._components, self._weights, self._masks = components, weights, masks or {}

    def forward(self, ys: Sequence[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """As in ``gradients.Product``; one ``h`` per segment and slice."""
        outputs = [y.clone(memory_format=torch.contiguous_format) for y in ys]
        return outputs, self.add_(outputs, x)

    def add_(self, outputs: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """As in ``torch_frozen.InPlaceProduct``."""
        self._shape, self._dtype = x.shape, x.dtype
        flat, x_flat = [y.view(-1, y.shape[-1]) for y in outputs], x.reshape(-1, x.shape[-1])
        kept, drops = [], self._dropped(x.device)
        for slot, rows, shares in self._segments(x.device):
            x_rows = x_flat[rows]
            for i, (a, b, *_), scaling, index, mask in shares:
                y, acc = flat[i], accumulator(x, a)
                own_x = _cast(x_rows, a.dtype, acc)
                if mask is None:
                    h = multiply(own_x, a.t().to(acc))
                else:
                    h = multiply(own_x.masked_fill(drops[slot][:, i], 0), a.t().to(acc)).mul_(mask.scale)
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
        drops = self._dropped(device)
        for slot, rows, shares in self._segments(device):
            x_rows = x_flat[rows] if x_flat is not None else None
            total: Tensor | None = None if grad_x_flat is None else grad_x_flat[rows]
            for i, (a, b, *_), scaling, index, mask in shares:
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
                ds = multiply(grad_rows, b.to(acc)).mul_(scaling)
                own_drops = None
                if mask is not None:
                    ds, own_drops = ds.mul_(mask.scale), drops[slot][:, i]
                if total is not None and own_drops is not None:
                    total += torch.mm(ds.to(total.dtype), a.to(total.dtype)).masked_fill_(own_drops, 0)
                elif total is not None:
                    total.addmm_(ds.to(total.dtype), a.to(total.dtype))
                if x_rows is not None and wants_a:
                    own_x = _cast(x_rows, a.dtype, acc)
                    own_x = own_x if own_drops is None else own_x.masked_fill(own_drops, 0)
                    sums[index] = _add_product(sums[index], ds.t(), own_x)
            if grad_x_flat is not None and isinstance(rows, Tensor):
                assert total is not None
                grad_x_flat[rows] = total
        grads = [
            total if total is None else total.to(parameter.dtype).contiguous()
            for total, parameter in zip(sums, parameters)
        ]
        return grad_x if grad_x is None else grad_x.to(self._dtype), grads

    def _dropped(self, device: torch.device) -> dict[int, Tensor]:
        """Which elements are dropped in the rows of each slot with masks, bool ``[T, I, K]``."""
        if not self._masks:
            return {}
        plan, slices = self._components[0], range(self._weights.num_slices)  # masked adapters aren't in mixtures
        per_entry = self._shape[:-1].numel() // plan.num_entries
        parts = {
            slot: ((stop - start) * per_entry, [self._masks.get((slot, i)) for i in slices])
            for slot, start, stop in plan.spans
            if any((slot, i) in self._masks for i in slices)
        }
        if not parts:
            return {}
        found = dropped([*parts.values()], per_entry, self._shape[-1], device)
        return dict(zip(parts, found.split([number for number, _ in parts.values()])))

    def _segments(self, device: torch.device) -> Iterator[tuple[int, slice | Tensor, list[Share]]]:
        """The slot, rows and shares of every segment with weights."""
        num_rows, index = self._shape[:-1].numel(), self._weights.index
        for segments in self._components:
            for (slot, rows), weight in zip(segments.rows(num_rows, device), segments.scales):
                shares = [
                    Share(i, part, part.scaling * weight, index[slot, i], self._masks.get((slot, i)))
                    for i, part in enumerate(self._weights.parts.get(slot, ()))
                    if part is not None
                ]
                if shares:
                    yield slot, rows, shares


def _cast(rows: Tensor, dtype: torch.dtype, acc: torch.dtype) -> Tensor:
    """Round to the adapter's dtype first, as PEFT does."""
    return rows.to(dtype).to(acc)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return multiply(left, right) if total is None else total.addmm_(left, right)
