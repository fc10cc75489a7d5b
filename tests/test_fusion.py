"""Which projections run as one, and what happens where they turn out not to be siblings."""

from __future__ import annotations

import pytest
import torch
from models import left_padded, peft_model, row_by_row
from peft import LoraConfig, get_peft_model
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
    """Projections with the names of siblings; k and v may be given another tensor than q."""

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
        model(x, order="q")  # k and v were computed for nobody
    assert mb._router.call.get() is None
    assert mb._router.graph.stash == {}
