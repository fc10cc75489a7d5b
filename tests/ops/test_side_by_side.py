"""Stacked weights for decoding, against the reference of the ops."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

from peft_multibatch import Segments
from peft_multibatch.ops import torch_backend
from peft_multibatch.ops.torch_stacks import LARGEST, make


K, WIDTHS = 40, [24, 33, 16]
RANKS = [[4, 8, 2], [4, 8, 2], [3, 8, 2], [4, 0, 2]]  # the last adapter lacks a slice
PLANS = {
    "a row each": [[1, 0, 2]],
    "as many rows each": [[0, 0, 2, 2, 1, 1]],
    "interleaved": [[0, 1, 2, 0, 1, 2]],
    "interleaved, another first": [[2, 0, 1, 2, 0, 1]],
    "interleaved, in no order": [[0, 1, 2, 1, 0, 2]],
    "uneven": [[0, 0, 0, 2, 2]],
    "with base": [[-1, 1, 1, -1, 0, 0]],
    "a slice is missing": [[3, 0, 0, 3]],
    "mixtures": [[0, 1, 0, -1, 2], [1, -1, 2, -1, 0]],
}
SCALES = {"mixtures": [[0.5, 1.0, 0.25, 1.0, -2.0], [0.125, 1.0, 3.0, 1.0, 0.5]]}


def weights_of(dtype=torch.float64, ranks=RANKS, inputs=K):
    """Return weights transposed, as in banks."""
    return {
        slot: [
            (torch.randn(rank, inputs, dtype=dtype).t(), torch.randn(width, rank, dtype=dtype).t(), 0.5 + slot + i)
            if rank
            else None
            for i, (rank, width) in enumerate(zip(row, WIDTHS))
        ]
        for slot, row in enumerate(ranks)
    }


def expected(ys, x, components, weights):
    """Compute the result row by row."""
    ys = [y.clone() for y in ys]
    for segments in components:
        for (slot, rows), scale in zip(segments.rows(len(x), x.device), segments.scales):
            for row in torch.arange(len(x))[rows].tolist() if slot >= 0 else ():
                for y, part in zip(ys, weights[slot]):
                    if part is not None:
                        a, b, scaling = part
                        y[row] += x[row] @ a @ b * (scaling * scale)
    return ys


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", PLANS)
def test_as_row_by_row(name, beams):
    scales = SCALES.get(name, [None])
    components = [Segments.from_ids(ids, weights=scale) for ids, scale in zip(PLANS[name], scales)]
    weights, num_rows = weights_of(), beams * len(PLANS[name][0])
    x = torch.randn(num_rows, K, dtype=torch.float64)
    whole = torch.randn(num_rows, sum(WIDTHS), dtype=torch.float64)  # as for fused base weights
    wanted = expected(whole.split(WIDTHS, dim=1), x, components, weights)
    stacked, looped = whole.clone(), whole.clone()
    for segments in components:
        stack = make(segments, weights, num_rows, memory=1 << 20)
        assert stack is not None
        stack.add_(stacked.split(WIDTHS, dim=1), x)
        torch_backend.apply_(looped.split(WIDTHS, dim=1), x, segments, weights)
    for actual in (stacked, looped):
        for y, exact in zip(actual.split(WIDTHS, dim=1), wanted):
            assert_close(y, exact)


def test_where_reading_weights_one_by_one_is_better():
    even = Segments.from_ids([0, 1, 2])
    assert make(even, weights_of(), 3, memory=1 << 20) is not None
    size = make(even, weights_of(), 3, memory=1 << 20).size
    assert make(even, weights_of(), 3, memory=size) is not None
    assert make(even, weights_of(), 3, memory=size - 1) is None
    assert make(even, weights_of(torch.bfloat16), 3, memory=1 << 20) is None  # sums are in float32
    # would be mostly padding
    assert make(even, weights_of(ranks=[[1] * 3, [1] * 3, [32] * 3]), 3, memory=1 << 20) is None
    # the rows would be mostly padding
    assert make(Segments.from_ids([0] * 9 + [1, 2]), weights_of(), 11, memory=1 << 20) is None
    assert make(Segments.from_ids([0, 0, 0]), weights_of(), 3, memory=1 << 20) is None  # can't need fewer products
    assert make(Segments.from_ids([-1, -1]), weights_of(), 2, memory=1 << 20) is None
    large = weights_of(ranks=[[8] * 3] * 3, inputs=LARGEST // 8 + 1)
    assert make(even, large, 3, memory=1 << 30) is None


def test_a_copy_knows_nothing_of_what_is_written_later():
    weights = weights_of()
    stack = make(Segments.from_ids([0, 1]), weights, 2, memory=1 << 20)
    x, ys = torch.randn(2, K, dtype=torch.float64), [torch.zeros(2, width, dtype=torch.float64) for width in WIDTHS]
    stack.add_(ys, x)
    before = [y.clone() for y in ys]
    for a, b, _ in weights[0]:
        a.zero_(), b.zero_()
    for y in ys:
        y.zero_()
    stack.add_(ys, x)
    assert all(torch.equal(y, was) for y, was in zip(ys, before))
