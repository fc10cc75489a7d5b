"""Decoding on a CPU: stacked copies of a plan's weights, for the steps of one ``generate``.

A decode step has one row or a few per sample. Its products are so small that the calls cost more than the computation,
and reading the weights of each adapter from a different place costs even more. All steps of a ``generate`` have the
same plan, so its weights are copied once, and each slice takes two products instead of two per adapter.
``calls/stacks.py`` decides when.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_multibatch.adapters.tables import Projection, SlotWeights
from peft_multibatch.ops.torch_backend import accumulator
from peft_multibatch.plan.segments import Segments


LARGEST = 1 << 16
"""The most elements of a weight that is copied. For larger ones, the overhead of calls doesn't matter."""

WASTE = 2
"""The largest factor by which padding may increase the size of copies, and the number of rows."""


class Stack:
    """The weights of a projection group's adapters, stacked in the order of a plan's segments.

    Attributes:
        dtype: the dtype of the weights.
        size: the size in bytes.

    Args:
        rows: the rows of the segments.
        a: ``lora_A`` of all slices, transposed and concatenated, ``[G, K, ΣR]``.
        bs: ``lora_B`` of each slice, transposed and multiplied by its scaling, ``[G, R, N]``; None for slices without
            adapters.
    """

    def __init__(self, rows: StackedRows, a: Tensor, bs: list[Tensor | None]) -> None:
        self.dtype = a.dtype
        self.size = a.element_size() * sum(each.numel() for each in (a, *bs) if each is not None)
        self._rows, self._a, self._bs = rows, a, bs
        self._ranks = [0 if b is None else b.shape[1] for b in bs]

    def add_(self, ys: Sequence[Tensor], x: Tensor) -> None:
        """Add each row's delta to the outputs of the group, in place, as ``torch_backend.apply_`` does."""
        h = torch.bmm(self._rows.take(x), self._a)
        parts = [h] if len(self._bs) == 1 else h.split(self._ranks, dim=2)
        for y, part, b in zip(ys, parts, self._bs):
            if b is not None:
                self._rows.add_product_(y, part, b)


class StackedRows:
    """Rows as a batch with the same number of rows per segment: in place, or gathered and padded.

    Attributes:
        fits: whether this is possible without too much padding.

    Args:
        segments: the plan.
        live: the indices of segments with weights.
        num_rows: the number of rows of the tensors.
    """

    def __init__(self, segments: Segments, live: Sequence[int], num_rows: int) -> None:
        per_entry = segments.rows_per_entry(num_rows)
        lens = [segments.spans[index][2] - segments.spans[index][1] for index in live]
        longest, count = max(lens), len(live)
        self.fits = count * longest <= WASTE * sum(lens)
        self._shape = count, longest * per_entry
        self._index: Tensor | None = None
        self._is_interleaved = False
        if count == segments.num_segments and min(lens) == longest:
            if segments.permutation is None:
                return
            even = torch.arange(segments.num_entries, dtype=torch.int32, device="cpu").view(longest, count)
            self._is_interleaved = per_entry == 1 and torch.equal(segments.permutation.view(count, longest), even.t())
        if not self._is_interleaved and self.fits:
            self._gather(segments, live, lens, per_entry)

    def _gather(self, segments: Segments, live: Sequence[int], lens: list[int], per_entry: int) -> None:
        entries = segments.permutation
        if entries is None:
            entries = torch.arange(segments.num_entries, dtype=torch.int32, device="cpu")
        count, length = self._shape
        index = torch.zeros(count, length, dtype=torch.int64, device="cpu")  # padding may read any row
        within = torch.arange(per_entry, dtype=torch.int64, device="cpu")
        positions = []
        for number, (segment, size) in enumerate(zip(live, lens)):
            _, start, stop = segments.spans[segment]
            own = (entries[start:stop, None].long() * per_entry + within).flatten()
            index[number, : len(own)] = own
            positions.append(number * length + torch.arange(size * per_entry, dtype=torch.int64, device="cpu"))
        self._index, live_positions = index.flatten(), torch.cat(positions)
        self._targets = self._index[live_positions]
        self._positions = live_positions if len(live_positions) < len(self._index) else None

    def take(self, x: Tensor) -> Tensor:
        """The rows of ``x`` as ``[G, rows per segment, K]``."""
        count, length = self._shape
        if self._index is not None:
            return x.index_select(0, self._index).view(count, length, -1)
        return x.view(length, count, -1).transpose(0, 1) if self._is_interleaved else x.view(count, length, -1)

    def add_product_(self, y: Tensor, h: Tensor, b: Tensor) -> None:
        """Add ``h @ b``, ``[G, rows per segment, N]``, to the rows of ``y``."""
        count, length = self._shape
        if self._index is not None:
            # not index_add_, which sorts its index in several threads, and waits for all of them after each pass
            rows = self.take(y).baddbmm_(h, b).flatten(0, 1)
            y.index_copy_(0, self._targets, rows if self._positions is None else rows.index_select(0, self._positions))
        elif self._is_interleaved:
            y.unflatten(0, (length, count)).transpose(0, 1).baddbmm_(h, b)
        else:
            y.unflatten(0, (count, length)).baddbmm_(h, b)


def make(segments: Segments, weights: dict[int, SlotWeights], num_rows: int, memory: int) -> Stack | None:
    """Make a stack, or return None if separate products are faster for these weights and rows.

    Args:
        segments: the plan.
        weights: the adapters' weights, by slot, as for ``torch_backend.apply_``.
        num_rows: the number of rows of the tensors.
        memory: the most bytes that the stack may take.
    """
    live = [index for index, (slot, *_) in enumerate(segments.spans) if any(weights.get(slot, ()))]
    found = [weights[segments.spans[index][0]] for index in live]
    parts = [part for slices in found for part in slices if part]
    if len(live) < 2:  # a stack doesn't reduce the number of products for one adapter
        return None
    dtype, tensors = parts[0][0].dtype, [each for a, b, _ in parts for each in (a, b)]
    ranks = [max(part[0].shape[1] if part else 0 for part in column) for column in zip(*found)]
    widths = [next((part[1].shape[1] for part in column if part), 0) for column in zip(*found)]
    features = parts[0][0].shape[0]
    numel = len(live) * sum(rank * (features + width) for rank, width in zip(ranks, widths))
    if (
        dtype != accumulator(parts[0][0])
        or any(each.dtype != dtype or each.device.type != "cpu" for each in tensors)
        or max(each.numel() for each in tensors) > LARGEST
        or numel > WASTE * sum(each.numel() for each in tensors)
        or numel * dtype.itemsize > memory
    ):
        return None
    rows = StackedRows(segments, live, num_rows)
    if not rows.fits:
        return None
    is_padded = numel > sum(each.numel() for each in tensors)
    fill = torch.zeros if is_padded else torch.empty
    a = fill(len(live), features, sum(ranks), dtype=dtype, device="cpu")
    bs = [
        fill(len(live), rank, width, dtype=dtype, device="cpu") if rank else None for rank, width in zip(ranks, widths)
    ]
    for position, (index, slices) in enumerate(zip(live, found)):
        own_bs = [b if b is None else b[position] for b in bs]
        _copy(slices, segments.scales[index], a[position].split(ranks, dim=1), own_bs)
    return Stack(rows, a, bs)


def _copy(
    slices: Sequence[Projection | None], scale: float, targets_a: Sequence[Tensor], targets_b: Sequence[Tensor | None]
) -> None:
    for part, target_a, target_b in zip(slices, targets_a, targets_b):
        if part and target_b is not None:
            a, b, scaling = part
            target_a[:, : a.shape[1]].copy_(a)
            torch.mul(b, scaling * scale, out=target_b[: len(b)])
