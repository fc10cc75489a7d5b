"""Gradients of whole models in mixed batches against PEFT, one adapter at a time, with torch's products and the
kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from models import alone, left_padded, peft_model
from peft import LoraConfig, get_peft_model
from products import DEVICE, both_backends, kernels
from tolerances import RELATIVE_ERROR, assert_close, relative_error
from torch import nn

import peft_multibatch


ADAPTERS = ["three", "four", "eight"]
MIXES = {
    "ordered": ["three", "three", "four", "eight"],
    "interleaved": ["eight", "three", "eight", "four", "three"],
    "with base": ["__base__", "four", "__base__", "eight"],
    "one adapter": ["four", "four"],
}


def build(dtype, backend=None, **options):
    # PEFT would keep adapters in float32 next to a base model in float64
    model = peft_model(dtype=dtype, autocast_adapter_dtype=False, **options).to(DEVICE).train()
    if backend is not None:
        mb = peft_multibatch.enable(model, backend=backend)
        assert mb.report().backend == backend
    return model


def losses(model, rows, length=5, **options):
    """Compute a number per row, with gradients."""
    inputs = {key: value.to(DEVICE) for key, value in left_padded(rows, length).items()}
    weights = torch.linspace(0.5, 2, 160, device=DEVICE)
    return lambda own=slice(None): (
        model(**{key: value[own] for key, value in inputs.items()}, use_cache=False, **options).logits * weights
    ).square().mean((1, 2))  # fmt: skip


def trained(model, names=ADAPTERS):
    model.set_requires_grad(names)
    return {
        key: parameter
        for key, parameter in model.named_parameters()
        if "lora_" in key and any(f".{name}." in key for name in names)
    }


def one_at_a_time(dtype, names, own=ADAPTERS):
    """Compute PEFT's gradients row by row, and sum those of each adapter."""
    model = build(dtype)
    row_loss = losses(model, len(names))
    found = {}
    for row, name in enumerate(names):

        def run(row=row):
            row_loss(slice(row, row + 1)).sum().backward()

        if name in own:
            alone(model, name, run)
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[key] = parameter.grad
    return found


def mixed(model, names, own=ADAPTERS):
    parameters = trained(model, own)
    losses(model, len(names), adapter_ids=names)().sum().backward()
    return {key: parameter.grad for key, parameter in parameters.items() if parameter.grad is not None}


def check(actual, expected, dtype):
    assert actual.keys() == expected.keys()
    assert_close(*(torch.cat([found[key].flatten() for key in expected]) for found in (actual, expected)), dtype)


@both_backends
@pytest.mark.parametrize("mix", MIXES)
def test_gradients_are_those_of_one_adapter_at_a_time(mix, backend, dtype):
    names = MIXES[mix]
    check(mixed(build(dtype, backend), names), one_at_a_time(dtype, names), dtype)


@both_backends
def test_an_adapter_that_is_frozen_gets_none(backend, dtype):
    names, own = MIXES["interleaved"], ["three", "eight"]
    model = build(dtype, backend)
    check(mixed(model, names, own), one_at_a_time(dtype, names, own), dtype)
    assert not any(p.grad is not None for key, p in model.named_parameters() if ".four." in key)


@both_backends
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, backend, dtype):
    names = MIXES["interleaved"]
    model = build(dtype, backend)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    check(mixed(model, names), one_at_a_time(dtype, names), dtype)


@kernels
def test_gradients_are_the_same_bits_twice():
    model = build(torch.float32, "triton")
    first = mixed(model, MIXES["interleaved"])
    model.zero_grad()
    second = mixed(model, MIXES["interleaved"])
    assert all(torch.equal(first[key], second[key]) for key in first)


@kernels
def test_gradients_are_views_of_one_buffer_for_each_group():
    model = build(torch.float32, "triton")
    found = mixed(model, MIXES["ordered"])
    attention = model.base_model.model.model.layers[0].self_attn
    storages = {
        half[name].weight.grad.untyped_storage().data_ptr()
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        for half in (projection.lora_A, projection.lora_B)
        for name in half
    }
    assert len(storages) == 1
    for gradient in found.values():  # optimizers and clipping modify gradients in place
        gradient.mul_(0.5)


@kernels
def test_autocast():
    """The kernels are as close to float32 as PEFT with autocast."""
    names = MIXES["interleaved"]
    exact = one_at_a_time(torch.float32, names)
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = one_at_a_time(torch.float32, names)
        actual = mixed(build(torch.float32, "triton"), names)
    assert_as_near(actual, expected, exact)


def assert_as_near(actual, expected, exact):
    assert actual.keys() == expected.keys() == exact.keys()
    flat = [torch.cat([each[key].float().flatten() for key in exact]) for each in (actual, expected, exact)]
    assert relative_error(flat[0], flat[2]) < 1.25 * relative_error(flat[1], flat[2]) < 0.1


@both_backends
def test_rows_without_gradients_and_with_in_one_model(backend, dtype):
    """First only adapters require gradients, not the first layer's input; then nothing does, and the model still
    runs."""
    model = build(dtype, backend)
    names = MIXES["with base"]
    with torch.no_grad():
        expected = losses(model, len(names), adapter_ids=names)()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.enable_grad():
        plain = losses(model, len(names), adapter_ids=names)()
    assert not plain.requires_grad
    assert_close(plain, expected)
    model.set_requires_grad(["four"])
    actual = losses(model, len(names), adapter_ids=names)()
    assert actual.requires_grad
    assert_close(actual, expected)


@both_backends
def test_an_adapter_that_is_deleted_before_backward(backend, dtype):
    """The weights that were used get the gradients, even if another adapter has replaced this one."""
    names = MIXES["ordered"]
    expected = one_at_a_time(dtype, names)
    model = build(dtype, backend)
    model.set_adapter("eight")
    parameters = trained(model)
    loss = losses(model, len(names), adapter_ids=names)().sum()
    config = model.peft_config["three"]
    model.delete_adapter("three")
    model.add_adapter("new", config)
    model.to(DEVICE, dtype)
    with torch.no_grad():
        losses(model, 2, adapter_ids=["new", "new"])()
    loss.backward()
    check({key: p.grad for key, p in parameters.items() if p.grad is not None}, expected, dtype)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_no_more_is_rounded_than_by_peft(adapters, device):
    """Compared with float64, a layer in bfloat16 has no larger error than PEFT's."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(192, 160, bias=False)), config, "a").to(device, torch.bfloat16)
    for parameter in (each for key, each in model.named_parameters() if "lora_" in key):
        parameter.data = parameter.data.to(adapters)
    x, grad = (torch.randn(4, 33, size, device=device, dtype=torch.bfloat16) for size in (192, 160))

    def run(model, dtype, **ids):
        own = x.to(dtype, copy=True).requires_grad_()
        y = model(own, **ids)
        y.backward(grad.to(dtype))
        weights = [each for each in model.parameters() if each.requires_grad]
        found = [each.detach().clone() for each in (y, own.grad, *(each.grad for each in weights))]
        model.zero_grad()
        return found

    exact, theirs = run(copy.deepcopy(model).double(), torch.float64), run(model, torch.bfloat16)
    peft_multibatch.enable(model, backend="triton" if device == "cuda" else "torch")
    ours = run(model, torch.bfloat16, adapter_ids=["a"] * 4)
    assert len(ours) == 4
    for actual, expected, want in zip(ours, theirs, exact):
        assert relative_error(actual, want) < 1.1 * relative_error(expected, want) + RELATIVE_ERROR[torch.float32]
