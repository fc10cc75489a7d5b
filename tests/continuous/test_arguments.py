"""Arguments that `generate_batch` and the manager would ignore are refused: misspelt ids, and settings of other
modes."""

from __future__ import annotations

import inspect

import pytest
import torch
from models import lora_configs, peft_model
from test_continuous import generation, prompts, results, row_by_row, settings
from transformers import LogitsProcessorList

import peft_multibatch
from peft_multibatch import errors


pytestmark = pytest.mark.filterwarnings(
    "ignore:You are calling .generate.. with the `input_ids` being on a device type"
)
OPTIONS = {"generation_config": generation(), "continuous_batching_config": settings()}
MISSPELT = ["adapter_id", "adapters", "adapter_name", "adaptor_ids", "adpater_ids", "lora_request"]


@pytest.fixture(scope="module")
def enabled():
    model = peft_model()
    yield model, peft_multibatch.enable(model)
    peft_multibatch.disable(model)


@pytest.mark.parametrize("keyword", MISSPELT)
def test_misspelt_ids(enabled, keyword):
    model, mb = enabled
    message = f"got the argument {keyword}, which nothing reads: expected adapter_id"
    for owner in (model, model.get_base_model()):
        with pytest.raises(errors.AdapterIdsTypeError, match=f"^generate_batch {message}s for"):
            owner.generate_batch(prompts(2), **{keyword: [0, 1]}, **OPTIONS)
    with mb.continuous_batching(**OPTIONS, warmup=False) as manager:
        with pytest.raises(errors.AdapterIdsTypeError, match=f"^add_requests {message}s for"):
            manager.add_requests(prompts(2), **{keyword: [0, 1]})
        if keyword != "adapter_id":
            with pytest.raises(errors.AdapterIdsTypeError, match=f"^add_request {message} for"):
                manager.add_request(prompts(1)[0], **{keyword: 0})
        with pytest.raises(errors.AdapterIdsTypeError, match=r"^add_request got the argument adapter_ids"):
            manager.add_request(prompts(1)[0], adapter_ids=[0])
        with pytest.raises(errors.AdapterIdsTypeError, match=r"^add_requests got the argument adapter_id,"):
            manager.add_requests(prompts(2), adapter_id=0)
        manager.add_requests(prompts(2), adapter_ids=[0, -1])
        assert [output.error for output in results(manager, 2).values()] == [None, None]


SWALLOWED = {
    "num_beams": 2,
    "prefix_allowed_tokens_fn": lambda *_: [3],
    "logits_processor": LogitsProcessorList(),
    "temperature": 0.5,
    "do_sample": True,
    "stop_strings": ["a"],
    "max_length": 20,
    "attention_mask": torch.ones(2, 3),
    "max_new_token": 3,
}


@pytest.mark.parametrize("ids", [None, [0, 1]])
@pytest.mark.parametrize("keyword", SWALLOWED)
def test_what_generate_batch_would_swallow(enabled, keyword, ids):
    model, _ = enabled
    with pytest.raises(errors.UnsupportedError, match=f"generate_batch got {keyword}, which continuous batching"):
        model.generate_batch(prompts(2), adapter_ids=ids, **{keyword: SWALLOWED[keyword]}, **OPTIONS)


def test_what_generate_batch_reads(enabled):
    model, _ = enabled
    inputs, entries = prompts(2), ["three", "eight"]
    outputs = model.generate_batch(
        inputs, adapter_ids=entries, max_new_tokens=3, progress_bar=False, warmup=False, **OPTIONS
    )
    assert [each.generated_tokens for each in outputs.values()] == row_by_row(model, inputs, entries, tokens=3)
    assert "adapter_ids" in inspect.signature(model.generate_batch).parameters


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"num_beams": 3}, "beam_search"),
        ({"prompt_lookup_num_tokens": 2}, "assisted_generation"),
        ({"max_time": 1.0}, r"max_time=1\.0"),
        ({"stop_strings": ["a"]}, r"stop_strings=\['a'\]"),
    ],
    ids=str,
)
def test_settings_that_continuous_batching_does_not_read(enabled, setting, said):
    model, mb = enabled
    options = OPTIONS | {"generation_config": generation(**setting)}
    with pytest.raises(errors.UnsupportedError, match=f"sets {said}, which continuous batching ignores"):
        model.generate_batch(prompts(2), adapter_ids=[0, 1], **options)
    with pytest.raises(errors.UnsupportedError, match=said):
        mb.continuous_batching(**options).__enter__()


def test_an_adapter_called_base():
    """Requests without an adapter use the base model; the explicit name is refused as ambiguous."""
    model = peft_model()
    model.add_adapter("__base__", lora_configs()["eight"])
    mb = peft_multibatch.enable(model)
    inputs, entries = prompts(3), [-1, 3, "three"]
    with mb.continuous_batching(**OPTIONS, warmup=False) as manager:
        names = manager.add_requests(inputs, adapter_ids=entries)
        plain = manager.add_request(inputs[0])
        odd = manager.add_request(inputs[0], adapter_id="__base__")
        found = results(manager, 5)
    assert [found[name].generated_tokens for name in names] == row_by_row(model, inputs, entries)
    assert found[plain].generated_tokens == found[names[0]].generated_tokens
    assert "an adapter has this name" in found[odd].error
    with pytest.raises(errors.AdapterIdsError, match="an adapter has this name"):
        model.generate_batch(inputs, adapter_ids=["three", "__base__", -1], **OPTIONS)


def test_a_negative_limit(enabled):
    _, mb = enabled
    with mb.continuous_batching(warmup=False, **OPTIONS) as manager:
        request = manager.add_request([5, 6], adapter_id=0, max_new_tokens=-3)
        assert "max_new_tokens=-3: expected at least 0" in results(manager, 1)[request].error
