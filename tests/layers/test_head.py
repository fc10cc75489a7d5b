"""The LM head on last tokens, whose rows torch would multiply one by one with a frozen weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import peft_model
from peft import LoraConfig
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import peft_multibatch


WITH_HEAD = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)


class Batched(TorchDispatchMode):
    """Counts batched products that write logits."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.count = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.bmm.default:
            self.count += self.vocabulary in out.shape
        return out


@torch.no_grad()
def last_logits(model, kept=2, **ids):
    tokens = torch.randint(1, 90, (4, 7), generator=torch.Generator().manual_seed(0))
    with Batched(model.get_output_embeddings().weight.shape[0]) as batched:
        logits = model(tokens, logits_to_keep=kept, **ids).logits
    return logits, batched.count


def head_of(model):
    return model.get_output_embeddings()


def test_all_rows_are_multiplied_at_once():
    model = peft_model()
    expected, count = last_logits(model)
    assert count == 1  # as PEFT runs it
    mb = peft_multibatch.enable(model)
    three, four = (last_logits(model, adapter_ids=[name] * 4) for name in ("three", "four"))
    mixed, count = last_logits(model, adapter_ids=["three", "four", "__base__", "four"])
    assert three[1] == four[1] == count == 0
    assert_close(three[0], expected)
    assert_close(mixed[[1, 3]], four[0][[1, 3]])
    assert last_logits(model)[1] == 0  # without ids, too
    assert last_logits(model, 1)[1] == 0  # which newer versions of torch multiply at once, too
    assert_close(last_logits(model, 1)[0], expected[:, 1:])
    mb.disable()
    again, count = last_logits(model)
    assert count == 1 and torch.equal(again, expected) and "forward" not in head_of(model).__dict__


def test_a_head_with_adapters():
    model = peft_model()
    model.add_adapter("head", WITH_HEAD)
    model.set_adapter("head")
    expected, count = last_logits(model)
    assert count == 1
    peft_multibatch.enable(model)
    actual, count = last_logits(model, adapter_ids=["head"] * 4)
    assert count == 0 and "forward" not in head_of(model).base_layer.__dict__
    assert_close(actual, expected)


def test_a_head_that_gets_adapters_and_loses_them():
    model = peft_model()
    peft_multibatch.enable(model)
    head = head_of(model)
    assert last_logits(model, adapter_ids=["three"] * 4)[1] == 0 and "forward" in head.__dict__
    model.add_adapter("head", WITH_HEAD)
    model.set_adapter("head")
    actual, count = last_logits(model, adapter_ids=["head"] * 4)
    assert count == 0 and "forward" not in head.__dict__
    peft_multibatch.disable(model)
    assert_close(actual, last_logits(model)[0])


def test_copies_and_pickles():
    model = peft_model()
    expected, _ = last_logits(model)
    mb = peft_multibatch.enable(model)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    mb.disable()
    for other in (copied, pickled):
        assert_close(last_logits(other)[0], expected)
        forward = head_of(other).__dict__.get("forward")
        assert forward is None or forward.__self__ is head_of(other)
        mb = peft_multibatch.enable(other)
        assert last_logits(other, adapter_ids=["three"] * 4)[1] == 0
        mb.disable()


def test_another_replacement_of_the_forward_stays():
    model = peft_model()
    head = head_of(model)
    plain = head.forward
    head.forward = lambda x: plain(x) + 1
    mb = peft_multibatch.enable(model)
    expected, _ = last_logits(model)
    actual, _ = last_logits(model, adapter_ids=["three"] * 4)
    assert_close(actual, expected)
    ours = head.forward
    mb.disable()
    assert head.forward is ours


@pytest.mark.parametrize("what", ["hook", "new head"])
def test_changes_of_the_head(what):
    model = peft_model()
    peft_multibatch.enable(model)
    seen = []
    if what == "hook":
        head_of(model).register_forward_hook(lambda *_: seen.append(True))
    else:
        inner = model.get_base_model()
        inner.set_output_embeddings(torch.nn.Linear(*reversed(head_of(model).weight.shape), bias=False))
    expected, _ = last_logits(model)
    actual, _ = last_logits(model, adapter_ids=["three"] * 4)
    assert_close(actual, expected)
    assert len(seen) == 2 * (what == "hook")
