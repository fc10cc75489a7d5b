"""Base layers and deltas as one autograd node, against autograd's own formulas."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from peft_multibatch import Segments, UnsupportedError
from peft_multibatch.adapters.tables import LayerWeights
from peft_multibatch.ops.gradients import TrainedWeights, Wanted
from peft_multibatch.ops.torch_frozen import EvenProduct, choose_product, linear_with_gradients
from peft_multibatch.ops.torch_gradients import TorchProduct


K, WIDTHS = 36, [20, 28, 17]
EVEN = [[4, 2, 3]] * 4
PLANS = {
    "a sample each": ([2, 0, 1], EVEN, EvenProduct),
    "two samples each": ([0, 0, 1, 1, 3, 3], EVEN, EvenProduct),
    "uneven": ([0, 0, 1], EVEN, TorchProduct),
    "one adapter": ([1, 1], EVEN, TorchProduct),
    "interleaved": ([0, 1, 0, 1], EVEN, TorchProduct),
    "with base": ([0, -1, 1], EVEN, TorchProduct),
    "other ranks": ([0, 1, 2], [[4, 2, 3], [4, 2, 3], [4, 2, 5]], TorchProduct),
    "a slice is missing": ([0, 1], [[4, 0, 3]] * 2, TorchProduct),
}


class Case:
    def __init__(self, name, slices=3, biases=True, same_scaling=False, trains_x=True, frozen=(), tokens=5):
        ids, ranks, self.kind = PLANS[name]
        self.segments, self.trains_x = Segments.from_ids(ids), trains_x
        self.x = torch.randn(len(ids), tokens, K, dtype=torch.float64, requires_grad=trains_x)
        widths = WIDTHS[:slices]
        self.bases = [
            (torch.randn(width, K, dtype=torch.float64), torch.randn(width, dtype=torch.float64) if biases else None)
            for width in widths
        ]
        self.grads = [torch.randn(len(ids), tokens, width, dtype=torch.float64) for width in widths]
        self.parts = {}
        for slot in sorted({*ids} - {-1}):
            self.parts[slot] = []
            for i, (rank, width) in enumerate(zip(ranks[slot], widths)):
                a, b = torch.randn(rank, K, dtype=torch.float64), torch.randn(width, rank, dtype=torch.float64)
                a.requires_grad_((slot, "a") not in frozen)
                b.requires_grad_((slot, "b") not in frozen)
                scaling = 2.0 if same_scaling else [2.0, -0.5, 0.25, 1.0][(slot + i) % 4]
                self.parts[slot].append(LayerWeights(a.data, b.data, scaling, (a, b)) if rank else None)
        adapters = {slot: SimpleNamespace(parts=lambda _, row=row: row) for slot, row in self.parts.items()}
        self.trained = TrainedWeights(adapters, [None] * slices, len(ranks))
        self.tensors = [each for each in (self.x, *self.trained.parameters) if each.requires_grad]

    def product(self):
        wanted = Wanted(self.trains_x, tuple(each.requires_grad for each in self.trained.parameters))
        return choose_product([self.segments], self.trained, wanted, self.x)

    def run(self):
        return linear_with_gradients(self.product(), self.trained, self.bases, self.x)

    def by_autograd(self):
        outputs = []
        for i, (weight, bias) in enumerate(self.bases):
            rows = list(F.linear(self.x, weight, bias))
            for entry, slot in enumerate(self.segments.slots):
                part = self.parts[slot][i] if slot >= 0 else None
                if part is not None:
                    a, b = part.parameters
                    rows[entry] = rows[entry] + self.x[entry] @ a.t() @ b.t() * part.scaling
            outputs.append(torch.stack(rows))
        return outputs


def check(case):
    outputs, expected = case.run(), case.by_autograd()
    found = torch.autograd.grad(outputs, case.tensors, case.grads)
    wanted = torch.autograd.grad(expected, case.tensors, case.grads, materialize_grads=True)
    for actual, exact in zip([*outputs, *found], [*expected, *wanted]):
        assert_close(actual, exact)
        assert actual.shape == exact.shape


@pytest.mark.parametrize("name", PLANS)
def test_against_autograd(name):
    case = Case(name)
    assert type(case.product()) is case.kind
    check(case)


@pytest.mark.parametrize("name", ["two samples each", "uneven"])
@pytest.mark.parametrize(
    "options",
    [{"slices": 1}, {"biases": False}, {"same_scaling": True}, {"trains_x": False}, {"tokens": 1}],
    ids=["one slice", "no bias", "one scaling", "x is frozen", "one token"],
)
def test_other_forms(name, options):
    check(Case(name, **options))


def test_what_is_frozen_gets_no_gradient():
    case = Case("two samples each", frozen=[(0, "a"), (1, "b")])
    assert isinstance(case.product(), TorchProduct)
    check(case)


@pytest.mark.parametrize("name", ["two samples each", "uneven"])
def test_gradients_that_come_in_any_form(name):
    """Gradients that are expanded, transposed, or missing because an output isn't used."""
    case = Case(name)
    shapes = [grad.shape for grad in case.grads]
    case.grads[0] = torch.randn((), dtype=torch.float64).expand(shapes[0])
    case.grads[1] = torch.randn(shapes[1][::-1], dtype=torch.float64).permute(2, 1, 0)
    case.x = case.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    case.tensors[0] = case.x
    check(case)
    found = torch.autograd.grad(case.run()[1], case.tensors, case.grads[1], allow_unused=True)
    wanted = torch.autograd.grad(case.by_autograd()[1], case.tensors, case.grads[1], allow_unused=True)
    for actual, exact in zip(found, wanted):
        assert (actual is None) == (exact is None)
        if exact is not None:
            assert_close(actual, exact)


@pytest.mark.parametrize("name", ["two samples each", "uneven"])
def test_a_graph_is_used_twice(name):
    case = Case(name)
    outputs = case.run()
    first = torch.autograd.grad(outputs, case.tensors, case.grads, retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(outputs, case.tensors, case.grads)):
        assert torch.equal(once, again)


@pytest.mark.parametrize("name", ["two samples each", "uneven"])
@pytest.mark.parametrize("which", ["base", "lora_A", "lora_B", "x"])
def test_what_was_written_before_backward_is_noticed(name, which):
    case = Case(name)
    outputs = case.run()
    a, b = case.trained.parameters[:2]
    with torch.no_grad():
        {"base": case.bases[0][0], "lora_A": a, "lora_B": b, "x": case.x}[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs, case.tensors, case.grads)


@pytest.mark.parametrize("name", ["two samples each", "uneven"])
def test_second_derivatives_are_refused(name):
    case = Case(name)
    loss = sum(output.square().sum() for output in case.run())
    for grad in torch.autograd.grad(loss, case.tensors, create_graph=True):
        with pytest.raises(UnsupportedError, match="second derivatives were requested"):
            torch.autograd.grad(grad.sum(), case.x, retain_graph=True)


def test_what_is_kept_for_backward():
    """Besides tensors that exist anyway, only a row of rank columns per input row is kept."""
    case, kept = Case("two samples each"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        case.run()
    known = {each.data_ptr() for each in (case.x, *case.trained.parameters, *(weight for weight, _ in case.bases))}
    others = [tensor for tensor in kept if tensor.data_ptr() not in known]
    assert len(kept) - len(others) == len(known)
    assert sum(tensor.numel() for tensor in others) == case.x.shape[:-1].numel() * sum(EVEN[0])
