"""An adapter that doesn't fit is refused by name before a kernel reads it, and all others run."""

from __future__ import annotations

import os

import pytest
import torch
from models import left_padded, lora_configs, peft_model, row_by_row
from tolerances import assert_close
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

import peft_multibatch
from peft_multibatch import AdapterMismatchError


OTHERS = ["three", "__base__", "four", "four", "three", "__base__"]
NAMES = ["three", "eight", "four", "four", "three", "__base__"]
BACKENDS = ["torch", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else [])]


def layer_of(model):
    return model.base_model.model.model.layers[1].mlp.down_proj


def another_rank(layer):
    weight = layer.lora_B["eight"].weight
    weight.data = weight.data[:, :2].contiguous()


def a_lower_rank_at_the_same_address(layer):
    weight = layer.lora_B["eight"].weight
    weight.data = weight.data[:, :2]


def other_columns(layer):
    weight = layer.lora_A["eight"].weight
    weight.data = torch.randn(len(weight), weight.shape[1] // 2, dtype=weight.dtype, device=weight.device)


def other_rows(layer):
    weight = layer.lora_B["eight"].weight
    weight.data = torch.randn(len(weight) - 8, weight.shape[1], dtype=weight.dtype, device=weight.device)


def transposed(layer):
    weight = layer.lora_B["eight"].weight
    weight.data = weight.data.t()


def three_dimensions(layer):
    weight = layer.lora_A["eight"].weight
    weight.data = weight.data[None].clone()


def one_half(layer):
    del layer.lora_B["eight"]


def the_other_half(layer):
    del layer.lora_A["eight"]


def no_scaling(layer):
    del layer.scaling["eight"]


def infinite_scaling(layer):
    layer.scaling["eight"] = float("inf")


def scaling_beyond_float32(layer):
    layer.scaling["eight"] = 1e300


def integers(layer):
    weight = layer.lora_A["eight"].weight
    layer.lora_A["eight"].weight = torch.nn.Parameter(weight.data.to(torch.int32), requires_grad=False)


FAULTS = [
    another_rank, a_lower_rank_at_the_same_address, other_columns, other_rows, transposed, three_dimensions, one_half,
    the_other_half, no_scaling, infinite_scaling, scaling_beyond_float32, integers,
]  # fmt: skip
every_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)


@torch.no_grad()
def logits(model, names):
    return model(**left_padded(), adapter_ids=names).logits


@torch.no_grad()
def expected(model, names):
    return torch.cat(row_by_row(model, names, left_padded(), lambda row: model(**row).logits))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("was_read", [False, True], ids=["new", "read before"])
@every_fault
def test_only_rows_that_name_it_are_refused(fault, was_read, backend):
    model = peft_model()
    want = expected(model, OTHERS)
    mb = peft_multibatch.enable(model, backend=backend)
    if was_read:
        logits(model, NAMES)
    fault(layer_of(model))
    for _ in range(2):
        message = r"adapter 'eight' has .*: expected .* rows of other adapters aren't"
        with pytest.raises(AdapterMismatchError, match=message):
            logits(model, NAMES)
        assert_close(logits(model, OTHERS), want)
    with pytest.raises(AdapterMismatchError), mb.batch(["eight"] * 6):
        pass
    with pytest.raises(AdapterMismatchError):
        logits(model, [{"eight": 0.5, "three": 0.5}] * 6)
    model.delete_adapter("eight")
    assert_close(logits(model, OTHERS), want)


@every_fault
def test_its_requests_end_and_all_others_run_on(fault):
    model = peft_model()
    prompt = [3, 4, 5, 6]
    mb = peft_multibatch.enable(model)
    fault(layer_of(model))
    with mb.continuous_batching(
        generation_config=GenerationConfig(max_new_tokens=3, do_sample=False),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, block_size=8, max_batch_tokens=32),
    ) as manager:
        for name in ("three", "eight", "four"):
            manager.add_request(prompt, name, adapter_id=name)
        found = {}
        while len(found) < 3:
            result = manager.get_result(timeout=60)
            assert result is not None
            found[result.request_id] = result
    assert "adapter 'eight' has" in str(found["eight"].error)
    for name in ("three", "four"):
        assert found[name].error is None
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, adapter_ids=[name])
        assert found[name].generated_tokens == tokens[0, 4:].tolist()


def test_compiled_models_run_without_it():
    model = peft_model()
    want = expected(model, OTHERS)
    mb = peft_multibatch.enable(model, backend="torch")
    another_rank(layer_of(model))
    compiled = torch.compile(model, backend="eager")
    with mb.batch(OTHERS), torch.no_grad():
        assert_close(compiled(**left_padded()).logits, want)


def test_an_adapter_that_is_mended_runs_again():
    model = peft_model()
    peft_multibatch.enable(model)
    layer = layer_of(model)
    scaling = layer.scaling["eight"]
    infinite_scaling(layer)
    with pytest.raises(AdapterMismatchError):
        logits(model, NAMES)
    layer.scaling["eight"] = scaling
    assert_close(logits(model, NAMES), expected(model, NAMES))


def test_an_error_names_few_of_many_adapters():
    model = peft_model()
    for name in ("tenant one", "tenant two", "tenants", "another"):
        model.add_adapter(name, lora_configs()["three"])
    peft_multibatch.enable(model)
    with pytest.raises(peft_multibatch.UnknownAdapterError) as caught:
        logits(model, ["tenant on"] * 6)
    assert "'tenant one'" in str(caught.value) and "three" not in str(caught.value)
    with pytest.raises(peft_multibatch.UnknownAdapterError) as caught:
        logits(model, [99] * 6)
    assert str(caught.value).count("('") == 4 and "6 ('another')" in str(caught.value)
