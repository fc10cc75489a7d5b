"""Dropout of whole models in mixed batches: against PEFT with given masks, against each adapter alone, and in
reruns."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from models import LLAMA_LIKE, alone, base_model
from peft import LoraConfig, get_peft_model
from products import DEVICE, both_backends
from tolerances import assert_close
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_multibatch
from peft_multibatch.adapters.dropout import DropoutState
from peft_multibatch.calls.dropout import Dropouts
from peft_multibatch.ops import torch_gradients
from peft_multibatch.ops.dropout import Mask, dropped


RATES = {"fifty": 0.5, "ten": 0.1, "zero": 0.0}
NAMES = ["ten", "fifty", "__base__", "fifty", "zero", "ten", "fifty"]


def build(dtype=torch.float64, backend=None, fuse=True, **options):
    """Build Llama in train mode, without dropout of its own, and adapters with different layers, ranks and rates."""
    model, shared = None, {"init_lora_weights": False, "task_type": "CAUSAL_LM", **options}
    for number, (name, rate) in enumerate(RATES.items()):
        config = LoraConfig(r=3 + number, lora_dropout=rate, target_modules=LLAMA_LIKE[number:], **shared)
        if model is None:
            model = get_peft_model(base_model(dtype=dtype), config, name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    model.set_requires_grad([*RATES])
    model.to(DEVICE).train()
    if backend is not None:
        assert peft_multibatch.enable(model, backend=backend, fuse=fuse).report().backend == backend
    return model


def inputs(length=5):
    """Return prompts; a longer batch starts with the same ones."""
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randint(2, 160, (16,), generator=generator) for _ in NAMES])[:, :length].to(DEVICE)


def run(model, own=None, tokens=None, **options):
    """Return the output of every row, and the gradients of their sum."""
    tokens = inputs() if tokens is None else tokens
    tokens = tokens if own is None else tokens[own]
    weights = torch.linspace(0.5, 2, 160, device=DEVICE)
    logits = model(input_ids=tokens, use_cache=False, **options).logits
    model.zero_grad()
    (logits * weights).square().mean((1, 2)).sum().backward()
    return logits.detach(), {key: each.grad.clone() for key, each in model.named_parameters() if each.grad is not None}


def check(actual, expected, dtype):
    assert actual.keys() == expected.keys()
    assert_close(*(torch.cat([found[key].flatten() for key in expected]) for found in (actual, expected)), dtype)


def rows_of(name, names=NAMES):
    return [row for row, each in enumerate(names) if each == name]


def names_of_layers(model):
    """Map an enabled model's layers to their names in the `PeftModel`."""
    return {key: each._multibatch.name for key, each in model.named_modules() if hasattr(each, "lora_dropout")}


@contextlib.contextmanager
def recorded():
    """Record the masks that torch's products use, and the dropped inputs."""
    found = []

    def record(parts, *args):
        result = dropped(parts, *args)
        for (_, masks), own in zip(parts, result.split([number for number, _ in parts])):
            found.extend((mask, own[:, i]) for i, mask in enumerate(masks) if mask is not None)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_gradients, "dropped", record)
        yield found


class Given(nn.Module):
    """PEFT's dropout with a given mask."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        found = dropped([(x.shape[0] * x.shape[1], [self.mask])], x.shape[1], x.shape[2], x.device)
        return x.masked_fill(found.view(x.shape), 0) * self.mask.scale


@both_backends
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "not fused"])
def test_peft_with_the_same_masks(backend, dtype, fuse):
    """Compare rows and all gradients, at an adapter's first and second step."""
    model, plain = build(dtype, backend, fuse), build(dtype)
    layers = names_of_layers(model)
    for step in range(2):
        actual, gradients = run(model, adapter_ids=NAMES)
        for key, layer in layers.items():
            dropouts = plain.get_submodule(key).lora_dropout
            for name in dropouts:
                mask = Mask(DropoutState(name).key(torch.initial_seed(), layer), step, RATES[name])
                dropouts[name] = Given(mask) if mask.p else nn.Identity()
        expected = {}
        for name in RATES:
            logits, found = alone(plain, name, lambda name=name: run(plain, rows_of(name)))
            assert_close(actual[rows_of(name)], logits, dtype)
            expected |= {key: each for key, each in found.items() if f".{name}." in key}
        check(gradients, expected, dtype)


@both_backends
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]], ids=["as above", "turned round"])
def test_a_mixed_batch_is_each_adapter_alone(backend, dtype, order):
    """An adapter's result doesn't depend on the other rows or their order, as long as its own rows keep their
    order."""
    names = [NAMES[row] for row in order]
    actual, gradients = run(build(dtype, backend), order, adapter_ids=names)
    expected = {}
    for name in RATES:
        own = [order[row] for row in rows_of(name, names)]
        logits, found = run(build(dtype, backend), own, adapter_ids=[name] * len(own))
        assert_close(actual[rows_of(name, names)], logits, dtype)
        expected |= found
    check(gradients, expected, dtype)


@both_backends
def test_a_longer_batch_drops_the_same_of_the_first_tokens(backend, dtype):
    short, long = (build(dtype, backend)(inputs(length=n), adapter_ids=NAMES).logits for n in (5, 9))
    assert_close(long[:, :5], short, dtype)


@both_backends
def test_one_adapters_dropout_leaves_the_others_alone(backend, dtype):
    model, other = build(dtype, backend), build(dtype, backend)
    for module in other.modules():
        if isinstance(module, nn.Dropout) and module.p == 0.5:
            module.p = 0.0
    (actual, gradients), (expected, theirs) = run(model, adapter_ids=NAMES), run(other, adapter_ids=NAMES)
    for row, name in enumerate(NAMES):
        assert torch.equal(actual[row], expected[row]) == (name != "fifty")
    for key, each in gradients.items():
        assert torch.equal(each, theirs[key]) == (".fifty." not in key)


@both_backends
def test_every_call_drops_anew(backend, dtype):
    model = build(dtype, backend)
    first, second = (run(model, adapter_ids=NAMES) for _ in range(2))
    again = run(build(dtype, backend), adapter_ids=NAMES)
    model = build(dtype, backend)
    torch.manual_seed(1)
    other = run(model, adapter_ids=NAMES)
    assert torch.equal(first[0], again[0]) and all(torch.equal(each, again[1][key]) for key, each in first[1].items())
    drops = [row for row, name in enumerate(NAMES) if RATES.get(name)]
    for different in (second[0], other[0]):
        equal = [torch.equal(*pair) for pair in zip(first[0], different)]
        assert [row for row, is_equal in enumerate(equal) if not is_equal] == drops


@pytest.mark.parametrize("change", ["eval", "no rate"])
@both_backends
def test_nothing_is_computed_where_nothing_is_dropped(monkeypatch, backend, dtype, change):
    def never(*_):
        raise AssertionError

    model = build(dtype, backend)
    if change == "eval":
        model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout) and change == "no rate":
            module.p = 0.0
    monkeypatch.setattr(Dropouts, "masks", never)
    monkeypatch.setattr(Dropouts, "table", never)
    run(model, adapter_ids=NAMES)
    registry = peft_multibatch.enable(model)._registry
    assert [registry.dropout_state(number).step for number in range(3)] == [0, 0, 0]


@both_backends
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing(backend, dtype, reentrant):
    """`backward` drops the same elements when it runs layers again, even if it runs twice."""
    expected, theirs = run(build(dtype, backend), adapter_ids=NAMES)
    model = build(dtype, backend)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for _ in range(2):  # the second one has other masks
        actual, gradients = run(model, adapter_ids=NAMES)
        if _ == 0:
            assert torch.equal(actual, expected)
            check(gradients, theirs, dtype)
    assert not torch.equal(actual, expected)


class Twice(nn.Module):
    """A layer that runs several times in a call, each time on its previous output, inside a checkpoint."""

    def __init__(self, reentrant):
        super().__init__()
        self.layer = nn.Linear(24, 24, bias=False)
        self.reentrant = reentrant

    def forward(self, x):
        for _ in range(3):
            x = x + 1
            x = self.layer(x) if self.reentrant is None else checkpoint(self.layer, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_layer_that_runs_several_times_drops_anew(reentrant):
    def make(reentrant):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["layer"], lora_dropout=0.5, init_lora_weights=False)
        model = get_peft_model(Twice(reentrant).double(), config, autocast_adapter_dtype=False).train()
        peft_multibatch.enable(model)
        return model

    x = torch.randn(2, 3, 24, dtype=torch.float64).requires_grad_()
    plain, again = make(None), make(reentrant)
    with recorded() as seen:
        expected = plain(x, adapter_ids=["default"] * 2)
    assert len({mask for mask, _ in seen}) == 3
    parameters = [each for each in plain.parameters() if each.requires_grad]
    theirs = torch.autograd.grad(expected.square().sum(), [x, *parameters])
    actual = again(x, adapter_ids=["default"] * 2)
    assert torch.equal(actual, expected)
    parameters = [each for each in again.parameters() if each.requires_grad]
    for retain in (True, False):
        again.zero_grad()
        x.grad = None
        actual.square().sum().backward(retain_graph=retain)
        for mine, other in zip([x.grad, *(each.grad for each in parameters)], theirs, strict=True):
            assert_close(mine, other)


def test_layers_and_projections_have_masks_of_their_own():
    with recorded() as seen:
        build(backend="torch")(inputs(), adapter_ids=["fifty"] * len(NAMES))
    assert len(seen) == len({mask for mask, _ in seen}) == 2 * len(LLAMA_LIKE)
    of_hidden = [each for _, each in seen if each.shape[1] == 48]
    correlations = torch.corrcoef(torch.stack(of_hidden).flatten(1).double()).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / of_hidden[0].numel() ** 0.5


@both_backends
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend, dtype, mode):
    """Monte-Carlo dropout matches that of training."""
    expected = run(build(dtype, backend), adapter_ids=NAMES)[0]
    model = build(dtype, backend)
    with mode():
        actual, other = (model(inputs(), adapter_ids=NAMES).logits for _ in range(2))
    assert_close(actual, expected, dtype)
    assert not torch.equal(actual, other)


def test_generating_in_train_mode_drops_anew_at_every_step():
    model = build(torch.float32, "torch")
    with recorded() as seen:
        model.generate(input_ids=inputs(), adapter_ids=NAMES, max_new_tokens=3, do_sample=False)
    masks = [mask for mask, _ in seen]
    assert len(masks) == len(set(masks)) and len({(each.step, each.p) for each in masks}) == 2


@pytest.mark.parametrize("what", ["DoRA", "a mixture", "in place", "a hook"])
def test_what_peft_drops_by_itself(what):
    """An adapter whose dropout isn't part of the product doesn't change that of the others."""
    model = build(backend="torch")
    names = list(NAMES)
    if what == "DoRA":
        config = LoraConfig(r=4, lora_dropout=0.5, target_modules=LLAMA_LIKE, use_dora=True, init_lora_weights=False)
        model.add_adapter("dora", config, autocast_adapter_dtype=False)
        model.train()
        names[0] = "dora"
    elif what == "a mixture":
        names[0] = {"ten": 0.5, "zero": 1.0}
    else:
        for key, module in model.named_modules():
            if key.endswith("lora_dropout.ten"):
                module.inplace = what == "in place"
                if what == "a hook":
                    module.register_forward_hook(lambda *_: None)
    ran = []
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    with pytest.MonkeyPatch.context() as patch:
        forward = type(layer).forward
        patch.setattr(
            type(layer), "forward", lambda self, x, **kw: ran.append(self._active_adapter) or forward(self, x, **kw)
        )
        first = model(inputs(), adapter_ids=names).logits
        second = model(inputs(), adapter_ids=names).logits
    apart = {"DoRA": {("dora",)}, "a mixture": {("ten", "zero"), ("ten",)}}.get(what, {("ten",)})
    assert {tuple(each) for each in ran} - {()} == apart  # and the base layer alone, for the rows of all adapters
    expected = build(backend="torch")(inputs(), adapter_ids=NAMES).logits
    assert_close(first[rows_of("fifty")], expected[rows_of("fifty")])
    assert not torch.equal(first[0], second[0])


def test_adapters_that_are_added_again_begin_anew():
    model = build(backend="torch")
    mb = peft_multibatch.enable(model)
    model(inputs(), adapter_ids=NAMES)
    registry = mb._registry
    state = registry.dropout_state(registry.names.ids["fifty"])
    assert (state.step, state.seed) == (1, torch.initial_seed())
    config = copy.deepcopy(model.peft_config["fifty"])
    model.set_adapter("zero")
    model.delete_adapter("fifty")
    assert mb.adapter_names[0] is None
    model.add_adapter("fifty", config)
    assert "fifty" in mb.adapter_names
    other = registry.dropout_state(registry.names.ids["fifty"])
    assert (other.step, other.seed) == (0, None)
