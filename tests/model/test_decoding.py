"""Compiled decoding: fewer guards, and whatever changes between two calls of ``generate`` is noticed."""

from __future__ import annotations

import copy

import pytest
import torch
from models import base_model, left_padded, lora_configs, peft_model
from peft import LoraConfig, get_peft_model
from threads import in_threads
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList, StaticCache

import peft_multibatch
from peft_multibatch.model.decoding import state_of


triton_backend = pytest.importorskip("peft_multibatch.ops.triton_backend", reason="needs triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not triton_backend.INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1"
)
NAMES = ["three", "eight", "__base__", "four", "three", "eight"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def enabled(request):
    model = peft_model(num_hidden_layers=1).to(DEVICE)
    return model, peft_multibatch.enable(model, backend="triton", fuse=getattr(request, "param", True))


@pytest.fixture
def stored(request, tmp_path):
    """A model whose adapters are all in a store, so that it has no PEFT layers."""
    peft_model(num_hidden_layers=1).save_pretrained(tmp_path)
    model = base_model(num_hidden_layers=1).to(DEVICE)
    mb = peft_multibatch.enable(model, backend="triton", fuse=getattr(request, "param", True))
    store = mb.adapter_store()
    for name in {*NAMES} - {"__base__"}:
        store.register(name, tmp_path / name)
    return model, mb


both_ways_to_fuse = pytest.mark.parametrize("enabled", [True, "weights"], ids=["fused", "with weights"], indirect=True)


def config():
    """Dynamo's part of compiling, which is what has guards."""
    found = CompileConfig(backend="eager", mode=None)
    found._compile_all_devices = True
    return found


def generate(model, names=NAMES, is_compiled=True, **options):
    how = {"compile_config": config()} if is_compiled else {"disable_compile": True}
    ids = {} if names is None else {"adapter_ids": names}
    inputs = {key: value.to(DEVICE) for key, value in left_padded(6, 4).items()}
    with torch.no_grad():
        return model.generate(
            **inputs, **ids, **how, max_new_tokens=4, do_sample=False, cache_implementation="static",
            output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip


def is_same(one, other):
    return torch.allclose(torch.stack(one.logits), torch.stack(other.logits), atol=1e-4)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def layer_of(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


@both_ways_to_fuse
def test_layers_are_checked_once(enabled, monkeypatch):
    """None of the guards of layers with adapters is left, and all others are."""
    check_guards(*enabled, monkeypatch)


def check_guards(model, mb, monkeypatch):
    seen = []
    original = mb._decoding._covers

    def covers(guard, plain):
        seen.append((guard.name, guard.guard_type, original(guard, plain)))
        return seen[-1][2]

    monkeypatch.setattr(mb._decoding, "_covers", covers)
    generate(model)
    of_layers = {each for each in seen if "_proj" in each[0]}
    assert len(of_layers) > 100 and [each for each in of_layers if not each[2]] == []
    others = {*seen} - of_layers
    assert others and [each for each in others if each[2]] == []


@pytest.mark.parametrize("stored", [True, "weights"], ids=["fused", "with weights"], indirect=True)
def test_layers_of_stored_adapters_are_checked_once(stored, monkeypatch):
    check_guards(*stored, monkeypatch)


def hook_layer(model, mb):
    layer_of(model).register_forward_hook(lambda module, args, output: 2 * output)


def hook_base(model, mb):
    layer_of(model).base_layer.register_forward_hook(lambda module, args, output: 2 * output)


def pre_hook_base(model, mb):
    layer_of(model).base_layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def give_bias(model, mb):
    layer_of(model).base_layer.bias = torch.nn.Parameter(
        torch.randn(layer_of(model).base_layer.out_features, device=DEVICE)
    )


def replace_weight(model, mb):
    base = layer_of(model).base_layer
    base.weight = torch.nn.Parameter(torch.randn_like(base.weight), requires_grad=True)


def replace_base(model, mb):
    layer = layer_of(model)
    layer.base_layer = torch.nn.Linear(layer.in_features, layer.out_features, device=DEVICE)


def replace_base_forward(model, mb):
    base = layer_of(model).base_layer
    base.forward = lambda x: 2 * torch.nn.functional.linear(x, base.weight, base.bias)


def disable(model, mb):
    model.base_model.disable_adapter_layers()


def add_larger(model, mb):
    options = lora_configs()["eight"]
    options.r = 32
    model.add_adapter("larger", options)
    model.delete_adapter("eight")
    model.add_adapter("eight", options)
    model.to(DEVICE)


@both_ways_to_fuse
@pytest.mark.parametrize(
    "change",
    [hook_layer, hook_base, pre_hook_base, give_bias, replace_weight, replace_base, replace_base_forward, disable,
     add_larger],
)  # fmt: skip
def test_changes_between_calls_are_noticed(enabled, change):
    model, mb = enabled
    before = generate(model)
    assert is_same(before, generate(model, is_compiled=False)) and graphs()
    torch.manual_seed(1)
    change(model, mb)
    after = generate(model)
    assert is_same(after, generate(model, is_compiled=False))
    assert not is_same(after, before)


def place_of(model):
    return model.model.layers[0].self_attn.q_proj


def hook_place(model, mb, folder):
    place_of(model).register_forward_hook(lambda module, args, output: 2 * output)


def pre_hook_place(model, mb, folder):
    place_of(model).register_forward_pre_hook(lambda module, args: (2 * args[0],))


def give_place_bias(model, mb, folder):
    place_of(model).bias = torch.nn.Parameter(torch.randn(place_of(model).out_features, device=DEVICE))


def replace_place_weight(model, mb, folder):
    """By one that lies in another order in memory."""
    place_of(model).weight = torch.nn.Parameter(torch.randn_like(place_of(model).weight).T.contiguous().T)


def hook_sibling_place(model, mb, folder):
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, output: 2 * output)


def change_class_of_place(model, mb, folder):
    place_of(model).__class__ = Doubled


def replace_place(model, mb, folder):
    place = place_of(model)
    other = torch.nn.Linear(place.in_features, place.out_features, bias=False, device=DEVICE)
    model.model.layers[0].self_attn.q_proj = other


def register_larger(model, mb, folder):
    config = LoraConfig(r=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base_model(num_hidden_layers=1), config).save_pretrained(folder / "larger")
    mb._registry.store.register("three", folder / "larger")


def wrap_by_peft(model, mb, folder):
    get_peft_model(model, lora_configs()["eight"], adapter_name="peft")
    place_of(model).base_layer.weight.data.mul_(2)


@pytest.mark.parametrize(
    "change",
    [hook_place, pre_hook_place, hook_sibling_place, give_place_bias, replace_place_weight, replace_place,
     change_class_of_place, register_larger, wrap_by_peft],
)  # fmt: skip
def test_changes_of_layers_of_stored_adapters_are_noticed(stored, change, tmp_path):
    model, mb = stored
    before = generate(model)
    assert is_same(before, generate(model, is_compiled=False)) and graphs()
    torch.manual_seed(1)
    change(model, mb, tmp_path)
    compiled = graphs()
    after = generate(model)
    assert graphs() > compiled
    assert is_same(after, generate(model, is_compiled=False))
    assert not is_same(after, before)


def test_a_weight_that_is_computed(stored):
    """A stored adapter's layer shares the module's weight, which no longer exists."""
    model, _ = stored
    generate(model)
    torch.nn.utils.parametrize.register_parametrization(place_of(model), "weight", torch.nn.Tanh())
    assert is_same(generate(model, None), generate(model, None, is_compiled=False))
    with pytest.raises(peft_multibatch.AdapterUnsupportedError, match="a module whose weight is computed"):
        generate(model)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # transformers 5.17 needs it
@pytest.mark.parametrize("kind", ["enabled", "stored"])
def test_code_that_is_compiled_outside_of_generate_has_all_guards(kind, enabled, stored):
    model, mb = {"enabled": enabled, "stored": stored}[kind]
    inner = model.get_base_model() if kind == "enabled" else model
    inputs = {key: value.to(DEVICE) for key, value in left_padded(6, 4).items()}

    def last(function):
        with torch.no_grad(), mb.batch(NAMES):
            cache = StaticCache(inner.config, max_cache_len=8)
            token = inner(**inputs, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            return function(input_ids=token, past_key_values=cache, use_cache=True).logits

    generate(model)
    function = inner.get_compiled_call(config())
    before = last(function)
    assert torch.allclose(before, last(inner), atol=1e-4)
    layer = inner.model.layers[0].self_attn.k_proj
    base = layer.base_layer if kind == "enabled" else layer
    base.bias = torch.nn.Parameter(torch.randn(base.out_features, device=DEVICE))  # torch doesn't notice a hook
    after = last(function)
    assert torch.allclose(after, last(inner), atol=1e-4) and not torch.allclose(after, before, atol=1e-4)


def test_merged_adapters_are_refused(enabled):
    model, _ = enabled
    generate(model)
    model.merge_adapter(["three"])
    with pytest.raises(peft_multibatch.MergedAdaptersError):
        generate(model)


def test_calls_without_ids_keep_all_guards(enabled):
    model, _ = enabled
    generate(model)
    model.set_adapter("three")
    three = generate(model, None)
    model.set_adapter("eight")
    eight = generate(model, None)
    assert is_same(three, generate(model, ["three"] * 6)) and is_same(eight, generate(model, ["eight"] * 6))
    assert not is_same(three, eight)


def test_a_layout_that_returns_is_not_compiled_again(enabled):
    model, _ = enabled
    generate(model)
    generate(model)
    plain = graphs()
    handle = layer_of(model).register_forward_hook(lambda module, args, output: output)
    generate(model)
    hooked = graphs()
    assert hooked > plain
    handle.remove()
    generate(model)
    assert graphs() == hooked


def test_other_ways_to_compile_are_left_alone(enabled):
    model, mb = enabled
    inner, prepare = model.base_model.model, mb._decoding.prepare
    own = CompileConfig(mode=None, options={"guard_filter_fn": lambda guards: [True] * len(guards)})
    other = CompileConfig(backend="other", mode="fast")
    both = CompileConfig(options={"max_autotune": True})  # torch refuses it
    assert all(prepare(inner, each) is each for each in (own, other, both))
    default = prepare(inner, None)
    assert default.mode is None and default.options["triton.cudagraphs"]  # those of reduce-overhead
    assert default == prepare(inner, None)  # or transformers would compile for every call


def test_copies_and_disabled_models_have_their_own_method(enabled):
    model, mb = enabled
    compiled = generate(model)
    layer = mb._layers[layer_of(model)]
    assert state_of(layer) is not None
    other = copy.deepcopy(model)
    other.set_adapter("three")
    assert is_same(generate(other, None), generate(model, ["three"] * 6))
    mb.disable()
    assert "get_compiled_call" not in model.base_model.model.__dict__
    peft_multibatch.enable(model, backend="triton")
    assert is_same(generate(model), compiled)


def second_layer_of(model):
    return model.base_model.model.model.layers[0].self_attn.k_proj


def test_parameters_that_are_shared_no_longer(enabled):
    model, _ = enabled
    layer, other = layer_of(model), model.base_model.model.model.layers[0].self_attn.o_proj
    other.base_layer.weight = layer.base_layer.weight
    before = generate(model)
    assert is_same(before, generate(model, is_compiled=False))
    other.base_layer.weight = torch.nn.Parameter(torch.randn_like(layer.base_layer.weight), requires_grad=False)
    layer.base_layer.weight.requires_grad_(False)
    after = generate(model)
    assert is_same(after, generate(model, is_compiled=False)) and not is_same(after, before)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


@both_ways_to_fuse
def test_a_layer_that_is_not_plain_keeps_the_guards_of_its_group(enabled):
    """The first layer of a group runs the base layers of all."""
    model, _ = enabled
    base, found = second_layer_of(model).base_layer, []
    for kind in (Doubled, Halved):
        base.__class__ = kind
        found.append(generate(model))
        assert is_same(found[-1], generate(model, is_compiled=False))
    assert not is_same(*found)


class Once(LogitsProcessor):
    """Runs a function on another thread after the first token."""

    def __init__(self, function):
        self.function = function

    def __call__(self, input_ids, scores):
        function, self.function = self.function, None
        if function is not None:
            in_threads(lambda _: function(), count=1)
        return scores


def test_a_change_between_the_check_and_the_trace(enabled):
    """Adapters are disabled on another thread while the code is traced."""
    model, _ = enabled
    expected = generate(model, is_compiled=False)
    block = model.disable_adapter()
    assert is_same(generate(model, logits_processor=LogitsProcessorList([Once(block.__enter__)])), expected)
    assert is_same(generate(model), expected)
    block.__exit__(None, None, None)
    assert is_same(generate(model), expected)
    with model.disable_adapter():
        assert not is_same(generate(model), expected)


@pytest.mark.parametrize("enabled", ["weights"], indirect=True)
def test_base_weights_that_are_parted_during_a_call(enabled):
    model, _ = enabled
    expected = generate(model)
    base = layer_of(model).base_layer

    def part():
        base.weight = torch.nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
        with torch.no_grad():
            model(**{key: value.to(DEVICE) for key, value in left_padded(6, 4).items()}, adapter_ids=NAMES)

    assert is_same(generate(model, logits_processor=LogitsProcessorList([Once(part)])), expected)
    assert is_same(generate(model), expected)
