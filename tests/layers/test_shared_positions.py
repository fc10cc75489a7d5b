"""Layers that see one row of positions for all samples, in known and unknown models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from models import alone, row_by_row
from peft import LoraConfig, get_peft_model
from tolerances import assert_close
from torch import nn

import peft_multibatch
from peft_multibatch import errors


MIXES = [["one", "two", "__base__", "two"], ["two", "two", "one", "one"], ["two"] * 4, ["__base__"] * 4]
QUERY = {"query_proj", "key_proj", "value_proj"}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0, "position_biased_input": False}
TEXT |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
BUCKETS = {"position_buckets": 8, "norm_rel_ebd": "layer_norm"}
SOUND = {
    **SIZES, "conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "vocab_size": 20,
}  # fmt: skip
SEW = {**BUCKETS, "max_position_embeddings": 32, "share_att_key": True}
CONFORMER = {"position_embeddings_type": "relative", "conv_depthwise_kernel_size": 3}
IMAGES = {"image_size": 16, "embed_dim": 8, "window_size": 4}


def tokens():
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[1, 4:] = mask[2, 3:] = 0
    return {"input_ids": torch.randint(3, 40, (4, 6)), "attention_mask": mask}


def waves():
    return {"input_values": torch.randn(4, 400)}


def images():
    return {"pixel_values": torch.randn(4, 3, 16, 16)}


# name: (model, its configuration, target modules or None for all linear layers, inputs)
MODELS = {
    "DeBERTa": ("Deberta", TEXT, {"in_proj"}, tokens),
    "DeBERTa, all": ("Deberta", TEXT, None, tokens),
    "DeBERTa-v2": ("DebertaV2", TEXT | BUCKETS, QUERY, tokens),
    "DeBERTa-v2, all": ("DebertaV2", TEXT | BUCKETS, None, tokens),
    "DeBERTa-v3": ("DebertaV2", TEXT | BUCKETS | {"share_att_key": True}, QUERY, tokens),
    "DeBERTa-v3, all": ("DebertaV2", TEXT | BUCKETS | {"share_att_key": True, "conv_kernel_size": 3}, None, tokens),
    "SEW-D": ("SEWD", SOUND | SEW, None, waves),
    "SwinV2": ("Swinv2", IMAGES | {"patch_size": 2, "depths": [2, 1], "num_heads": [2, 2]}, None, images),
    "Swin2SR": ("Swin2SR", IMAGES | {"patch_size": 1, "depths": [2], "num_heads": [2]}, None, images),
    "Wav2Vec2-Conformer": ("Wav2Vec2Conformer", SOUND | CONFORMER, None, waves),
    "Wav2Vec2-BERT": ("Wav2Vec2Bert", SIZES | CONFORMER | {"feature_projection_input_dim": 10, "vocab_size": 20}, None,
                      lambda: {"input_features": torch.randn(4, 12, 10)}),
}  # fmt: skip


def build(kind):
    name, options, targets, inputs = MODELS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)  # makes positions matter
    targets = targets or [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    shared = {"target_modules": targets, "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(r=2, **shared), "one")
    model.add_adapter("two", LoraConfig(r=3, **shared))
    return model.eval(), inputs()


def hidden(model, inputs, **ids):
    return model(**inputs, **ids)[0]


@pytest.mark.parametrize("kind", MODELS)
def test_models(kind):
    model, inputs = build(kind)
    with torch.no_grad():
        rows = [row_by_row(model, mix, inputs, lambda row: hidden(model, row)) for mix in MIXES]
        first, second = (alone(model, name, lambda: hidden(model, inputs)) for name in ("one", "two"))
        assert not torch.allclose(first, second, atol=1e-3)
        mb = peft_multibatch.enable(model)
        for mix, expected in zip(MIXES, rows):
            assert_close(hidden(model, inputs, adapter_ids=mix), torch.cat(expected))
        plain = hidden(model, inputs)
        mb.disable()
        assert torch.equal(hidden(model, inputs), plain)
    assert not [key for module in model.modules() for key in ("_multibatch", "forward") if key in module.__dict__]


@pytest.mark.parametrize("kind", ["DeBERTa-v3", "SwinV2"])
def test_gradients(kind):
    model, inputs = build(kind)
    model.set_requires_grad(["one", "two"])  # the loss uses cubes, because the sum of squares after a norm is constant
    weights = [parameter for key, parameter in model.named_parameters() if "lora_" in key]
    mix = MIXES[0]

    def one_at_a_time():
        losses = []
        for row, name in enumerate(mix):
            own = {key: value[row : row + 1] for key, value in inputs.items()}
            losses.append(alone(model, name, lambda own=own: hidden(model, own)).pow(3).sum())
            model.set_requires_grad(["one", "two"])
        return sum(losses)

    expected = torch.autograd.grad(one_at_a_time(), weights)
    peft_multibatch.enable(model)
    model.set_requires_grad(["one", "two"])
    actual = torch.autograd.grad(hidden(model, inputs, adapter_ids=mix).pow(3).sum(), weights)
    total = torch.cat([each.flatten() for each in expected])
    assert_close(torch.cat([each.flatten() for each in actual]), total)


def test_mixtures_of_adapters_see_positions_too():
    model, inputs = build("DeBERTa-v3")
    model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "both", combination_type="cat")
    model.eval()
    with torch.no_grad():
        names = ["both", "one", "__base__", "both"]
        expected = torch.cat(row_by_row(model, names, inputs, lambda row: hidden(model, row)))
        peft_multibatch.enable(model)
        mixture = {"one": 0.7, "two": 0.3}
        assert_close(hidden(model, inputs, adapter_ids=[mixture, "one", "__base__", mixture]), expected)


def test_an_error_inside_leaves_nothing_behind(monkeypatch):
    model, inputs = build("DeBERTa-v3")
    mb = peft_multibatch.enable(model)
    right = hidden(model, inputs, adapter_ids=MIXES[0])
    plain = hidden(model, inputs)
    layer = model.base_model.model.encoder.layer[1].attention.self.key_proj.base_layer

    def fail(*args):
        raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        hidden(model, inputs, adapter_ids=MIXES[0])
    handle.remove()
    assert torch.equal(hidden(model, inputs), plain)
    assert_close(hidden(model, inputs, adapter_ids=MIXES[0]), right)
    assert mb.adapter_names == ["one", "two"]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_plain(copied):
    model, inputs = build("DeBERTa-v3")
    mb = peft_multibatch.enable(model)
    other = copied(model.get_base_model())
    with torch.no_grad(), mb.batch(MIXES[0]):
        expected = other(**inputs)[0]
    with torch.no_grad():
        assert torch.equal(expected, model(**inputs)[0])


class Positions(nn.Module):
    """A custom attention; it isn't known where its positions meet samples."""

    def __init__(self, shared):
        super().__init__()
        self.linear, self.positions = nn.Linear(6, 6), nn.Linear(6, 6)
        self.table = nn.Buffer(torch.randn(*shared, 6))

    def forward(self, x, shared=True):
        table = self.table if shared else self.table * 1
        return self.linear(x) + self.positions(table).mean(0)


@pytest.mark.parametrize("shared", [True, False], ids=["of the model", "created again"])
@pytest.mark.parametrize("shape", [(1, 3), (3,), (5, 3)], ids=str)
def test_other_models_are_refused_by_the_layers_name_unless_all_samples_have_one_adapter(shape, shared):
    config = {"target_modules": ["linear", "positions"], "init_lora_weights": False}
    model = get_peft_model(Positions(shape), LoraConfig(r=2, **config), "one")
    model.add_adapter("two", LoraConfig(r=2, **config))
    model.eval()
    x = torch.randn(4, 3, 6)
    expected = alone(model, "two", lambda: model(x, shared))
    peft_multibatch.enable(model)
    assert_close(model(x, shared, adapter_ids=["two"] * 4), expected)
    with pytest.raises(errors.RowMappingError, match=r"^positions .*: expected .* out of target_modules, or give all"):
        model(x, shared, adapter_ids=MIXES[0])
    assert_close(model(x, shared, adapter_ids=["two"] * 4), expected)
