"""`mb.verify` accepts correct batches, and names the layers and samples of incorrect ones."""

from __future__ import annotations

import pytest
import torch
from models import peft_model
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_multibatch
from peft_multibatch import errors


def tiny(model: nn.Module, targets: list[str]):
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(model, config, adapter_name="a")
    for name in "bc":
        model.add_adapter(name, config)
    return model.eval(), peft_multibatch.enable(model)


class Transposing(nn.Module):
    """A head that sees positions first, like that of BROS."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.first(x).transpose(0, 1))


class Queries(nn.Module):
    """Learned positions through a separate layer, with one row for all samples."""

    def __init__(self):
        super().__init__()
        self.queries, self.first, self.second = nn.Parameter(torch.randn(6, 8)), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second(x) + self.first(self.queries)


class Mixing(nn.Module):
    """Samples that see each other's mean, so that no row is independent."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x):
        return self.first(x) + self.first(x).mean(0)


def state(model):
    return (
        {name: (value.requires_grad, value.data_ptr()) for name, value in model.named_parameters()},
        [(layer._active_adapter, layer._disable_adapters) for layer in model.modules() if hasattr(layer, "lora_A")],
        [dict(layer.scaling) for layer in model.modules() if hasattr(layer, "lora_A")],
        model.active_adapter,
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("ids", [[0, 1, -1], ["eight", "three", "eight"], [{0: 0.5, 1: 0.25}, 2, "__base__"]])
def test_a_right_batch_is_right_and_the_model_as_before(ids):
    model = peft_model()
    mb = peft_multibatch.enable(model)
    inputs = {"input_ids": torch.randint(3, 150, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    before = state(model)
    found = mb.verify(**inputs, adapter_ids=ids)
    assert found and found.ok, found
    assert [each.name for each in found.outputs] == ["logits"]
    assert found.outputs[0].error < 1e-5
    assert found.layers and max(each.error for each in found.layers) < 1e-5
    assert state(model) == before
    assert str(found).startswith("right, tolerance 1e-04")


@pytest.mark.parametrize("tokens", [3, 6])  # as many tokens as samples, which makes shapes ambiguous, and a multiple
def test_positions_first_are_found_and_their_layer_named(tokens):
    _, mb = tiny(Transposing(), ["first", "second"])
    found = mb.verify(x=torch.randn(3, tokens, 8), adapter_ids=["a", "b", -1])
    assert not found
    assert [each.wrong for each in found.outputs] == [(0, 1, 2)]  # found in every dimension
    assert {each.name for each in found.layers if each.problem} == {"second"}
    assert "first layer that differs: second" in str(found)


def test_rows_of_positions_are_found():
    _, mb = tiny(Queries(), ["first", "second"])
    found = mb.verify(x=torch.randn(3, 6, 8), adapter_ids=["a", "b", "c"])
    assert not found
    problems = {each.name: each.problem for each in found.layers if each.problem}
    assert problems == {"first": "rows differ between samples, but don't change with any of them"}


def test_a_model_that_mixes_samples_has_no_reference():
    _, mb = tiny(Mixing(), ["first"])
    found = mb.verify(x=torch.randn(3, 6, 8), adapter_ids=["a", "b", "c"])
    assert not found
    assert [each.note for each in found.outputs] == ["parts of it depend on several samples: not compared"]


def test_adapters_that_do_nothing_show_nothing():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]), adapter_name="a")
    mb = peft_multibatch.enable(model)
    found = mb.verify(input=torch.randn(3, 8), adapter_ids=["a", "a", -1])
    assert [each.note for each in found.outputs] == ["it is the same for all of these adapters: nothing to compare"]
    assert not found  # or a model would count as tried


def test_what_cannot_run_is_raised_and_one_sample_shows_nothing():
    model, mb = tiny(Transposing(), ["first", "second"])
    short, long = torch.randn(1, 5, 8), torch.randn(3, 5, 8)
    before = state(model)
    with pytest.raises(errors.RowMappingError):
        mb.verify(x=long, adapter_ids=["a", "b", -1])
    with pytest.raises(errors.AdapterIdsLengthError, match="expected at least two samples"):
        mb.verify(x=short, adapter_ids=["a"])
    with pytest.raises(errors.UnknownAdapterError):
        mb.verify(x=long, adapter_ids=["a", "b", "d"])
    assert state(model) == before
    model(x=long)


def test_samples_in_a_later_dimension_are_refused_until_verified():
    """The fallback for untested models, whose number of rows happens to be a multiple of the samples."""
    _, mb = tiny(Transposing(), ["first", "second"])
    x = torch.randn(3, 6, 8)
    message = r"second received an input of shape \[6, 3, 8\] for 3 samples.*Call mb.verify"
    with pytest.raises(errors.RowMappingError, match=message):
        mb._outer(x, adapter_ids=["a", "b", "c"])
    assert not mb.verify(x=x, adapter_ids=["a", "b", "c"])
    with pytest.raises(errors.RowMappingError):
        mb._outer(x, adapter_ids=["a", "b", "c"])


def test_a_model_that_was_verified_counts_as_tried():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)

        def forward(self, x):  # windows of three rows, as in Swin
            return self.first(x.reshape(-1, 3, 8)).view(x.shape)

    _, mb = tiny(Windows(), ["first"])
    x = torch.randn(3, 6, 8)
    with pytest.raises(errors.RowMappingError):
        mb._outer(x, adapter_ids=["a", "b", "c"])
    assert mb.verify(x=x, adapter_ids=["a", "b", "c"])
    mb._outer(x, adapter_ids=["a", "b", "c"])
