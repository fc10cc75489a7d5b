"""Regression tests from a review that tried to break adapter reading, checkpointing and copies."""

from __future__ import annotations

import asyncio
import copy

import peft
import pytest
import torch
from models import base_model, left_padded, lora_configs, peft_model, row_by_row
from peft import LoraConfig, get_peft_model
from tolerances import assert_close
from torch import nn
from torch.nn.utils import prune

import peft_multibatch
from peft_multibatch import errors


NAMES = ["three", "__base__", "four", "eight", "three", "four"]


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**left_padded(), **kwargs).logits


def expected(model, names=NAMES):
    with torch.no_grad():
        return torch.cat(row_by_row(model, names, left_padded(), lambda row: model(**row).logits))


def lora_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]


def gradients(model, **kwargs):
    model.zero_grad()
    model(**left_padded(), use_cache=False, adapter_ids=NAMES, **kwargs).logits.square().mean().backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_dora_under_gradient_checkpointing(reentrant):
    found = []
    for checkpoint in (False, True):
        model = peft_model()
        config = lora_configs()["eight"]
        config.use_dora = True
        model.add_adapter("dora", config)
        model.set_requires_grad(["three", "dora"])
        model.train()
        if checkpoint:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        peft_multibatch.enable(model)
        names = [name.replace("eight", "dora") for name in NAMES]
        model(**left_padded(), use_cache=False, adapter_ids=names).logits.square().mean().backward()
        found.append({key: p.grad for key, p in model.named_parameters() if "lora_" in key and p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any("magnitude" in key for key in found[0])
    for key in found[0]:
        assert_close(found[1][key], found[0][key])


def test_gradients_reach_the_parameters_that_the_model_has_now():
    model = peft_model()
    model.set_requires_grad(["three", "four", "eight"])
    peft_multibatch.enable(model)
    before = gradients(model)
    model.load_state_dict(model.state_dict(), assign=True)  # different parameters at the same addresses
    model.set_requires_grad(["three", "four", "eight"])
    after = gradients(model)
    assert after.keys() == before.keys()
    for key in after:
        assert_close(after[key], before[key])


def test_checkpointed_layers_in_a_model_that_does_not_train_itself():
    results = []
    for checkpoint in (False, True):
        model = peft_model()
        model.set_requires_grad(["three", "four", "eight"])
        peft_multibatch.enable(model)
        model.enable_input_require_grads()
        model.base_model.model.model.layers.train()
        if checkpoint:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
        results.append(gradients(model))
    assert results[0].keys() == results[1].keys()
    for key in results[0]:
        assert_close(results[1][key], results[0][key])


def test_backward_after_disable_is_refused():
    model = peft_model()
    model.set_requires_grad(["three"])
    model.train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    mb = peft_multibatch.enable(model)
    loss = model(**left_padded(), use_cache=False, adapter_ids=NAMES).logits.mean()
    mb.disable()
    with pytest.raises(errors.NotEnabledError, match="Call backward first"):
        loss.backward()


def triple_scaling(layer):
    layer.scaling = {name: 3 * value for name, value in layer.scaling.items()}


def replace_dictionary(layer):
    layer.lora_A = copy.deepcopy(layer.lora_A)
    for module in layer.lora_A.values():
        module.weight.data.mul_(3)


@pytest.mark.parametrize("change", [triple_scaling, replace_dictionary])
def test_dictionaries_of_a_layer_that_are_replaced_are_read_anew(change):
    model = peft_model()
    peft_multibatch.enable(model)
    before = logits(model, adapter_ids=NAMES)
    for layer in lora_layers(model):
        change(layer)
    after = logits(model, adapter_ids=NAMES)
    assert not torch.allclose(before, after)
    assert_close(after, expected(model))


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_an_adapter_that_comes_back_with_a_bias_is_not_run_without_it():
    model = peft_model()
    peft_multibatch.enable(model)
    logits(model, adapter_ids=NAMES)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.update_layer("eight", r=2, lora_alpha=8, config=LoraConfig(lora_bias=True))
    with torch.no_grad():
        for half in (layer.lora_A["eight"].weight, layer.lora_B["eight"].weight, layer.lora_B["eight"].bias):
            half.normal_()
    assert_close(logits(model, adapter_ids=NAMES), expected(model))


def test_hooks_on_the_modules_of_an_adapter_run():
    model = peft_model()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["three"].register_forward_hook(lambda module, args, output: 3 * output)
    mb = peft_multibatch.enable(model)
    assert mb.report().adapters[0].reason == "runs per segment, because its lora_A has hooks"
    assert_close(logits(model, adapter_ids=NAMES), expected(model))


def test_pruned_adapters_run_per_segment():
    model = peft_model()
    peft_multibatch.enable(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    prune.random_unstructured(layer.lora_A["three"], "weight", 0.5)
    assert_close(logits(model, adapter_ids=NAMES), expected(model))


def test_base_weights_that_siblings_share_stay_apart():
    config = LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base_model(), config, "one").eval()
    attention = [layer.self_attn for layer in model.base_model.model.model.layers]
    for each in attention:
        each.k_proj.base_layer.weight = each.v_proj.base_layer.weight
    mb = peft_multibatch.enable(model, fuse="weights")
    names = ["one", "__base__"] * 3
    logits(model, adapter_ids=names)
    for each in attention:
        each.k_proj.base_layer.weight.data.mul_(2)
    assert_close(logits(model, adapter_ids=names), expected(model, names))
    assert "base weights not fused: layers share a parameter" in {entry.reason for entry in mb.report()}


def test_siblings_whose_input_is_written_in_place_between_them():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x.clone()
            q = self.q_proj(x)
            x.mul_(2)
            return q + self.k_proj(x)

    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(Attention()), config, "one").eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        wanted = torch.cat(row_by_row(model, ["one", "__base__"], {"x": x}, lambda row: model(row["x"])))
        peft_multibatch.enable(model)
        assert_close(model(x, adapter_ids=["one", "__base__"]), wanted)


def test_layers_that_are_called_by_themselves_see_changes_inside_a_block():
    model = peft_model()
    mb = peft_multibatch.enable(model)
    mlp, x = model.base_model.model.model.layers[0].mlp, torch.randn(6, 5, 48)
    with torch.no_grad(), mb.batch(NAMES):
        before = mlp(x)
        for layer in lora_layers(mlp):
            for name in layer.lora_A:
                layer.set_scale(name, 3.0)
        after = mlp(x)
        assert not torch.allclose(before, after)
        model.delete_adapter("eight")
        with pytest.raises(errors.UnknownAdapterError, match=r"was deleted inside an mb\.batch\(\) block"):
            mlp(x)


def test_a_task_that_outlives_its_block_has_no_ids():
    model = peft_model()
    mb = peft_multibatch.enable(model)

    async def late(ended):
        await ended.wait()
        return logits(model)

    async def main():
        ended = asyncio.Event()
        with mb.batch(NAMES):
            task = asyncio.create_task(late(ended))
            await asyncio.sleep(0)
        ended.set()
        return await task

    with pytest.raises(errors.ModelStateError, match="after that block had ended"):
        asyncio.run(main())


def test_a_task_that_outlives_its_block_may_pass_ids_of_its_own():
    model = peft_model()
    mb = peft_multibatch.enable(model)
    others = NAMES[::-1]
    want, tokens = (
        logits(model, adapter_ids=others),
        model.generate(**left_padded(), adapter_ids=others, max_new_tokens=2),
    )

    async def late(ended):
        await ended.wait()
        for _ in range(2):
            assert torch.equal(logits(model, adapter_ids=others), want)
            assert torch.equal(model.generate(**left_padded(), adapter_ids=others, max_new_tokens=2), tokens)
            with mb.batch(others):
                assert torch.equal(logits(model), want)
            with pytest.raises(errors.ModelStateError, match="after that block had ended"):
                logits(model)

    async def main():
        ended = asyncio.Event()
        with mb.batch(NAMES):
            task = asyncio.create_task(late(ended))
            await asyncio.sleep(0)
        ended.set()
        return await task

    asyncio.run(main())


def test_a_copy_can_be_enabled_and_disabled():
    model = peft_model()
    plain = logits(model)
    peft_multibatch.enable(model)
    mixed = logits(model, adapter_ids=NAMES)
    copied = copy.deepcopy(model)
    mb = peft_multibatch.enable(copied)
    assert torch.equal(logits(copied), plain)
    assert torch.equal(logits(copied, adapter_ids=NAMES), mixed)
    mb.disable()
    assert torch.equal(logits(copied), plain)
    assert torch.equal(logits(model, adapter_ids=NAMES), mixed)
