"""Fused projections, and projections that turn out not to be siblings."""

from __future__ import annotations

import copy

import pytest
import torch
from models import left_padded, peft_model, row_by_row
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tolerances import assert_close
from torch import nn

import peft_multibatch
from peft_multibatch import ops


NAMES = ["three", "eight", "__base__", "four", "three", "eight"]


def count_calls(monkeypatch):
    calls = []
    original = ops.torch_backend.apply_

    def counting(ys, x, segments, weights):
        calls.append(len(ys))
        return original(ys, x, segments, weights)

    monkeypatch.setattr(ops.torch_backend, "apply_", counting)
    return calls


@pytest.mark.parametrize("fuse", [True, False])
def test_one_op_for_qkv_and_one_for_gate_and_up(monkeypatch, fuse):
    calls = count_calls(monkeypatch)
    model = peft_model()
    mb = peft_multibatch.enable(model, fuse=fuse)
    with torch.no_grad():
        model(**left_padded(), adapter_ids=NAMES)
    assert calls == ([3, 1, 2, 1] if fuse else [1] * 7) * 2
    hows = {entry.how for entry in mb.report()}
    assert hows == ({"fused q_proj/k_proj/v_proj", "fused gate_proj/up_proj", "segmented"} if fuse else {"segmented"})


def test_a_group_of_two_slices_where_no_adapter_has_k():
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(peft_model().unload(), config, "qv").eval()
    mb = peft_multibatch.enable(model)
    assert [entry.how for entry in mb.report()] == ["fused q_proj/v_proj"] * 4


class Attention(nn.Module):
    """Projections named like siblings; k and v can get another tensor than q."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, other=None, order="qkv"):
        other = x if other is None else other
        return torch.cat([getattr(self, f"{name}_proj")(x if name == "q" else other) for name in order], dim=-1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.cross_attn = Attention()

    def forward(self, x, which="attn", **options):
        return getattr(self, which)(x, **options)


def attention_model():
    shared = {"target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}
    model = get_peft_model(Model(), LoraConfig(r=4, **shared), "three")
    model.add_adapter("eight", LoraConfig(r=8, **shared))
    model.add_adapter("four", LoraConfig(r=2, **{**shared, "target_modules": ["v_proj"]}))
    return model.eval()


def test_cross_attention_is_not_fused():
    report = peft_multibatch.enable(attention_model()).report()
    assert {entry.how for entry in report if entry.name.startswith("cross_attn")} == {"segmented"}
    assert {entry.how for entry in report if entry.name.startswith("attn")} == {"fused q_proj/k_proj/v_proj"}


@torch.no_grad()
@pytest.mark.parametrize("order", ["qkv", "vkq", "q", "kq", "qkvqkv"])
@pytest.mark.parametrize("different", [False, True], ids=["same tensor", "another tensor for k and v"])
def test_any_order_and_any_input_is_right(order, different):
    model, x, other = attention_model(), torch.randn(6, 3, 8), torch.randn(6, 3, 8)

    def call(row):
        return model(row["x"], other=row["other"] if different else None, order=order)

    expected = torch.cat(row_by_row(model, NAMES, {"x": x, "other": other}, call))
    mb = peft_multibatch.enable(model)
    for _ in range(2):
        with mb.batch(NAMES):
            assert_close(call({"x": x, "other": other}), expected)
    if different and order == "qkv":
        reason = "not fused, because its projections read different tensors"
        assert [entry.reason for entry in mb.report() if entry.name.startswith("attn")] == [reason] * 3


@torch.no_grad()
def test_nothing_of_a_call_is_kept_after_it():
    model, x = attention_model(), torch.randn(6, 3, 8)
    mb = peft_multibatch.enable(model)
    with mb.batch(NAMES):
        model(x, order="q")  # k and v were computed in vain
    assert mb._router.active() is None
    assert mb._router.graph.sibling_outputs == {}


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**left_padded(), **kwargs).logits


def base_weights(model):
    return {name: p for name, p in model.named_parameters() if "base_layer" in name}


def test_base_weights_side_by_side():
    model = peft_model("qwen2")  # its q/k/v have biases
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    identities = {name: id(p) for name, p in model.named_parameters()}
    plain, expected = (
        logits(model),
        torch.cat(row_by_row(model, NAMES, left_padded(), lambda row: logits_of(model, row))),
    )
    mb = peft_multibatch.enable(model, fuse="weights")
    labels = {entry.how for entry in mb.report()}
    assert "fused with base weights q_proj/k_proj/v_proj" in labels
    assert "fused with base weights gate_proj/up_proj" in labels
    assert_close(logits(model, adapter_ids=NAMES), expected)
    assert torch.equal(logits(model), plain)
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    q, k = (base_weights(model)[f"base_model.model.model.layers.0.self_attn.{x}_proj.base_layer.weight"] for x in "qk")
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    mb.disable()
    storages = [p.untyped_storage().data_ptr() for p in base_weights(model).values()]
    assert len(set(storages)) == len(storages)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), plain)


def logits_of(model, row):
    with torch.no_grad():
        return model(**row).logits


def test_saving_with_base_weights_side_by_side(tmp_path):
    model = peft_model()
    plain = peft_model().get_base_model()
    peft_multibatch.enable(model, fuse="weights")
    model.save_pretrained(tmp_path / "adapters")
    model.get_base_model().save_pretrained(tmp_path / "base")
    plain.save_pretrained(tmp_path / "plain")
    saved, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "plain"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    copied = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), model.parameters()))


def test_base_weights_of_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = peft_model()
        expected = torch.cat(row_by_row(model, NAMES, left_padded(), lambda row: model(**row).logits))
        mb = peft_multibatch.enable(model, fuse="weights")
        assert_close(model(**left_padded(), adapter_ids=NAMES).logits, expected)
        mb.disable()
        again = torch.cat(row_by_row(model, NAMES, left_padded(), lambda row: model(**row).logits))
    assert torch.equal(again, expected)


def transpose(weight):
    weight.data = weight.data.t()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: setattr(attention(model).k_proj.base_layer, "weight", torch.nn.Parameter(torch.randn(24, 48))),
        lambda model: attention(model).k_proj.base_layer.register_forward_hook(lambda *args: None),
        lambda model: transpose(attention(model).q_proj.base_layer.weight),
    ],
    ids=["double", "replaced", "hooked", "transposed"],
)
def test_base_weights_that_change_places_run_apart(change):
    model = peft_model()
    mb = peft_multibatch.enable(model, fuse="weights")
    logits(model, adapter_ids=NAMES)
    change(model)
    expected = torch.cat(row_by_row(model, NAMES, left_padded(), lambda row: logits_of(model, row)))
    assert_close(logits(model, adapter_ids=NAMES), expected, torch.float32)
    apart = {entry.reason for entry in mb.report() if entry.name.endswith("0.self_attn.k_proj")}
    assert apart == {"base weights not fused: they were moved, replaced or hooked"}


def attention(model):
    return model.base_model.model.model.layers[0].self_attn


def test_in_place_changes_and_merging_reach_base_weights_side_by_side():
    model = peft_model()
    peft_multibatch.enable(model, fuse="weights")
    logits(model, adapter_ids=NAMES)
    attention(model).k_proj.base_layer.weight.data.mul_(2)
    model.merge_adapter(["eight"])
    model.unmerge_adapter()
    expected = torch.cat(row_by_row(model, NAMES, left_padded(), lambda row: logits_of(model, row)))
    assert_close(logits(model, adapter_ids=NAMES), expected)


def test_gradients_with_base_weights_side_by_side():
    def gradients(model, **kwargs):
        parameters = [p for p in model.parameters() if p.requires_grad]
        loss = model(**left_padded(), **kwargs).logits.square().mean()
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters, materialize_grads=True)])

    for train_base in (False, True):
        results = []
        for fuse in (False, "weights"):
            model = peft_model()
            model.set_requires_grad(["three", "four", "eight"])
            for parameter in base_weights(model).values():
                parameter.requires_grad_(train_base)
            peft_multibatch.enable(model, fuse=fuse)
            results.append(gradients(model, adapter_ids=NAMES))
        assert_close(*results)


def test_an_unknown_way_to_fuse():
    with pytest.raises(peft_multibatch.UnsupportedError, match="fuse='all': expected True, False or 'weights'"):
        peft_multibatch.enable(peft_model(), fuse="all")
