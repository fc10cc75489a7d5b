"""Single layers in mixed batches against PEFT, one adapter at a time: forward and gradients, fast and per segment."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from models import alone, left_padded, peft_model, row_by_row
from peft import LoraConfig, get_peft_model
from single_layers import build, make_input
from tolerances import assert_close, relative_error
from torch import nn

import peft_multibatch
from peft_multibatch.layers.table import PER_SEGMENT, SEGMENTED


NAMES = ["one", "two", "__base__", "two", "one"]


def oracle(model, layer, x):
    return torch.cat(row_by_row(model, NAMES, {"x": x}, lambda row: model(layer=layer, x=row["x"])))


def check(model, layer, x, how, dtype=None):
    expected = oracle(model, layer, x)
    base = alone(model, None, lambda: model(layer=layer, x=x))
    assert not torch.equal(expected, base)
    mb = peft_multibatch.enable(model)
    assert [entry.how for entry in mb.report()] == [how]
    actual = model(layer=layer, x=x, adapter_ids=NAMES)
    assert actual.dtype == expected.dtype
    # compares the delta too, because the base output could hide a wrong one
    assert_close(actual, expected, dtype)
    if dtype in (None, torch.float32):
        assert_close(actual - base, expected - base, dtype)
    if how == SEGMENTED:
        assert torch.equal(actual[2], base[2])
    return mb


@pytest.mark.parametrize("layer", ["embedding", "conv1d", "conv2d"])
def test_other_layers_run_peft_per_segment(layer):
    mb = check(build(layer), layer, make_input(layer), PER_SEGMENT)
    assert "runs PEFT's own code" in mb.report()[0].reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_bias": True}, "its lora_B has a bias"),
        ({"init_lora_weights": "mica"}, "it uses the variant MiCALinearVariant"),
    ],
    ids=["lora_bias", "MiCA"],
)
def test_adapters_that_are_more_than_two_products_run_peft_beside_the_others(options, reason):
    model = build(second=options)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(parameter)
    mb = check(model, "linear", make_input("linear"), SEGMENTED)
    plain, other = mb.report().adapters
    assert (plain.state, plain.reason) == ("ready", "")
    assert (other.state, other.reason) == ("ready", f"runs per segment, because {reason}")


def randomize(model):
    """Randomize weights, because DoRA's initial magnitudes change nothing, and PEFT initializes one matrix with
    zeros."""
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.rand_like(parameter) + 0.5 if "magnitude" in key else torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", [False, True], ids=["one of two adapters", "both"])
def test_dora(first, dtype):
    """The segmented product gets a factor per row, for batches with and without DoRA."""
    model = randomize(build(use_dora=first, second={"use_dora": True}, dtype=dtype))
    check(model, "linear", make_input("linear", dtype=dtype), SEGMENTED, dtype)


def test_dora_sees_changes_in_place():
    model, x = randomize(build(use_dora=True)), make_input("linear")
    peft_multibatch.enable(model)
    layer = model.base_model.model.linear
    for change in (
        lambda: layer.lora_magnitude_vector["one"].weight.data.mul_(2),
        lambda: layer.lora_B["two"].weight.data.mul_(3),
        lambda: layer.base_layer.weight.data.add_(0.5),
        lambda: layer.set_scale("one", 4.0),
    ):
        before = model(layer="linear", x=x, adapter_ids=NAMES)
        change()
        after = model(layer="linear", x=x, adapter_ids=NAMES)
        assert not torch.allclose(before, after)
        assert_close(after, oracle(model, "linear", x))


def test_variants_that_need_more_than_their_rows_are_refused(monkeypatch):
    monkeypatch.setattr("peft_multibatch.adapters.checks.CONTEXT_VARIANTS", ("ALora",))
    model = build(second={"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"})
    peft_multibatch.enable(model)
    x = make_input("linear")
    with pytest.raises(peft_multibatch.UnsupportedError, match="adapter 'two' uses the variant ALora"):
        model(layer="linear", x=x, adapter_ids=NAMES)
    names = ["one", "__base__", "one", "one", "one"]
    expected = torch.cat(row_by_row(model, names, {"x": x}, lambda row: model(layer="linear", x=row["x"])))
    assert_close(model(layer="linear", x=x, adapter_ids=names), expected)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}], ids=str)
def test_linear(options):
    check(build(**options), "linear", make_input("linear"), SEGMENTED)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adapters_of_another_dtype_than_the_base(dtype, adapter_dtype):
    coarsest = min(dtype, adapter_dtype, key=lambda each: torch.finfo(each).bits * 100 - torch.finfo(each).eps)
    model = build(dtype=dtype, adapter_dtype=adapter_dtype)
    check(model, "linear", make_input("linear", dtype=dtype), SEGMENTED, coarsest)


def test_every_adapter_may_have_a_dtype_of_its_own():
    model = build()
    model.base_model.model.linear.lora_A["two"].to(torch.bfloat16)
    model.base_model.model.linear.lora_B["two"].to(torch.bfloat16)
    x = make_input("linear")
    expected = oracle(model, "linear", x)
    peft_multibatch.enable(model)
    actual = model(layer="linear", x=x, adapter_ids=NAMES)
    first = torch.tensor([name == "one" for name in NAMES])
    assert_close(actual[first], expected[first], torch.float32)
    assert_close(actual[~first], expected[~first], torch.bfloat16)


def test_two_dimensional_input():
    check(build(), "linear", torch.randn(5, 12), SEGMENTED)


def test_rows_that_are_flattened_sample_by_sample():
    model, x = build(), torch.randn(5, 7, 12)
    expected = oracle(model, "linear", x)
    peft_multibatch.enable(model)
    flat = x.flatten(0, 1)
    with peft_multibatch.enable(model).batch(NAMES):
        actual = model.base_model.model.linear(flat)
    assert_close(actual, expected.flatten(0, 1))


def test_autocast():
    model, x = build(), make_input("linear")
    with torch.autocast("cpu", torch.bfloat16):
        expected = oracle(model, "linear", x)
        peft_multibatch.enable(model)
        actual = model(layer="linear", x=x, adapter_ids=NAMES)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert_close(actual, expected)


@pytest.mark.parametrize("layer", ["linear", "conv2d", "embedding", "dora"])
def test_gradients(layer):
    """Compare gradients of the input and of every adapter's weights with PEFT, one adapter at a time."""
    if layer == "dora":
        layer, model = "linear", randomize(build("linear", second={"use_dora": True}))
    else:
        model = build(layer)
    model.set_requires_grad(["one", "two"])
    x = make_input(layer)
    weights = [p for name, p in model.named_parameters() if "lora_" in name]

    def gradients(run):
        leaf = x.clone().requires_grad_() if x.is_floating_point() else x
        tensors = weights + ([leaf] if leaf.requires_grad else [])
        return torch.autograd.grad(run(leaf).square().sum(), tensors)

    def one_at_a_time(leaf):
        outputs = []
        for row, name in enumerate(NAMES):
            # set_adapter freezes the other adapters; the graph of each row keeps what it needs
            outputs.append(alone(model, name, lambda row=row: model(layer=layer, x=leaf[row : row + 1])))
            model.set_requires_grad(["one", "two"])
        return torch.cat(outputs)

    expected = gradients(one_at_a_time)
    peft_multibatch.enable(model)
    model.set_requires_grad(["one", "two"])
    actual = gradients(lambda leaf: model(layer=layer, x=leaf, adapter_ids=NAMES))
    for mine, theirs in zip(actual, expected):
        assert theirs.norm() > 0
        assert_close(mine, theirs)


def test_an_adapter_that_is_not_in_the_batch_gets_no_gradient():
    model = build()
    model.set_requires_grad(["one", "two"])
    peft_multibatch.enable(model)
    model(layer="linear", x=make_input("linear"), adapter_ids=["one"] * 5).sum().backward()
    linear = model.base_model.model.linear
    assert linear.lora_A["one"].weight.grad is not None
    assert linear.lora_A["two"].weight.grad is None


def test_dropout_in_training_is_each_adapters_own():
    model = build(lora_dropout=0.5, second={"lora_dropout": 0.0}).train()
    mb = peft_multibatch.enable(model)
    x = make_input("linear")
    first, second = (model(layer="linear", x=x, adapter_ids=NAMES) for _ in range(2))
    rows_of_one = torch.tensor([name == "one" for name in NAMES])
    assert not torch.equal(first[rows_of_one], second[rows_of_one])
    assert torch.equal(first[~rows_of_one], second[~rows_of_one])
    mb.disable()


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing(reentrant):
    """`backward` runs layers again after the ids are gone."""

    def gradients(checkpoint):
        model = peft_model()
        model.set_requires_grad(["three", "four", "eight"])
        inner = model.get_base_model().train()
        if checkpoint:
            inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        peft_multibatch.enable(model)
        before = inner.model.layers[0]._gradient_checkpointing_func if checkpoint else None
        names = ["three", "eight", "__base__", "four", "three", "eight"]
        loss = model(**left_padded(), use_cache=False, adapter_ids=names).logits.square().mean()
        loss.backward()
        copied = copy.deepcopy(model) if checkpoint else None
        pickle.dumps(model.get_base_model().model.layers[0]._gradient_checkpointing_func if checkpoint else None)
        peft_multibatch.disable(model)
        if checkpoint:
            assert inner.model.layers[0]._gradient_checkpointing_func is before
            assert type(copied.get_base_model().model.layers[0]._gradient_checkpointing_func) is type(before)
        return torch.cat([p.grad.flatten() for key, p in model.named_parameters() if "lora_" in key])

    assert_close(gradients(True), gradients(False))


def test_modules_to_save_are_each_adapters_own():
    """An adapter without a copy of the module, and a row without adapter, use the original one."""
    model = build("linear", modules_to_save=["head"], second={"modules_to_save": None})
    head = model.base_model.model.head
    nn.init.normal_(head.modules_to_save["one"].weight)
    x = make_input("head")
    expected = torch.cat(
        [
            (head.modules_to_save["one"] if name == "one" else head.original_module)(x[i : i + 1])
            for i, name in enumerate(NAMES)
        ]
    )
    peft_multibatch.enable(model)
    assert_close(model(layer="head", x=x, adapter_ids=NAMES), expected)
    assert (head.active_adapters, head.disable_adapters) == (["one"], False)


def test_trainable_tokens_are_each_adapters_own():
    """Two adapters with their own tokens, one without any, and the base model."""
    model = build("linear", trainable_token_indices={"embedding": [1, 2, 3]}, second={"trainable_token_indices": None})
    third = LoraConfig(r=2, target_modules=["linear"], trainable_token_indices={"embedding": [3, 4]})
    model.add_adapter("three", third)
    for key, parameter in model.named_parameters():
        if "trainable_tokens_delta" in key:
            nn.init.normal_(parameter)
    names, x = ["one", "three", "two", "__base__", "three"], torch.randint(0, 6, (5, 7))
    expected = torch.cat(
        row_by_row(
            model, ["one", "three", "__base__", "__base__", "three"], {"x": x}, lambda r: model("embedding", r["x"])
        )
    )
    peft_multibatch.enable(model)
    assert_close(model(layer="embedding", x=x, adapter_ids=names), expected)


@pytest.mark.parametrize("architecture", ["GPT2", "Bert"])
def test_position_embeddings(architecture):
    """Position embeddings see one row of positions for all samples."""
    sizes = {"GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12}, "Bert": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "max_position_embeddings": 12,
    }}[architecture]  # fmt: skip
    config = getattr(transformers, f"{architecture}Config")(vocab_size=30, bos_token_id=1, eos_token_id=None, **sizes)
    kind = {"GPT2": transformers.GPT2LMHeadModel, "Bert": transformers.BertModel}[architecture]
    targets = {"GPT2": ["wte", "wpe"], "Bert": ["word_embeddings", "position_embeddings"]}[architecture]
    model = get_peft_model(kind(config), LoraConfig(r=3, target_modules=targets), "one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=targets))
    randomize(model.eval())
    ids = torch.randint(2, 30, (5, 6))
    with torch.no_grad():
        expected = torch.cat(row_by_row(model, NAMES, {"x": ids}, lambda row: model(input_ids=row["x"])[0]))
        mb = peft_multibatch.enable(model)
        assert_close(model(input_ids=ids, adapter_ids=NAMES)[0], expected)
        if architecture == "GPT2":
            options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
            tokens = model.generate(input_ids=ids, adapter_ids=NAMES, **options)
            mb.disable()
            rows = row_by_row(model, NAMES, {"input_ids": ids}, lambda row: model.generate(**row, **options))
            assert torch.equal(tokens, torch.cat(rows))


class Attention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x, y, **masks):
        if self.batch_first:
            return self.attention(x, y, y, **masks)
        output, weights = self.attention(x.transpose(0, 1), y.transpose(0, 1), y.transpose(0, 1), **masks)
        return output.transpose(0, 1), weights


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first):
    """The module that stores q, k and v in one parameter, with masks, in either order of dimensions."""
    config = LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False)
    model = get_peft_model(Attention(batch_first), config, "one")
    model.add_adapter("two", LoraConfig(r=3, target_modules=["attention"], init_lora_weights=False))
    model.eval()
    x, y = torch.randn(5, 4, 8), torch.randn(5, 6, 8)
    padding = torch.zeros(5, 6, dtype=torch.bool)
    padding[1, 4:] = True
    mask = torch.zeros(10, 4, 6).masked_fill(torch.rand(10, 4, 6) < 0.3, -5.0)

    def call(rows, **kwargs):
        heads = mask.unflatten(0, (5, 2))[rows].flatten(0, 1)
        return model(x[rows], y[rows], key_padding_mask=padding[rows].float() * -1e9, attn_mask=heads, **kwargs)

    expected = [
        torch.cat(parts)
        for parts in zip(*(alone(model, name, lambda i=i: call(slice(i, i + 1))) for i, name in enumerate(NAMES)))
    ]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mb = peft_multibatch.enable(model)
    assert [entry.how for entry in mb.report()] == [PER_SEGMENT]
    for actual, wanted in zip(call(slice(None), adapter_ids=NAMES), expected):
        assert_close(actual, wanted)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_layers_that_return_more_than_one_tensor_are_refused():
    """A GRU's second output has its samples in dimension 1, which can't be inferred."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.recurrent = nn.Linear(4, 4), nn.GRU(4, 4, batch_first=True)

        def forward(self, x):
            return self.recurrent(self.linear(x))[0]

    model = get_peft_model(Recurrent(), LoraConfig(target_modules=["linear"], modules_to_save=["recurrent"]), "one")
    peft_multibatch.enable(model)
    with pytest.raises(
        peft_multibatch.UnsupportedError, match=r"recurrent returned a tensor of shape \[1, 1, 4\] for 1 samples"
    ):
        model(torch.randn(2, 3, 4), adapter_ids=["one", "__base__"])


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def experts_model(kind="Mixtral"):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model_class = getattr(transformers, f"{kind}ForCausalLM")
    config = model_class.config_class(
        vocab_size=30, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, **sizes
    )
    torch.manual_seed(0)
    shared = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "init_lora_weights": False}
    model = get_peft_model(model_class(config), LoraConfig(r=2, **shared), "one")
    model.add_adapter("two", LoraConfig(r=2, **shared))
    return model.eval()


@pytest.mark.parametrize("kind", ["Mixtral", "Llama4"])  # routed rows; all rows, expert by expert
def test_experts_meet_the_adapter_of_each_tokens_sample(kind):
    model = experts_model(kind)
    ids = torch.randint(1, 30, (5, 6))
    with torch.no_grad():
        expected = torch.cat(row_by_row(model, NAMES, {"x": ids}, lambda row: model(input_ids=row["x"]).logits))
        first, second = (alone(model, name, lambda: model(input_ids=ids).logits) for name in ("one", "two"))
        assert relative_error(first, second) > 0.01
        mb = peft_multibatch.enable(model)
        assert "ParamWrapper" in mb.report()[-1].reason
        assert_close(model(input_ids=ids, adapter_ids=NAMES).logits, expected)
        options = {"max_new_tokens": 3, "do_sample": False}
        tokens = model.generate(input_ids=ids, adapter_ids=NAMES, **options)
        assert "parametrizations" not in "".join(key for key, _ in model.named_modules())
        mb.disable()
        rows = row_by_row(model, NAMES, {"input_ids": ids}, lambda row: model.generate(**row, **options))
    assert torch.equal(tokens, torch.cat(rows))


@pytest.mark.parametrize("kind", ["Mixtral", "Llama4"])
def test_gradients_of_experts(kind):
    model, ids = experts_model(kind), torch.randint(1, 30, (5, 6))
    model.set_requires_grad(["one", "two"])
    weights = [p for key, p in model.named_parameters() if "lora_" in key]

    def one_at_a_time():
        total = 0
        for row, name in enumerate(NAMES):
            total = (
                total + alone(model, name, lambda row=row: model(input_ids=ids[row : row + 1]).logits).square().sum()
            )
            model.set_requires_grad(["one", "two"])
        return total

    expected = torch.autograd.grad(one_at_a_time(), weights, materialize_grads=True)
    peft_multibatch.enable(model)
    actual = torch.autograd.grad(
        model(input_ids=ids, adapter_ids=NAMES).logits.square().sum(), weights, materialize_grads=True
    )
    for mine, theirs in zip(actual, expected):
        assert_close(mine, theirs)


class Mixture(nn.Module):
    """Experts of both kinds: modules that get gathered rows, and one parameter for all, called without routing."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4)])
        self.block = nn.Module()
        self.block.inner = Unrouted()

    def forward(self, x):
        return self.block.inner(x)


class Unrouted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2, 4, 4))

    def forward(self, x):
        return torch.bmm(x.view(2, -1, 4), self.weights).view(-1, 4)


def test_experts_that_see_gathered_rows_are_refused():
    model = get_peft_model(Mixture(), LoraConfig(r=2, target_modules=["0"]), "one")
    with pytest.raises(peft_multibatch.UnsupportedError, match=r"experts.0 is inside a mixture of experts"):
        peft_multibatch.enable(model)
    assert "forward" not in model.__dict__  # nothing is left behind


def test_experts_without_routing_are_refused():
    model = get_peft_model(Mixture(), LoraConfig(r=2, target_parameters=["inner.weights"]), "one")
    peft_multibatch.enable(model)
    with pytest.raises(peft_multibatch.UnsupportedError, match="inner has experts that were called without routing"):
        model(torch.randn(4, 4), adapter_ids=["one", "__base__", "one", "one"])
