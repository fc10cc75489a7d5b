"""Plans as eager code and captured graphs read them."""

from __future__ import annotations

import pytest

from peft_multibatch import SegmentBuffer, Segments


def eager(slots, lens=None):
    return Segments.from_ids(slots, lens)


def graph(slots, lens=None):
    """Return the plan read from a buffer that contained a larger one before."""
    plan = Segments.from_ids(slots, lens)
    buffer = SegmentBuffer(capacity=2 * max(plan.num_entries, 1) + 8)
    buffer.packed.fill_(1_234_567)  # leftovers of the last call must never be read
    address = buffer.packed.data_ptr()
    buffer.update(Segments.from_ids(list(range(buffer.capacity))))
    buffer.update(plan)
    assert buffer.packed.data_ptr() == address
    return Segments.unpack(buffer.packed)


both_paths = pytest.mark.parametrize("make", [eager, graph], ids=["eager", "graph"])
