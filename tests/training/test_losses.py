"""Losses per sample, against torch's cross entropy over all logits at once."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from torch.nn.functional import cross_entropy

from peft_multibatch.training import sample_losses


MANY = 100_000
"""With as many classes, only two rows are computed at a time by one thread."""


def reference(logits, labels, shift=True):
    if labels.dim() == 1:
        logits, labels = logits[:, None], labels[:, None]
    elif shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = [cross_entropy(own, label, reduction="sum") for own, label in zip(logits, labels)]
    return torch.stack(losses), torch.stack([(each != -100).sum() for each in labels])


def inputs(shape, dtype=torch.float64):
    logits = torch.randn(shape, dtype=dtype)
    labels = torch.randint(0, shape[-1], shape[:-1])
    labels.view(-1)[::3] = -100
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "shift"),
    [((3, 5, 7), True), ((3, 5, 7), False), ((5, 7), True), ((3, 5, MANY), True), ((2, 1, 7), True)],
    ids=["shifted", "not shifted", "a classifier", "many classes", "nothing to predict"],
)
def test_losses_and_gradients(shape, shift, dtype):
    logits, labels = inputs(shape, dtype)
    losses, items = sample_losses(logits, labels, shift)
    exact = logits.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    expected, numbers = reference(exact, labels, shift)
    assert losses.dtype == exact.dtype
    assert torch.equal(items, numbers)
    assert_close(losses, expected)
    weights = torch.rand_like(losses)
    (found,) = torch.autograd.grad((losses * weights).sum(), logits)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), exact)
    assert found.dtype == dtype
    assert_close(found, wanted, dtype)


def test_logits_of_any_strides():
    logits, labels = inputs((6, 4, 5))
    logits = logits.detach().permute(1, 0, 2).requires_grad_()
    labels = labels.t()
    found = torch.autograd.grad(sample_losses(logits, labels)[0].sum(), logits)
    assert_close(*found, *torch.autograd.grad(reference(logits, labels)[0].sum(), logits))


def test_excluded_classes():
    logits, labels = inputs((2, 4, 6))
    with torch.no_grad():
        logits[..., 2] = -torch.inf
    labels[labels == 2] = 3
    losses, expected = sample_losses(logits, labels)[0], reference(logits, labels)[0]
    assert_close(losses, expected)
    assert_close(*torch.autograd.grad(losses.sum(), logits), *torch.autograd.grad(expected.sum(), logits))


def test_one_sample_that_is_not_finite_leaves_the_others_alone():
    logits, labels = inputs((3, 4, 5))
    with torch.no_grad():
        logits[1] = torch.nan
    losses, _ = sample_losses(logits, labels)
    assert losses.isfinite().tolist() == [True, False, True]
    (found,) = torch.autograd.grad(losses.nansum(), logits)
    assert found[[0, 2]].isfinite().all()


def test_second_derivatives():
    logits, labels = inputs((2, 3, 4))
    assert torch.autograd.gradgradcheck(lambda logits: sample_losses(logits, labels)[0], logits)


def test_labels_that_do_not_exist():
    logits, labels = inputs((2, 3, 4))
    for label in (4, -1):
        labels[0, 1] = label
        with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
            sample_losses(logits, labels)


def test_what_is_kept_for_backward():
    """The logits themselves, and nothing else of their size."""
    logits, labels = inputs((2, 3, MANY))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        losses, _ = sample_losses(logits, labels)
    assert {each.data_ptr() for each in kept if each.numel() >= MANY} == {logits.data_ptr()}
    losses.sum().backward()
