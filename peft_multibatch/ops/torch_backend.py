"""``shrink`` and ``expand`` with torch's matrix products, two per segment and slice, for every device and dtype.

This is the fast path on a CPU. Products read weights from PEFT's memory, and rows in place; if ids are interleaved and
samples have few rows, rows are gathered once for all slices. Decode steps have a faster path, see ``torch_stacks``.

Products accumulate in float32 (float64 for float64 weights), and a row's delta is rounded once, when it is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peft_multibatch.adapters.tables import Projection, SlotWeights
from peft_multibatch.ops.reference import max_rank
from peft_multibatch.plan.segments import BASE, Segments


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype in which products of these tensors are summed."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def apply_(ys: Sequence[Tensor], x: Tensor, segments: Segments, weights: dict[int, SlotWeights]) -> None:
    """Add each row's delta to the outputs of a projection group, in place. Without gradients.

    Args:
        ys: the base layer's output ``[T, N]`` of each slice; may be non-contiguous.
        x: the input of all slices, ``[T, K]``.
        segments: the call's plan; ``T`` is a multiple of its entries.
        weights: the adapters' weights, by slot; slots without weights may be missing.
    """
    blocks, order, inverse = segments.blocks(len(x), x.device)
    if order is not None:
        x = x.index_select(0, order)
    used = [(rows, x[rows], slices, scale) for slot, rows, scale in blocks if (slices := weights.get(slot))]
    for i, y in enumerate(ys):
        own = [(rows, part, found, scale) for rows, part, slices, scale in used if (found := slices[i]) is not None]
        if not own:
            continue
        acc = accumulator(x, *(a for _, _, (a, _, _), _ in own))
        if order is None or inverse is None:
            _add_products_(y, own, acc)
        else:
            delta = torch.zeros(y.shape, dtype=acc, device=y.device)
            _add_products_(delta, own, acc)
            delta = delta.index_select(0, inverse)
            y.add_(delta) if y.dtype == acc else y.copy_(y + delta)


def _add_products_(y: Tensor, own: list[tuple[slice, Tensor, Projection, float]], acc: torch.dtype) -> None:
    """Add the products of one slice to its output."""
    is_plain = y.dtype == acc
    for rows, x, (a, b, scaling), scale in own:
        y_rows = y[rows]
        if is_plain and x.dtype == a.dtype == acc:
            y_rows.addmm_(torch.mm(x, a), b, alpha=scaling * scale)
        else:
            # x is rounded to the adapter's dtype first, as in PEFT, and sums have higher precision
            h = torch.mm(x.to(a.dtype).to(acc), a.to(acc))
            y_rows.copy_(y_rows + torch.mm(h, b.to(acc)) * (scaling * scale))


def shrink(x: Tensor, weights: Sequence[Tensor], plan: Tensor, ranks: Tensor) -> Tensor:
    """Implementation of [`peft_multibatch.ops.shrink`][]."""
    acc = accumulator(x, *weights)
    h = x.new_zeros(len(x), ranks.shape[1], max_rank(weights, dim=0), dtype=acc)
    for index, i, rank, rows, _ in _live(plan, ranks, len(x), x.device):
        a = weights[index][:rank]
        h[rows, i, :rank] = torch.mm(x[rows].to(a.dtype).to(acc), a.t().to(acc))
    return h


def expand(
    h: Tensor, weights: Sequence[Tensor], plan: Tensor, ranks: Tensor, scalings: Tensor, slice_offsets: Sequence[int]
) -> Tensor:
    """Implementation of [`peft_multibatch.ops.expand`][]."""
    delta = h.new_zeros(len(h), slice_offsets[-1])
    scale = scalings.tolist()
    for index, i, rank, rows, weight in _live(plan, ranks, len(h), h.device):
        b = weights[index][:, :rank]
        out = torch.mm(h[rows, i, :rank], b.t().to(h.dtype))
        delta[rows, slice_offsets[i] : slice_offsets[i + 1]] = out * (scale[index // ranks.shape[1]][i] * weight)
    return delta


def shrink_backward(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], plan: Tensor, ranks: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of ``x`` and ``weights`` of ``shrink``."""
    grad_x = torch.zeros_like(x, dtype=grad.dtype)
    grad_weights = [torch.zeros_like(weight) for weight in weights]
    for index, i, rank, rows, _ in _live(plan, ranks, len(x), x.device):
        a, grad_rows = weights[index], grad[rows, i, :rank]
        grad_x[rows] += torch.mm(grad_rows, a[:rank].to(grad.dtype))
        grad_weights[index][:rank] += torch.mm(grad_rows.t(), x[rows].to(a.dtype).to(grad.dtype))
    return grad_x.to(x.dtype), grad_weights


def expand_backward(
    grad: Tensor,
    h: Tensor,
    weights: Sequence[Tensor],
    plan: Tensor,
    ranks: Tensor,
    scalings: Tensor,
    slice_offsets: Sequence[int],
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of ``h`` and ``weights`` of ``expand``."""
    grad_h = torch.zeros_like(h)
    grad_weights = [torch.zeros_like(weight) for weight in weights]
    scale = scalings.tolist()
    for index, i, rank, rows, weight in _live(plan, ranks, len(h), h.device):
        b = weights[index]
        factor = scale[index // ranks.shape[1]][i] * weight
        grad_rows = grad[rows, slice_offsets[i] : slice_offsets[i + 1]].to(h.dtype) * factor
        grad_h[rows, i, :rank] = torch.mm(grad_rows, b[:, :rank].to(h.dtype))
        grad_weights[index][:, :rank] += torch.mm(grad_rows.t(), h[rows, i, :rank])
    return grad_h, grad_weights


def _live(
    plan: Tensor, ranks: Tensor, num_rows: int, device: torch.device
) -> Iterator[tuple[int, int, int, slice | Tensor, float]]:
    """(index into the weights, slice, rank, rows, weight) of every segment and slice with weights."""
    num_slices, rank = ranks.shape[1], ranks.tolist()
    segments = Segments.unpack(plan)
    for (slot, rows), weight in zip(segments.rows(num_rows, device), segments.scales):
        for i in range(num_slices if slot != BASE else 0):
            if rank[slot][i] > 0:
                yield slot * num_slices + i, i, rank[slot][i], rows, weight
