"""Converting ids to segments, for the eager plan and for the persistent buffers that graphs read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plans import both_paths

from peft_multibatch import RowMappingError, SegmentBuffer, Segments
from peft_multibatch.plan.segments import RUN


CPU = torch.device("cpu")
IDS = st.lists(st.integers(-1, 6), max_size=60)


@both_paths
def test_two_segments_of_three_samples(make):
    # the typical case: fewer segments than samples
    plan = make([0, 0, 1])
    assert (plan.num_entries, plan.num_segments) == (3, 2)
    assert plan.weight_indices.tolist() == [0, 1]
    assert plan.seg_lens.tolist() == [2, 1]
    assert plan.seg_indptr.tolist() == [0, 2, 3]
    assert plan.permutation is None
    one = 0x3F800000  # the bits of 1.0
    assert plan.pack().tolist() == [3, 2, 0, 0, 0, 0, one, 1, 2, one, -1, 3, 0]  # nothing is stored per sample


@both_paths
def test_copies_are_sized_by_segments_not_by_samples(make):
    assert make([4] * 1000).pack().numel() == make([4]).pack().numel()


@both_paths
def test_interleaved_ids_cost_as_many_segments_as_ordered_ones(make):
    plan = make([0, 1, 0, 1])
    assert plan.num_segments == make([0, 0, 1, 1]).num_segments == 2
    assert plan.permutation.tolist() == [0, 2, 1, 3]


@both_paths
@pytest.mark.parametrize(
    ("slots", "segments"),
    [([], 0), ([-1], 1), ([3], 1), ([-1, -1, -1], 1), (list(range(1000)), 1000), ([5] * 1000, 1), ([2, 0, -1], 3)],
    ids=["empty", "one base", "one", "all base", "1000 adapters", "1000 samples", "descending"],
)
def test_shapes_of_plans(make, slots, segments):
    plan = make(slots)
    assert plan.num_segments == segments
    assert plan.slots == slots


@both_paths
def test_lens_make_a_plan_with_an_entry_per_token(make):
    plan = make([0, 0, 1, 2], lens=[2, 3, 0, 1])
    assert plan.weight_indices.tolist() == [0, 2]  # no segment for an entry without tokens
    assert plan.seg_lens.tolist() == [5, 1]


@both_paths
@given(slots=IDS)
def test_compression_loses_nothing(make, slots):
    plan = make(slots)
    assert plan.slots == slots
    assert plan.num_entries == len(slots)
    assert plan.num_segments == len(set(slots)) <= max(len(slots), 0)
    assert len(plan.weight_indices) == len(plan.seg_lens) == len(plan.seg_indptr) - 1 == plan.num_segments
    assert plan.seg_lens.gt(0).all()
    assert plan.seg_indptr.dtype == plan.weight_indices.dtype == torch.int32


@both_paths
@given(slots=IDS, per_entry=st.integers(0, 4))
def test_rows_of_a_sample_stay_with_its_adapter(make, slots, per_entry):
    plan = make(slots)
    found = torch.full((len(slots) * per_entry,), -9)
    for slot, rows in plan.rows(len(found), CPU):
        assert found[rows].eq(-9).all()  # no row appears twice
        found[rows] = slot
    assert found.tolist() == [slot for slot in slots for _ in range(per_entry)]


@given(slots=IDS, per_entry=st.sampled_from([0, 1, RUN - 1, RUN, RUN + 1]))
def test_blocks_are_the_rows_of_their_adapters(slots, per_entry):
    plan = Segments.from_ids(slots, weights=[0.5 if slot % 2 else 1.0 for slot in slots])
    found = torch.full((len(slots) * per_entry,), -9)
    blocks, order, inverse = plan.blocks(len(found), CPU)
    for slot, rows, weight in blocks:
        assert weight == (0.5 if slot % 2 else 1.0)
        assert found[rows].eq(-9).all()
        found[rows] = slot
    if order is not None:
        assert per_entry < RUN and plan.permutation is not None
        assert torch.equal(found[inverse][order], found)
        found = found[inverse]
    assert found.tolist() == [slot for slot in slots for _ in range(per_entry)]
    assert plan.blocks(len(found), CPU) is plan.blocks(len(found), CPU)


@given(slots=IDS, most=st.integers(1, 9))
def test_cut_plans_serve_the_same_entries(slots, most):
    plan = Segments.from_ids(slots, weights=[0.5 if slot % 2 else 1.0 for slot in slots])
    cut = Segments.unpack(plan.cut(most).pack())
    assert cut.slots == slots
    assert (cut.longest <= most) and cut.seg_lens.gt(0).all()
    assert cut.num_segments == sum(-(-length // most) for length in plan.seg_lens.tolist())
    assert plan.cut(most) is plan.cut(most)
    assert cut.scales == [0.5 if slot % 2 else 1.0 for slot in cut.weight_indices.tolist()]


@both_paths
def test_rows_without_permutation_are_slices(make):
    assert [rows for _, rows in make([0, 0, 1]).rows(6, CPU)] == [slice(0, 4), slice(4, 6)]


def test_rows_that_map_to_no_sample_are_refused():
    with pytest.raises(RowMappingError) as caught:
        Segments.from_ids([0, 0, 1]).rows(7, CPU)
    assert str(caught.value) == (
        "a layer received 7 rows for 3 adapter ids, so its rows can't be mapped to samples: expected a multiple of 3. "
        "Pass one id per sample. If the layer gathers or drops rows, or sees only positions, leave it out of "
        "target_modules, or give all samples of a batch the same adapter."
    )


def test_rows_without_ids_are_refused():
    plan = Segments.from_ids([])
    assert plan.rows_per_entry(0) == 0
    with pytest.raises(RowMappingError, match="received 4 rows for 0 adapter ids"):
        plan.rows_per_entry(4)


def test_a_plan_read_from_a_buffer_survives_the_next_update():
    buffer = SegmentBuffer(4)
    buffer.update(Segments.from_ids([0, 0, 1]))
    plan = Segments.unpack(buffer.packed)
    buffer.update(Segments.from_ids([3, 2, 1, 3]))
    assert plan.slots == [0, 0, 1]
    assert Segments.unpack(buffer.packed).slots == [3, 2, 1, 3]


@pytest.mark.parametrize("slots", [torch.tensor([0, 0, 1]), (0, 0, 1)], ids=["tensor", "tuple"])
def test_slots_may_come_as(slots):
    assert Segments.from_ids(slots).slots == [0, 0, 1]
