"""`shrink` and `expand` against a row-by-row reference, in the eager and in the graph path."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import both_paths, eager, graph
from tolerances import assert_close
from torch import Tensor

from peft_multibatch import Segments, ops
from peft_multibatch.ops.torch_gradients import multiply


class Case(NamedTuple):
    x: Tensor
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    plan: Tensor
    ranks: Tensor
    scalings: Tensor
    slice_offsets: list[int]

    def run(self, module=ops):
        h = module.shrink(self.x, self.lora_a, self.plan, self.ranks)
        return module.expand(h, self.lora_b, self.plan, self.ranks, self.scalings, self.slice_offsets)


def make_case(plan, ranks, scalings, widths, rows_per_entry=1, inputs=5, dtype=torch.float32, grad=False) -> Case:
    """`ranks`: one row per slot, one column per slice."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)

    ranks = torch.tensor(ranks, dtype=torch.int32)
    offsets = [0]
    for width in widths:
        offsets.append(offsets[-1] + width)
    lora_a = [random(rank, inputs) for row in ranks.tolist() for rank in row]
    lora_b = [random(width, rank) for row in ranks.tolist() for width, rank in zip(widths, row)]
    x = random(plan.num_entries * rows_per_entry, inputs)
    return Case(x, lora_a, lora_b, plan.pack(), ranks, torch.tensor(scalings), offsets)


@both_paths
def test_two_adapters_three_samples_three_slices(make):
    """Weight indices [0, 0, 1], ranks [1, 1], scalings [1.0, 0.5], lengths [1, 1, 1], offsets [0, 3, 6, 9]."""
    plan = make([0, 0, 1], lens=[1, 1, 1])
    assert plan.num_segments == 2
    case = make_case(plan, [[1, 1, 1], [1, 1, 1]], [[1.0] * 3, [0.5] * 3], widths=[3, 3, 3])
    assert case.slice_offsets == [0, 3, 6, 9]
    delta = case.run()
    assert delta.shape == (3, 9)
    for row, (slot, scaling) in enumerate([(0, 1.0), (0, 1.0), (1, 0.5)]):
        for i in range(3):
            a, b = case.lora_a[3 * slot + i], case.lora_b[3 * slot + i]
            expected = scaling * (b @ (a @ case.x[row]))
            assert_close(delta[row, 3 * i : 3 * i + 3], expected)
    assert_close(delta, case.run(ops.reference), torch.float32)


MIXES = {
    "one": [0],
    "ordered": [0, 0, 1, 2],
    "interleaved": [2, 0, 1, 2, 0],
    "with base": [-1, 1, -1, 0],
    "all base": [-1, -1],
    "absent slots": [3, 3, 0],
}
RANKS = [[3, 8, 1], [0, 4, 4], [5, 0, 12], [0, 0, 0]]  # slot 3 has no adapter here, and others lack a slice
SCALINGS = [[2.0, 0.25, 1.0], [1.0, 0.5, 3.0], [-1.5, 1.0, 0.1], [1.0, 1.0, 1.0]]


@both_paths
@pytest.mark.parametrize("rows_per_entry", [1, 3])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_against_the_oracle(make, mix, rows_per_entry, dtype):
    case = make_case(make(mix), RANKS, SCALINGS, [7, 2, 16], rows_per_entry, inputs=33, dtype=dtype)
    expected = case.run(ops.reference)
    # products are summed in float32, whatever the dtype of the weights
    assert_close(case.run(), expected, torch.float64 if dtype == torch.float64 else torch.float32)
    untouched = expected == 0
    assert (case.run()[untouched] == 0).all()


@both_paths
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_place_form(make, mix, dtype):
    """Eager inference adds to outputs that may be strided, and doesn't change rows without adapter."""
    plan = make(mix)
    case = make_case(plan, RANKS, SCALINGS, [7, 2, 16], rows_per_entry=2, inputs=33, dtype=dtype)
    whole = torch.randn(len(case.x), 40).to(dtype)
    before = whole.clone()
    bounds = list(zip(case.slice_offsets, case.slice_offsets[1:]))
    weights = {
        slot: [
            (case.lora_a[3 * slot + i].t(), case.lora_b[3 * slot + i].t(), SCALINGS[slot][i]) if rank else None
            for i, rank in enumerate(RANKS[slot])
        ]
        for slot in set(mix) - {-1}
    }
    ops.torch_backend.apply_([whole[:, start:stop] for start, stop in bounds], case.x, plan, weights)
    expected = before.double()
    expected[:, :25] += case.run(ops.reference)
    assert_close(whole, expected.to(dtype))
    assert torch.equal(whole[:, 25:], before[:, 25:])  # columns outside all slices
    base = torch.tensor([slot in (-1, 3) for slot in plan.slots]).repeat_interleave(2)
    assert torch.equal(whole[base], before[base])


def test_ranks_below_the_weights_own_are_honoured():
    # a hot-swap target rank pads weights; the padding must have no effect
    case = make_case(eager([0, 0, 1]), [[4], [4]], [[1.0], [1.0]], [6])
    case = case._replace(ranks=torch.tensor([[2], [3]], dtype=torch.int32))
    assert_close(case.run(), case.run(ops.reference), torch.float32)
    for a in case.lora_a:
        a[3:] = float("nan")
    assert case.run().isfinite().all()


@both_paths
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_gradients(make, mix):
    plan = make(mix)
    case = make_case(plan, RANKS, SCALINGS, [4, 3, 2], rows_per_entry=2, dtype=torch.float64, grad=True)

    def run(x, *weights):
        half = len(weights) // 2
        return case._replace(x=x, lora_a=list(weights[:half]), lora_b=list(weights[half:])).run()

    assert torch.autograd.gradcheck(run, (case.x, *case.lora_a, *case.lora_b))


def test_gradients_equal_those_of_plain_autograd():
    case = make_case(eager([1, 0, 1, -1]), [[3], [2]], [[2.0], [0.5]], [6], grad=True)
    tensors = [case.x, *case.lora_a, *case.lora_b]
    ours = torch.autograd.grad(case.run().square().sum(), tensors)
    rows = []
    for row, slot in enumerate([1, 0, 1, -1]):
        scaling = [2.0, 0.5][slot]
        x = case.x[row]
        rows.append(torch.zeros(6) if slot < 0 else scaling * (case.lora_b[slot] @ (case.lora_a[slot] @ x)))
    expected = torch.autograd.grad(torch.stack(rows).square().sum(), tensors)
    for mine, theirs in zip(ours, expected):
        assert_close(mine, theirs)


@settings(max_examples=40, deadline=None)
@given(
    mix=st.lists(st.integers(-1, 3), min_size=1, max_size=12),
    ranks=st.lists(st.integers(0, 6), min_size=8, max_size=8),
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=2),
    rows=st.integers(1, 3),
)
def test_any_mix(mix, ranks, widths, rows):
    table = [ranks[2 * slot : 2 * slot + 2] for slot in range(4)]
    for make in (eager, graph):
        case = make_case(make(mix), table, [[1.0, 2.0], [0.5, 1.0], [3.0, 1.0], [1.0, 1.0]], widths, rows)
        assert_close(case.run(), case.run(ops.reference), torch.float32)


# from torch 2.15's own checks
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("grad", [False, True])
def test_ops_obey_the_rules_of_torch_library(grad):
    case = make_case(Segments.from_ids([0, 1, 0]), [[2, 1], [0, 3]], [[1.0, 1.0]] * 2, [3, 4], grad=grad)
    torch.library.opcheck(ops.shrink, (case.x, case.lora_a, case.plan, case.ranks))
    h = ops.shrink(case.x, case.lora_a, case.plan, case.ranks).detach().requires_grad_(grad)
    torch.library.opcheck(ops.expand, (h, case.lora_b, case.plan, case.ranks, case.scalings, case.slice_offsets))


@pytest.mark.parametrize("batch", [(), (3,)], ids=["matrices", "batches"])
@pytest.mark.parametrize(
    ("rows", "columns", "is_transposed"), [(20, 4, True), (20, 15, True), (20, 16, False), (4, 8, False)]
)
def test_narrow_products(rows, columns, is_transposed, batch):
    """Results with few columns are computed as their transposes, unless these have even fewer."""
    left, right = (torch.randn(*batch, *shape, dtype=torch.float64) for shape in ((rows, 7), (7, columns)))
    found = multiply(left, right)
    assert_close(found, (left[..., None] * right[..., None, :, :]).sum(-2))
    assert found.mT.is_contiguous() == is_transposed
