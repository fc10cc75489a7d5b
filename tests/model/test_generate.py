"""Greedy tokens of a mixed batch against PEFT, one adapter at a time, over architectures."""

from __future__ import annotations

import pytest
import torch
from models import ARCHITECTURES, base_model, left_padded, lora_configs, peft_model, row_by_row
from tolerances import assert_close, relative_error

import peft_multibatch


NAMES = ["three", "__base__", "eight", "four", "eight", "three"]
GREEDY = {"max_new_tokens": 10, "do_sample": False}


def tokens(model, **options):
    return lambda inputs: model.generate(**inputs, **GREEDY, **options)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return peft_model(request.param)


@pytest.fixture(scope="module")
def expected(model):
    return torch.cat(row_by_row(model, NAMES, left_padded(), tokens(model)))


def test_adapters_differ_from_each_other_and_from_the_base(model, expected):
    """A comparison that passes if ids have no effect, or the same effect on all rows, would prove nothing."""
    inputs = {key: value[:1].repeat(4, 1) for key, value in left_padded().items()}
    alone = row_by_row(model, ["__base__", "three", "four", "eight"], inputs, tokens(model))
    assert len({tuple(row.flatten().tolist()) for row in alone}) == 4


def test_mixed_batch(model, expected):
    mb = peft_multibatch.enable(model)
    try:
        actual = model.generate(**left_padded(), **GREEDY, adapter_ids=[id_of(mb, n) for n in NAMES])
    finally:
        mb.disable()
    assert torch.equal(actual, expected)


def id_of(mb, name):
    return -1 if name == "__base__" else mb.adapter_names.index(name)


@pytest.mark.parametrize("form", ["names", "tuple", "tensor", "adapter_names", "batch()", "unfused"])
def test_forms_of_ids(model, expected, form):
    mb = peft_multibatch.enable(model, fuse=form != "unfused")
    ids = [id_of(mb, name) for name in NAMES]
    try:
        if form == "batch()":
            with mb.batch(ids):
                actual = model.generate(**left_padded(), **GREEDY)
        else:
            argument = {
                "names": {"adapter_ids": NAMES},
                "tuple": {"adapter_ids": tuple(ids)},
                "tensor": {"adapter_ids": torch.tensor(ids)},
                "adapter_names": {"adapter_names": NAMES},
                "unfused": {"adapter_ids": ids},
            }[form]
            actual = model.generate(**left_padded(), **GREEDY, **argument)
    finally:
        mb.disable()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
    ],
    ids=["beams", "beams and returned sequences", "static cache", "no cache"],
)
def test_options_of_generate(options):
    model = peft_model("llama")
    expected = torch.cat(row_by_row(model, NAMES, left_padded(), tokens(model, **options)))
    peft_multibatch.enable(model)
    assert torch.equal(model.generate(**left_padded(), **GREEDY, **options, adapter_ids=NAMES), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_models_with_add_adapter(architecture):
    model = base_model(architecture)
    for name, config in lora_configs(architecture).items():
        torch.manual_seed(len(name))
        model.add_adapter(config, adapter_name=name)
    expected = []
    for row, name in enumerate(NAMES):
        inputs = {key: value[row : row + 1] for key, value in left_padded().items()}
        if name == "__base__":
            model.disable_adapters()
            expected.append(model.generate(**inputs, **GREEDY))
            model.enable_adapters()
        else:
            model.set_adapter(name)
            expected.append(model.generate(**inputs, **GREEDY))
    mb = peft_multibatch.enable(model)
    assert mb.adapter_names == ["three", "four", "eight"]
    assert torch.equal(model.generate(**left_padded(), **GREEDY, adapter_ids=NAMES), torch.cat(expected))
    logits = model(**left_padded(), adapter_ids=NAMES).logits
    assert not torch.allclose(logits, model(**left_padded()).logits)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False], ids=["fp32 adapters", "adapters as the base"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_in_half_precision(dtype, autocast_adapter_dtype):
    """Errors against the float32 model are no larger than PEFT's with a single adapter."""
    model = peft_model("llama", dtype, autocast_adapter_dtype)
    exact = peft_model("llama")
    with torch.no_grad():
        for mine, theirs in zip(exact.parameters(), model.parameters()):
            mine.copy_(theirs)
        inputs = left_padded()
        reference = torch.cat(row_by_row(exact, NAMES, inputs, lambda row: exact(**row).logits))
        alone = torch.cat(row_by_row(model, NAMES, inputs, lambda row: model(**row).logits))
        peft_multibatch.enable(model)
        mixed = model(**inputs, adapter_ids=NAMES).logits
    assert mixed.dtype == dtype
    real = inputs["attention_mask"].bool()
    # two roundings of the same number can differ from each other by more than each differs from the number; PEFT
    # rounds more often than we do
    ours, peft = (relative_error(logits[real], reference[real]) for logits in (mixed, alone))
    assert ours <= 1.05 * peft, (ours, peft)
    if autocast_adapter_dtype:
        assert_close(mixed[real], alone[real], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_on_a_gpu(architecture, options):
    """With the kernels in float32, tokens match PEFT's, one adapter at a time."""
    model = peft_model(architecture).cuda()
    inputs = {key: value.cuda() for key, value in left_padded().items()}
    expected = torch.cat(row_by_row(model, NAMES, inputs, tokens(model, **options)))
    mb = peft_multibatch.enable(model, backend="triton")
    assert mb.report().backend == "triton"
    for names in (NAMES, NAMES):
        assert torch.equal(model.generate(**inputs, **GREEDY, **options, adapter_ids=names), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_on_a_gpu(dtype):
    model, exact = peft_model("llama", dtype).cuda(), peft_model("llama").cuda()
    inputs = {key: value.cuda() for key, value in left_padded().items()}
    with torch.no_grad():
        for mine, theirs in zip(exact.parameters(), model.parameters()):
            mine.copy_(theirs)
        reference = torch.cat(row_by_row(exact, NAMES, inputs, lambda row: exact(**row).logits))
        alone = torch.cat(row_by_row(model, NAMES, inputs, lambda row: model(**row).logits))
        peft_multibatch.enable(model, backend="triton")
        mixed = model(**inputs, adapter_ids=NAMES).logits
        real = inputs["attention_mask"].bool()
        assert relative_error(mixed[real], reference[real]) <= 1.1 * relative_error(alone[real], reference[real])
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["three"].weight.data.mul_(3)
        assert not torch.allclose(model(**inputs, adapter_ids=NAMES).logits, mixed, atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_dora_beside_other_adapters(options):
    model = peft_model()
    config = lora_configs()["eight"]
    config.use_dora = True
    model.add_adapter("dora", config)
    for key, parameter in model.named_parameters():
        if "magnitude" in key:
            parameter.data *= torch.rand_like(parameter) + 0.5
    names = [*NAMES[:-2], "dora", "dora"]
    expected = torch.cat(row_by_row(model, names, left_padded(), tokens(model, **options)))
    mb = peft_multibatch.enable(model)
    assert "per segment" not in {entry.how for entry in mb.report()}
    assert torch.equal(model.generate(**left_padded(), **GREEDY, **options, adapter_ids=names), expected)
