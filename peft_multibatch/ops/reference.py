"""The reference implementation of ``shrink`` and ``expand``, row by row in float64.

Slow and simple on purpose. Everything else in this folder is compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_multibatch.plan.segments import BASE, Segments


def shrink(x: Tensor, weights: Sequence[Tensor], plan: Tensor, ranks: Tensor) -> Tensor:
    """Reference of [`peft_multibatch.ops.shrink`][]; returns float64."""
    num_slices = ranks.shape[1]
    h = x.new_zeros(len(x), num_slices, max_rank(weights, dim=0), dtype=torch.float64)
    for row, (slot, _) in enumerate(_row_slots(plan, len(x))):
        for i in range(num_slices if slot != BASE else 0):
            rank = int(ranks[slot, i])
            h[row, i, :rank] = weights[slot * num_slices + i][:rank].double() @ x[row].double()
    return h


def expand(
    h: Tensor, weights: Sequence[Tensor], plan: Tensor, ranks: Tensor, scalings: Tensor, slice_offsets: Sequence[int]
) -> Tensor:
    """Reference of [`peft_multibatch.ops.expand`][]; returns float64."""
    num_slices = ranks.shape[1]
    delta = h.new_zeros(len(h), slice_offsets[-1], dtype=torch.float64)
    for row, (slot, weight) in enumerate(_row_slots(plan, len(h))):
        for i in range(num_slices if slot != BASE else 0):
            rank = int(ranks[slot, i])
            out = weights[slot * num_slices + i][:, :rank].double() @ h[row, i, :rank].double()
            delta[row, slice_offsets[i] : slice_offsets[i + 1]] = scalings[slot, i].double() * weight * out
    return delta


def max_rank(weights: Sequence[Tensor], dim: int) -> int:
    """The largest rank of adapter weights: the size of dimension 0 of ``lora_A``, or dimension 1 of ``lora_B``."""
    return max((weight.shape[dim] for weight in weights), default=0)


def _row_slots(plan: Tensor, rows: int) -> list[tuple[int, float]]:
    """Slot and weight of every row."""
    segments = Segments.unpack(plan)
    found: dict[int, tuple[int, float]] = {}
    for (slot, own), weight in zip(segments.rows(rows, torch.device("cpu")), segments.scales):
        found |= dict.fromkeys(torch.arange(rows, dtype=torch.int64, device="cpu")[own].tolist(), (slot, weight))
    return [found[row] for row in range(rows)]
