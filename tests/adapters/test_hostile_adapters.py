"""Direct changes to PEFT's adapter state, and layers inside layers."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from models import base_model, left_padded, row_by_row
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from tolerances import assert_close
from torch import nn
from transformers import OlmoConfig, OlmoForCausalLM

import peft_multibatch
from peft_multibatch import errors


INPUTS = left_padded(3, 6)
NAMES = ["a", "__base__", "b"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
]


def lora(*targets, **options):
    return LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **options)


def model_with(first, second, **options):
    model = get_peft_model(base_model(), first, "a", **options)
    model.add_adapter("b", second)
    for name, parameter in model.named_parameters():
        if "modules_to_save.a" in name or "trainable_tokens_delta" in name:
            parameter.data = torch.randn_like(parameter)
    return model.eval()


def logits(model, **ids):
    with torch.no_grad():
        return model(**INPUTS, **ids).logits


def check(model, names=NAMES):
    active = model.active_adapter
    with torch.no_grad():
        expected = torch.cat(row_by_row(model, names, INPUTS, lambda row: model(**row).logits))
    model.set_adapter(active)
    assert_close(logits(model, adapter_ids=names), expected)


def refused(model, *names):
    for name in names:
        with pytest.raises(errors.UnsupportedError):
            logits(model, adapter_ids=[name, "__base__", name])


def layer_of(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_train_and_eval_reach_what_runs_per_segment():
    def config():
        return LoKrConfig(r=4, target_modules=["q_proj"], rank_dropout=0.5, init_weights=False)

    model = model_with(config(), config()).train()
    peft_multibatch.enable(model)
    logits(model, adapter_ids=NAMES)
    model.eval()
    check(model)
    model = model_with(*[lora("q_proj", use_dora=True, lora_dropout=0.9) for _ in "ab"])
    peft_multibatch.enable(model)
    check(model)
    model.train()
    assert not torch.allclose(*(logits(model, adapter_ids=NAMES)[0] for _ in range(2)))
    model.eval()
    check(model)


def test_adapters_inside_a_module_that_another_one_copies():
    model = model_with(lora("q_proj", "gate_proj"), lora("q_proj"))
    peft_multibatch.enable(model)
    check(model)
    model.add_adapter("x", lora("q_proj", modules_to_save=["mlp"]))
    model.eval()
    check(model, ["b", "__base__", "b"])
    refused(model, "a", "x")
    model.delete_adapter("x")
    check(model, ["b", "__base__", "b"])


def test_two_tuners_on_one_layer():
    model = get_peft_model(base_model(), lora("q_proj"), "a", mixed=True)
    model.add_adapter("b", lora("v_proj"))
    model.eval()

    def alone(name, row):
        if name == "__base__":
            with model.disable_adapter():
                return model(**row).logits
        model.set_adapter(name)
        return model(**row).logits

    names = ["b", "__base__", "b"]
    with torch.no_grad():
        rows = [{key: value[row : row + 1] for key, value in INPUTS.items()} for row in range(3)]
        expected = torch.cat([alone(*each) for each in zip(names, rows)])
        model.set_adapter("a")
    peft_multibatch.enable(model)
    assert_close(logits(model, adapter_ids=names), expected)
    model.add_adapter("h", LoHaConfig(r=4, target_modules=["q_proj"], init_weights=False))
    model.eval()
    assert_close(logits(model, adapter_ids=names), expected)
    refused(model, "a", "h")


@pytest.mark.parametrize("active", ["a", "b"])
def test_trained_tokens_around_a_copy(active):
    model = model_with(lora("q_proj", modules_to_save=["embed_tokens"]), lora("q_proj"))
    peft_multibatch.enable(model)
    check(model)
    model.add_adapter("t", lora("q_proj", trainable_token_indices=[3, 5]))
    model.eval()
    model.set_adapter(active)
    check(model, ["b", "__base__", "b"])
    refused(model, "a", "t")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.att = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, inputs):
        return self.att(inputs, inputs, inputs, need_weights=False)[0]


def test_base_weights_that_change_under_an_attention_layer():
    model = get_peft_model(Attention(), lora("att"), "a")
    model.add_adapter("b", lora("att"))
    x = torch.randn(3, 5, 16)
    peft_multibatch.enable(model.eval())
    for _ in range(2):
        with torch.no_grad():
            expected = torch.cat(row_by_row(model, NAMES, {"inputs": x}, lambda row: model(**row)))
            assert_close(model(inputs=x, adapter_ids=NAMES), expected)
        model.load_state_dict({k: 3 * v for k, v in model.state_dict().items() if "base_layer.in" in k}, strict=False)


def other_base(model):
    layer_of(model).base_layer = nn.Linear(48, 48, bias=False)


def other_embedding(model):
    model.base_model.model.model.embed_tokens.base_layer = nn.Embedding(160, 48)


def other_copies(model):
    model.base_model.model.lm_head.modules_to_save = nn.ModuleDict({"a": nn.Linear(48, 160, bias=False)})


def other_embedding_weights(model):
    layer = model.base_model.model.model.embed_tokens
    layer.lora_embedding_A = nn.ParameterDict({"a": torch.randn(4, 160)})


def other_dropouts(model):
    layer_of(model).lora_dropout = nn.ModuleDict({"a": Doubled(48, 48), "b": nn.Identity()})


def dropout_forward(model):
    layer_of(model).lora_dropout["a"].forward = lambda x: x / 2


def other_class(model):
    layer_of(model).lora_A["a"].__class__ = Doubled


def vector_scaling(model):
    layer_of(model).scaling["a"] = torch.linspace(0, 1, 48)


def sparse(model):
    half = layer_of(model).lora_A["a"]
    half.weight = nn.Parameter(half.weight.detach().to_sparse(), requires_grad=False)


def magnitude_hook(model):
    layer_of(model).lora_magnitude_vector["a"].register_forward_hook(lambda module, args, output: 2 * output)


def other_magnitude(model):
    layer_of(model).lora_magnitude_vector["a"].weight = nn.Parameter(torch.rand(48) + 0.5)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (other_base, {"lora_bias": True}),
        (other_embedding, {"target_modules": ["q_proj", "embed_tokens"]}),
        (other_copies, {"modules_to_save": ["lm_head"]}),
        (other_embedding_weights, {"target_modules": ["q_proj", "embed_tokens"]}),
        (other_dropouts, {}),
        (dropout_forward, {}),
        (dropout_forward, {"lora_dropout": 0.5}),
        (other_class, {}),
        (vector_scaling, {}),
        (sparse, {}),
        (magnitude_hook, {"use_dora": True}),
        (other_magnitude, {"use_dora": True}),
    ],
    ids=lambda value: value.__name__ if callable(value) else " ".join(value),
)
def test_what_is_replaced_is_seen(change, options):
    model = model_with(
        LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False} | options), lora("q_proj")
    )
    mb = peft_multibatch.enable(model)
    check(model)
    before = logits(model, adapter_ids=NAMES)
    change(model)
    check(model)
    after = logits(model, adapter_ids=NAMES)
    assert torch.allclose(before[0], after[0], atol=1e-4) == (change is sparse)
    assert [adapter.state for adapter in mb.report().adapters] == ["ready", "ready"]


def test_an_adapter_that_cannot_be_read_is_broken_alone():
    model = model_with(lora("q_proj"), lora("q_proj"))
    mb = peft_multibatch.enable(model)
    names = ["b", "__base__", "b"]
    for scaling in (None, "x", float("nan")):
        layer_of(model).scaling["a"] = scaling
        with pytest.raises(errors.AdapterMismatchError, match="adapter 'a'"):
            logits(model, adapter_ids=NAMES)
        assert [adapter.state for adapter in mb.report().adapters] == ["broken", "ready"]
        layer_of(model).scaling["a"] = 1.0
        check(model)
    layer_of(model).lora_A["a"].weight = None
    with pytest.raises(errors.AdapterMismatchError, match="adapter 'a'"):
        logits(model, adapter_ids=NAMES)
    assert torch.isfinite(logits(model, adapter_ids=names)).all()


def test_a_forward_that_was_replaced_before_is_refused():
    model = model_with(lora("q_proj"), lora("v_proj"))
    layer = layer_of(model)
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)
    plain = logits(model)
    mb = peft_multibatch.enable(model)
    assert torch.equal(logits(model), plain)
    for names in (NAMES, ["b", "__base__", "b"]):
        with pytest.raises(errors.UnsupportedError, match=r"the forward of .*q_proj was replaced"):
            logits(model, adapter_ids=names)
    mb.disable()
    assert torch.equal(logits(model), plain)


def test_adapters_that_are_enabled_on_another_thread():
    model = model_with(lora("q_proj"), lora("q_proj"))
    peft_multibatch.enable(model)
    model.base_model.disable_adapter_layers()
    thread = threading.Thread(target=model.base_model.enable_adapter_layers)
    thread.start()
    thread.join()
    check(model)


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, inputs):
        x = inputs * 1.0
        y = self.q_proj(x) + self.k_proj(x)
        x.add_(1)
        return y + self.v_proj(x)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_an_input_that_is_written_between_siblings(context):
    model = get_peft_model(Siblings(), lora("q_proj", "k_proj", "v_proj"), "a")
    model.add_adapter("b", lora("q_proj", "k_proj", "v_proj"))
    peft_multibatch.enable(model.eval())
    with context():
        x = torch.randn(3, 2, 8)
        expected = torch.cat(row_by_row(model, NAMES, {"inputs": x}, lambda row: model(**row)))
        for _ in range(2):
            assert_close(model(inputs=x, adapter_ids=NAMES), expected)


def test_outputs_that_are_written_in_place_where_base_weights_are_one():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = OlmoConfig(vocab_size=160, clip_qkv=0.05, pad_token_id=0, **sizes)
    model = get_peft_model(OlmoForCausalLM(config), lora("q_proj", "k_proj", "v_proj"), "a")
    peft_multibatch.enable(model, fuse="weights")
    model(**INPUTS, adapter_ids=["a"] * 3).logits.sum().backward()


def test_blocks_that_end_in_the_order_in_which_they_began():
    model = model_with(lora("q_proj"), lora("q_proj"))
    plain, mb = logits(model), peft_multibatch.enable(model)

    def block():
        with mb.batch(NAMES):
            yield

    first, second = block(), block()
    next(first), next(second)
    with pytest.raises(errors.ModelStateError, match="left before a block that was entered later"):
        first.close()
    second.close()
    assert torch.equal(logits(model), plain)
    check(model)


def test_deleted_weights_are_let_go_of():
    model = model_with(lora("q_proj"), lora("q_proj"))
    peft_multibatch.enable(model)
    logits(model, adapter_ids=NAMES)
    kept = [weakref.ref(each.weight) for each in (layer_of(model).lora_A["b"], layer_of(model).lora_B["b"])]
    model.delete_adapter("b")
    logits(model, adapter_ids=["a"] * 3)
    gc.collect()
    assert [each() for each in kept] == [None, None]
