"""Inputs and outputs of layers, above all heads, that aren't one tensor with a row per sample."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import row_by_row
from peft import LoraConfig, get_peft_model
from tolerances import assert_close
from torch import nn
from torch.utils import _pytree as pytree

import peft_multibatch
from peft_multibatch import errors


MIXES = [
    ["one", "one", "two", "two"],
    ["one", "two", "one", "two"],
    ["two", "__base__", "one", "two"],
    ["two", "one", "__base__", "none"],
    ["one"] * 4,
]


class Model(nn.Module):
    """A layer with LoRA, and a head with a copy per adapter."""

    def __init__(self, head, call=None):
        super().__init__()
        self.linear, self.head = nn.Linear(6, 6), head
        self.call = call or (lambda head, x: head(x))

    def forward(self, x):
        return self.call(self.head, self.linear(x))


class Head(nn.Module):
    """A linear layer with arbitrary conversions of its inputs and outputs."""

    def __init__(self, after=None, before=None, outputs=5):
        super().__init__()
        self.inner = nn.Linear(6, outputs)
        self.after, self.before = after or (lambda y: y), before or (lambda x: x)

    def forward(self, *args, **kwargs):
        return self.after(self.inner(self.before(*args, **kwargs)))


def build(head, call=None):
    shared = {"target_modules": ["linear"], "init_lora_weights": False}
    model = get_peft_model(Model(head, call), LoraConfig(r=2, modules_to_save=["head"], **shared), "one")
    model.add_adapter("two", LoraConfig(r=3, modules_to_save=["head"], **shared))
    model.add_adapter("none", LoraConfig(r=3, **shared))
    for copy in model.base_model.model.head.modules_to_save.values():
        for parameter in copy.parameters():
            nn.init.normal_(parameter)
    return model.eval()


def check(model, mix, dims=0):
    x = torch.randn(4, 3, 6)
    rows = [pytree.tree_flatten(row) for row in row_by_row(model, mix, {"x": x}, lambda row: model(row["x"]))]
    peft_multibatch.enable(model)
    actual, spec = pytree.tree_flatten(model(x, adapter_ids=mix))
    assert spec == rows[0][1]
    for mine, *theirs in zip(actual, *(leaves for leaves, _ in rows)):
        if isinstance(mine, torch.Tensor):
            assert_close(mine, torch.cat(theirs))
        else:
            assert [mine] * len(mix) == theirs


OUTPUTS = {
    "flattened tokens": lambda y: y.flatten(0, 1),
    "pooled": lambda y: y.mean(1),
    "a tuple": lambda y: (y, y[:, 0]),
    "a list": lambda y: [y.flatten(0, 1), y, None],
    "a dictionary": lambda y: {"tokens": y.flatten(0, 2), "pooled": y.sum(1), "kind": "logits", "inner": (y, 3)},
    "a ModelOutput": lambda y: transformers.modeling_outputs.BaseModelOutput(y.flatten(0, 1), (y, y[:, 1])),
}


@pytest.mark.parametrize("mix", MIXES, ids=",".join)
@pytest.mark.parametrize("after", OUTPUTS.values(), ids=OUTPUTS)
def test_outputs(after, mix):
    """Ids are interleaved too, and each output may have a different number of rows."""
    check(build(Head(after)), mix)


def fewer_rows(y):
    return y.flatten(0, 1)[:1]


OTHER_OUTPUTS = {
    "samples in dimension 1": lambda y: y.transpose(0, 1),
    "layers in dimension 0": lambda y: torch.stack([y, y]),
    "samples in dimension 1 of one of them": lambda y: (y, y.transpose(0, 1)),
    "a number of rows of its own": fewer_rows,
    "a loss": lambda y: y.square().mean(),
    "a loss beside": lambda y: {"loss": y.square().mean(), "logits": y},
    "experts' usage": lambda y: (y, y.flatten(0, 1).sum(0)),
    "a number of its own": lambda y: (y, y.shape[0] + float(y.detach().sum())),
    "a set": lambda y: {y.shape[0]},
}


@pytest.mark.parametrize("mix", MIXES[:4], ids=",".join)
@pytest.mark.parametrize("after", OTHER_OUTPUTS.values(), ids=OTHER_OUTPUTS)
def test_outputs_whose_rows_are_no_samples_are_refused(after, mix):
    model = build(Head(after))
    peft_multibatch.enable(model)
    with pytest.raises(
        (errors.RowMappingError, errors.UnsupportedError), match=r"^head returned .*: expected .*Remove"
    ):
        model(torch.randn(4, 2, 6), adapter_ids=mix)


def test_other_outputs_are_right_where_all_samples_have_one_adapter():
    model, x = build(Head(lambda y: (y.transpose(0, 1), y.sum()))), torch.randn(4, 2, 6)
    model.set_adapter("two")
    expected = model(x)
    model.set_adapter("one")
    peft_multibatch.enable(model)
    for mine, theirs in zip(model(x, adapter_ids=["two"] * 4), expected):
        assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["other numbers of rows", "other kinds"])
def test_adapters_that_return_something_else_than_others(kind):
    model = build(Head())
    copies = model.base_model.model.head.modules_to_save
    copies["two"].after = {"other numbers of rows": lambda y: y[:, 0].repeat(2, 1), "other kinds": lambda y: (y,)}[
        kind
    ]
    peft_multibatch.enable(model)
    x = torch.randn(4, 3, 6)
    with pytest.raises(
        errors.MultibatchError, match=r"^head returned .* under 'one', .* under 'two': expected the same"
    ):
        model(x, adapter_ids=["one", "two", "one", "one"])
    check_plain = model(x)
    assert_close(model(x, adapter_ids=["one"] * 4), check_plain)


def test_heads_with_different_numbers_of_labels():
    model = build(Head())
    copies = model.base_model.model.head.modules_to_save
    copies["two"].inner = nn.Linear(6, 3)
    mb = peft_multibatch.enable(model)
    x = torch.randn(4, 6)
    with pytest.raises(errors.UnsupportedError) as caught:
        model(x, adapter_ids=["one", "two", "__base__", "two"])
    assert str(caught.value) == (
        "head returned rows of different sizes, 5 under 'one', no adapter, 3 under 'two', which don't fit into one "
        "tensor: expected adapters of equal output sizes, such as heads with the same number of labels. Batch only "
        "adapters of one size together, or give all heads the size of the largest one."
    )
    mb.disable()
    check(model, ["two"] * 4)
    check(model, ["one", "none", "one", "__base__"])


CALLS = {
    "a tuple": (lambda head, x: head((x, 2 * x)), lambda pair: pair[0] + pair[1]),
    "a list": (lambda head, x: head([x, x[:, 0]]), lambda pair: pair[0] + pair[1][:, None]),
    "a dictionary": (lambda head, x: head({"a": x, "b": {"c": x}}), lambda both: both["a"] * both["b"]["c"]),
    "by keyword": (lambda head, x: head(hidden=x), lambda hidden: hidden),
    "by keyword, not first": (lambda head, x: head(scale=2.0, hidden=x), lambda scale, hidden: scale * hidden),
    "a mask for all samples": (lambda head, x: head(x, torch.ones(1, 3, 1)), lambda x, mask: x * mask),
    "a mask for all samples first": (lambda head, x: head(torch.ones(1, 3, 1), x), lambda mask, x: x * mask),
    "a mask of each sample": (lambda head, x: head(x, mask=x[..., 0] > 0), lambda x, mask: x * mask[..., None]),
    "None and settings": (
        lambda head, x: head(x, None, scale=2, shape=(1, 2, 3, 4)),
        lambda x, *_, **k: x * k["scale"],
    ),
    "a number in a tensor": (lambda head, x: head(x, torch.tensor(2.0)), lambda x, scale: x * scale),
}


@pytest.mark.parametrize("mix", MIXES, ids=",".join)
@pytest.mark.parametrize(("call", "before"), CALLS.values(), ids=CALLS)
def test_inputs(call, before, mix):
    check(build(Head(before=before), call), mix)


OTHER_CALLS = {
    "positions": (lambda head, x: head(x, torch.ones(3, 3)), r"shapes \[4, 3, 6\] and \[3, 3\]"),
    "an object": (lambda head, x: head(x, object()), "called with a object, which can't be split"),
    "one value for every sample": (lambda head, x: head(x, [1, 2, 3, 4]), "called with a list of 4 values"),
    "no tensor": (lambda head, x: head(5), "called only with the model's own parameters"),
}


@pytest.mark.parametrize(("call", "message"), OTHER_CALLS.values(), ids=OTHER_CALLS)
def test_inputs_that_can_not_be_split_are_refused(call, message):
    model = build(Head(before=lambda x, *_: x), call)
    peft_multibatch.enable(model)
    kinds = errors.UnsupportedError, errors.RowMappingError
    with pytest.raises(kinds, match=f"^head was .*{message}.*: expected"):
        model(torch.randn(4, 3, 6), adapter_ids=MIXES[1])


def test_as_many_samples_as_positions():
    model = build(Head(before=lambda x, mask: x * mask[..., None]), lambda head, x: head(x, x[..., 0]))
    peft_multibatch.enable(model)
    with pytest.raises(errors.UnsupportedError, match="dimension 0 of the second could be samples or positions"):
        model(torch.randn(4, 4, 6), adapter_ids=MIXES[1])


class Biased(nn.Module):
    """Passes an additional tensor to its head, as routers get the bias of their experts."""

    def __init__(self, kind):
        super().__init__()
        self.linear, self.head = nn.Linear(6, 6), Head(before=lambda x, bias: x + bias)
        self.bias = kind(torch.randn(6))

    def forward(self, x):
        return self.head(self.linear(x), self.bias)


@pytest.mark.parametrize("kind", [nn.Parameter, nn.Buffer])
def test_tensors_of_the_model_are_the_same_for_all_samples(kind):
    """Even if they are as long as there are samples."""
    model = get_peft_model(Biased(kind), LoraConfig(target_modules=["linear"], modules_to_save=["head"]), "one")
    nn.init.normal_(model.base_model.model.head.modules_to_save["one"].inner.weight)
    names, x = ["one", "__base__", "one", "one", "__base__", "one"], torch.randn(6, 6)
    expected = torch.cat(row_by_row(model, names, {"x": x}, lambda row: model(row["x"])))
    peft_multibatch.enable(model)
    assert_close(model(x, adapter_ids=names), expected)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_a_head_that_flattens_tokens(training):
    model = build(Head(lambda y: (y.flatten(0, 1), y.mean(1)))).train(training)
    model.set_requires_grad(["one", "two"])
    weights = [p for p in model.parameters() if p.requires_grad]
    x, mix = torch.randn(4, 3, 6), ["one", "two", "one", "two"]

    def gradients(run):
        return torch.autograd.grad(sum(y.square().sum() for y in run()), weights, allow_unused=True)

    def one_at_a_time():
        outputs = []
        for row, name in enumerate(mix):
            model.set_adapter(name)
            outputs += model(x[row : row + 1])
            model.set_requires_grad(["one", "two"])
        return outputs

    expected = gradients(one_at_a_time)
    peft_multibatch.enable(model)
    actual = gradients(lambda: model(x, adapter_ids=mix))
    for mine, theirs in zip(actual, expected):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert_close(mine, theirs)


@pytest.mark.parametrize("layer", ["linear", "embedding"])
def test_a_layer_called_by_another_name_than_pefts_is_named(layer):
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.embedding = nn.Linear(6, 6), nn.Embedding(6, 6)

        def forward(self, x, name):
            return getattr(self, layer)(**{name: x})

    config = LoraConfig(r=2, target_modules=[layer], init_lora_weights=False)
    model = get_peft_model(ByName(), config, "one")
    x = torch.randint(0, 6, (4,)) if layer == "embedding" else torch.randn(4, 6)
    names = ["one", "__base__", "one", "one"]
    expected = torch.cat(row_by_row(model, names, {"x": x}, lambda row: model(row["x"], "x")))
    peft_multibatch.enable(model)
    assert_close(model(x, "x", adapter_ids=names), expected)
    with pytest.raises(
        errors.UnsupportedError, match=f"^{layer} was called with input by name: expected its input as"
    ):
        model(x, "input", adapter_ids=names)
    with pytest.raises(TypeError):  # as in PEFT
        model(x, "input")


def test_a_segmentation_head_that_takes_the_outputs_of_all_stages():
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8,
        num_labels=3,
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config)
    shared = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["decode_head"], "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(r=2, **shared), "one")
    model.add_adapter("two", LoraConfig(r=3, **shared))
    for key, parameter in model.named_parameters():
        if "modules_to_save" in key and parameter.dim() > 1:
            nn.init.normal_(parameter)
    model.eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for mix in (MIXES[1], MIXES[2]):
            rows = row_by_row(model, mix, {"pixel_values": x}, lambda row: model(**row).logits)
            mb = peft_multibatch.enable(model)
            assert_close(model(pixel_values=x, adapter_ids=mix).logits, torch.cat(rows))
            mb.disable()


@pytest.mark.filterwarnings("ignore::RuntimeWarning:peft")  # about patterns for experts that don't exist
@pytest.mark.parametrize("kind", ["DeepseekV3", "MiniMaxM2"])
def test_routers_that_flatten_tokens_or_take_a_bias(kind):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    own = {
        "DeepseekV3": {**latent, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8,
                       "first_k_dense_replace": 0, "num_key_value_heads": 2},
        "MiniMaxM2": {"num_local_experts": 4, "head_dim": 8, "num_key_value_heads": 1},
    }[kind]  # fmt: skip
    model_class = getattr(transformers, f"{kind}ForCausalLM")
    config = model_class.config_class(vocab_size=30, num_experts_per_tok=2, pad_token_id=0, **sizes, **own)
    model = get_peft_model(model_class(config), LoraConfig(r=2, target_modules="all-linear"), "one")
    model.add_adapter("two", LoraConfig(r=2, target_modules="all-linear"))
    for key, parameter in model.named_parameters():
        if "lora_" in key or "gate.weight" in key:
            nn.init.normal_(parameter, std=0.5)
    model.eval()
    names, ids = ["one", "two", "__base__", "two"], torch.randint(1, 30, (4, 6))
    with torch.no_grad():
        expected = torch.cat(row_by_row(model, names, {"x": ids}, lambda row: model(input_ids=row["x"]).logits))
        mb = peft_multibatch.enable(model)
        assert any(entry.name.endswith("gate") for entry in mb.report())
        assert_close(model(input_ids=ids, adapter_ids=names).logits, expected)


@pytest.mark.parametrize("rows", [3, 4])
@pytest.mark.parametrize(
    "kind", ["TokenClassification", "SpadeEEForTokenClassification", "SpadeELForTokenClassification"]
)
def test_samples_behind_tokens(kind, rows):
    """BROS compares tokens in `[tokens, samples, features]`, even if there are as many tokens as samples."""
    torch.manual_seed(0)
    kind = kind if "For" in kind else f"For{kind}"
    model = getattr(transformers, f"Bros{kind}")(
        transformers.BrosConfig(
            vocab_size=40, hidden_size=64, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32,
        )
    )  # fmt: skip
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    shared = {"target_modules": targets, "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(r=2, **shared), "one")
    model.add_adapter("two", LoraConfig(r=3, **shared))
    model.eval()
    inputs = {"input_ids": torch.randint(3, 40, (rows, 4 * (rows - 2))), "bbox": torch.rand(rows, 4 * (rows - 2), 4)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    names = ["one", "two", "__base__", "one"][:rows]
    with torch.no_grad():
        expected = row_by_row(model, names, inputs, lambda row: model(**row))
        mb = peft_multibatch.enable(model)
        assert any("samples are in dimension" in entry.reason for entry in mb.report())
        actual = model(**inputs, adapter_ids=names)
    for key, value in actual.items():
        theirs = torch.cat([each[key] for each in expected])
        masked = theirs < -1e4
        assert torch.equal(value < -1e4, masked)
        assert_close(value.masked_fill(masked, 0), theirs.masked_fill(masked, 0))


def modern_bert(target):
    config = transformers.ModernBertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        sparse_prediction=True, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    shared = {"target_modules": target, "init_lora_weights": False}
    model = get_peft_model(transformers.ModernBertForMaskedLM(config), LoraConfig(r=2, **shared), "one")
    model.add_adapter("two", LoraConfig(r=3, **shared))
    return model.eval()


@pytest.mark.parametrize("target", ["dense", "decoder"])
def test_layers_that_see_what_labels_select_are_refused(target):
    with pytest.raises(errors.UnsupportedError, match=rf"{target} sees only the tokens that have labels.* Set it to"):
        peft_multibatch.enable(modern_bert([target]))


def test_other_layers_of_a_model_whose_labels_select_tokens():
    model, ids = modern_bert(["Wqkv", "Wi"]), torch.randint(3, 40, (4, 6))
    labels = torch.where(torch.rand(4, 6) < 0.4, ids, -100)
    labels[:, 0] = 5
    inputs = {"input_ids": ids, "labels": labels}
    with torch.no_grad():
        expected = row_by_row(model, MIXES[2], inputs, lambda row: model(**row).logits)
        peft_multibatch.enable(model)
        assert_close(model(**inputs, adapter_ids=MIXES[2]).logits, torch.cat(expected))


@pytest.mark.parametrize("rows", [2, 3])
def test_samples_that_come_once_more_as_prompts(rows):
    config = transformers.SegGptConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=[16, 8], patch_size=4, mlp_dim=24,
        decoder_hidden_size=8, pretrain_image_size=8, merge_index=1, intermediate_hidden_state_indices=[1, 2],
    )  # fmt: skip
    model = transformers.SegGptForImageSegmentation(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    targets = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    shared = {"target_modules": targets, "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(r=2, **shared), "one")
    model.add_adapter("two", LoraConfig(r=3, **shared))
    model.eval()
    inputs = {key: torch.randn(rows, 3, 8, 8) for key in ("pixel_values", "prompt_pixel_values", "prompt_masks")}
    names = ["one", "two", "__base__"][:rows]
    with torch.no_grad():
        expected = torch.cat(row_by_row(model, names, inputs, lambda row: model(**row).pred_masks))
        peft_multibatch.enable(model)
        assert_close(model(**inputs, adapter_ids=names).pred_masks, expected)
