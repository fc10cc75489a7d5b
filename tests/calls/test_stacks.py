"""Stacked copies of weights for the steps of one ``generate``: when they are created, and that they end with the
call."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch
from models import left_padded, peft_model, row_by_row

import peft_multibatch
from peft_multibatch.calls import stacks
from peft_multibatch.ops.torch_stacks import Stack


NAMES = ["three", "__base__", "eight", "four", "eight", "three"]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def used(monkeypatch):
    """Weak references to the stacks used, one per use."""
    found, add_ = [], Stack.add_

    def noted(stack, ys, x):
        found.append(weakref.ref(stack))
        add_(stack, ys, x)

    monkeypatch.setattr(Stack, "add_", noted)
    return found


def expected(model, names=NAMES, **options):
    return torch.cat(row_by_row(model, names, left_padded(), lambda own: model.generate(**own, **GREEDY, **options)))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("fuse", [True, False, "weights"])
def test_tokens(used, fuse, options):
    model = peft_model()
    wanted = expected(model, **options)
    mb = peft_multibatch.enable(model, fuse=fuse)
    assert torch.equal(model.generate(**left_padded(), **GREEDY, **options, adapter_ids=NAMES), wanted)
    # six tokens are a prompt and five steps; the first step reads the weights in place
    assert {*Counter(map(id, used)).values()} == {4}
    gc.collect()
    assert not any(ref() for ref in used)  # released with the call
    mb.disable()


def test_weights_that_are_written_between_calls(used):
    """Including writes that leave no trace."""
    model = peft_model()
    peft_multibatch.enable(model)
    before = model.generate(**left_padded(), **GREEDY, adapter_ids=NAMES)
    for name, parameter in model.named_parameters():
        if "lora_B.eight" in name:
            parameter.data.mul_(-3)
    after = model.generate(**left_padded(), **GREEDY, adapter_ids=NAMES)
    peft_multibatch.disable(model)
    assert used and not torch.equal(before, after)
    assert torch.equal(after, expected(model))


def test_single_forwards_read_weights_where_they_are(used):
    model = peft_model()
    mb = peft_multibatch.enable(model)
    step = {"input_ids": left_padded()["input_ids"][:, -1:]}
    with torch.no_grad(), mb.batch(NAMES):
        first = [model(**step).logits for _ in range(4)][-1]
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
        assert not torch.equal(model(**step).logits, first)
    assert not used


def test_memory_has_a_limit(used, monkeypatch):
    model = peft_model()
    wanted = expected(model)
    peft_multibatch.enable(model)
    monkeypatch.setattr(stacks, "MEMORY", 1)
    assert torch.equal(model.generate(**left_padded(), **GREEDY, adapter_ids=NAMES), wanted)
    assert not used
