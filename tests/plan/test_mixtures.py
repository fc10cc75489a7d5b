"""Weighted mixtures against PEFT's `add_weighted_adapter`, and against several active adapters in PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from mixtures import MIXTURES, OTHERS, expected, several
from models import base_model, left_padded, lora_configs, peft_model, row_by_row
from peft import IA3Config, get_peft_model
from single_layers import build, make_input
from tolerances import assert_close

import peft_multibatch
from peft_multibatch import Segments, errors, ops
from peft_multibatch.plan.ids import components, resolve
from peft_multibatch.plan.names import AdapterNames


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def logits(model, entries=None, **kwargs):
    with torch.no_grad():
        ids = {} if entries is None else {"adapter_ids": entries}
        inputs = {key: value.to(model.device) for key, value in left_padded().items()}
        return model(**inputs, use_cache=False, **ids, **kwargs).logits


def wanted(model, entries):
    """Compute the expected values in float64, because a sum of adapters accumulates rounding errors."""
    model = copy.deepcopy(model).double()
    inputs = {key: value.to(model.device) for key, value in left_padded().items()}
    with torch.no_grad():
        return expected(model, entries, inputs, lambda row: model(**row, use_cache=False).logits)


@pytest.mark.parametrize("fuse", [True, False, "weights"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rows_equal_adapters_that_peft_adds_up(architecture, fuse):
    model = peft_model(architecture)
    sums = {}
    for index, entry in enumerate(MIXTURES):
        # PEFT takes the scaling rule of the first adapter, so that must not be one with rslora
        if isinstance(entry, dict):
            model.add_weighted_adapter(list(entry), list(entry.values()), f"sum{index}", combination_type="cat")
            sums[index] = f"sum{index}"
    names = [sums.get(index, "__base__" if entry == -1 else entry) for index, entry in enumerate(MIXTURES)]
    with torch.no_grad():
        want = torch.cat(row_by_row(model, names, left_padded(), lambda row: model(**row, use_cache=False).logits))
    tokens = row_by_row(model, names, left_padded(), lambda row: model.generate(**row, max_new_tokens=6))
    peft_multibatch.enable(model, fuse=fuse)
    assert_close(logits(model, MIXTURES), want)
    assert torch.equal(model.generate(**left_padded(), max_new_tokens=6, adapter_ids=MIXTURES), torch.cat(tokens))
    plain = [entry if not isinstance(entry, dict) else "eight" for entry in MIXTURES]
    assert_close(logits(model, plain), wanted(model, plain))


def test_beams():
    model = peft_model()
    peft_multibatch.enable(model)
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2}
    want = expected(model, MIXTURES, left_padded(), lambda row: model.generate(**row, **options))
    assert torch.equal(model.generate(**left_padded(), **options, adapter_ids=MIXTURES), want)


def test_changes_are_seen():
    model = peft_model()
    mb = peft_multibatch.enable(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with mb.batch(MIXTURES):
        before = logits(model)
        layer.lora_B["eight"].weight.data.mul_(3)
        after = logits(model)
        layer.set_scale("eight", 0.1)
        last = logits(model)
    assert_close(last, wanted(model, MIXTURES))
    assert not torch.allclose(before, after, atol=1e-4)


def test_one_graph_for_any_mixture(compiled):
    model, mb, fast, graphs = compiled
    with mb.batch(["three"] * 6):
        logits(fast)
    for entries in (MIXTURES, *OTHERS, MIXTURES):
        with mb.batch(entries):
            actual = logits(fast)
        assert_close(actual, wanted(model, entries))
    assert len(graphs) == 2  # one for a single adapter per row, and one for three


def test_gradients():
    model = peft_model().train()
    model.set_requires_grad(["three", "four", "eight"])
    weights = [parameter for name, parameter in model.named_parameters() if "lora_" in name]

    inputs = left_padded()["input_ids"]

    def gradients(input_ids, **ids):
        model.set_requires_grad(["three", "four", "eight"])  # PEFT's set_adapter freezes the others
        found = torch.autograd.grad(model(input_ids, **ids).logits.square().sum(), weights, allow_unused=True)
        return torch.cat([torch.zeros(w.numel()) if g is None else g.flatten() for w, g in zip(weights, found)])

    alone = [(entry, inputs[row : row + 1]) for row, entry in enumerate(MIXTURES) if entry != -1]
    want = sum(several(model, entry, lambda row=row: gradients(row)) for entry, row in alone)
    peft_multibatch.enable(model)
    assert_close(gradients(inputs, adapter_ids=MIXTURES), want)


ENTRIES = [{"one": 0.5, "two": -2.0}, "two", {"two": 1.0, "one": 1.0}, -1, {"one": 0.5, "two": -2.0}]


@pytest.mark.parametrize(
    "layer,options",
    [("embedding", {}), ("conv1d", {}), ("conv2d", {}), ("linear", {"lora_bias": True}), ("linear", {})],
    ids=["embedding", "conv1d", "conv2d", "bias", "linear"],
)
def test_layers(layer, options):
    model = build(layer, **options)
    x = make_input(layer)
    want = expected(model, ENTRIES, {"x": x}, lambda row: model(layer=layer, x=row["x"]))
    peft_multibatch.enable(model)
    assert_close(model(layer=layer, x=x, adapter_ids=ENTRIES), want)


def test_a_head_without_copies_runs_the_base_models_own():
    model = build(second={"modules_to_save": ["head"]})
    peft_multibatch.enable(model)
    x = make_input("head")
    with pytest.raises(errors.UnsupportedError, match="a mixture names adapter 'two', whose output in head"):
        model(layer="head", x=x, adapter_ids=ENTRIES)
    entries = [{"one": 0.5}, "two", {"one": 2.0}, -1, "two"]
    want = expected(model, [-1, "two", -1, -1, "two"], {"x": x}, lambda row: model(layer="head", x=row["x"]))
    assert_close(model(layer="head", x=x, adapter_ids=entries), want)


def test_dora_is_refused_in_a_mixture_and_runs_beside_it():
    model = build(second={"use_dora": True})
    x = make_input("linear")
    want = expected(model, [{"one": 0.5}, "two", -1, "two", "one"], {"x": x}, lambda row: model("linear", row["x"]))
    peft_multibatch.enable(model)
    with torch.no_grad():
        assert_close(model("linear", x=x, adapter_ids=[{"one": 0.5}, "two", -1, "two", "one"]), want)
    with pytest.raises(errors.UnsupportedError, match="a mixture names 'two', a DoRA adapter"):
        model("linear", x=x, adapter_ids=ENTRIES)


def test_another_tuner_is_refused():
    model = get_peft_model(base_model(), IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"],
                           feedforward_modules=[]), "other")  # fmt: skip
    peft_multibatch.enable(model)
    with pytest.raises(errors.UnsupportedError, match=r"whose output in .* isn't a delta that can be weighted"):
        logits(model, [{"other": 0.5}] * 6)


@pytest.mark.parametrize(
    "entry,message",
    [
        ({}, "adapter_ids[1] is an empty mixture: expected at least one adapter"),
        ({"a": "much"}, "gives 'a' the weight 'much' of type str: expected a finite number"),
        ({"a": float("nan")}, "gives 'a' the weight nan of type float"),
        ({"a": 1e39}, "gives 'a' the weight 1e+39 of type float"),
        ({"a": True}, "gives 'a' the weight True of type bool"),
        ({"a": torch.tensor(0.5, requires_grad=True)}, "of type Tensor: expected a finite number"),
        ({"a": None}, "gives 'a' the weight None of type NoneType"),
        ({"a": 0.5, -1: 0.5}, "gives the base model a weight: expected only adapters"),
        ({"a": 0.5, 0: 0.5}, "names 'a' twice: expected each adapter once"),
        ({"c": 0.5}, "is 'c', and no adapter has this name"),
        ({7: 0.5}, "is 7, and no adapter has this id"),
    ],
)
def test_bad_mixtures(entry, message):
    with pytest.raises(errors.AdapterIdsError) as caught:
        resolve(["a", entry], AdapterNames(["a", "b"]))
    assert message in str(caught.value)


def test_what_a_mixture_comes_to():
    entries = resolve([{"b": 2, "a": 0.5}, {"a": 1}, {"a": 0.0}, {"a": 0.0, 1: 3}, "b"], AdapterNames(["a", "b"]))
    assert entries == [((0, 0.5), (1, 2.0)), 0, -1, ((1, 3.0),), 1]
    assert components(entries) == [
        ([0, 0, -1, 1, 1], [0.5, 1.0, 1.0, 3.0, 1.0]),
        ([1, -1, -1, -1, -1], [2.0, 1, 1, 1, 1]),
    ]
    assert components([0, -1]) == [([0, -1], None)]


def test_segments_of_a_slot_with_several_weights():
    plan = Segments.from_ids([0, 0, 1, 0, -1], weights=[0.5, 0.5, 1.0, -2.0, 1.0])
    assert (plan.num_entries, plan.num_segments) == (5, 4)
    plan = Segments.unpack(plan.pack())
    assert plan.weight_indices.tolist() == [0, 1, 0, -1]
    assert plan.scales == [0.5, 1.0, -2.0, 1.0]
    assert plan.permutation is None
    plan = Segments.from_ids([0, 1, 0, 1], weights=[0.5, 1, 0.5, 1])
    assert (plan.num_segments, sorted(plan.scales)) == (2, [0.5, 1.0])
    assert Segments.from_ids([0, 1], weights=[0.5, 1], lens=[2, 1]).seg_lens.tolist() == [2, 1]


def test_ops():
    plan = Segments.from_ids([0, 1, 0, -1, 0], weights=[0.5, 1.0, -2.0, 1.0, 0.5]).pack()
    x = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    a = [torch.randn(rank, 6, dtype=torch.float64, requires_grad=True) for rank in (2, 3)]
    b = [torch.randn(4, rank, dtype=torch.float64, requires_grad=True) for rank in (2, 3)]
    ranks, scalings = torch.tensor([[2], [3]], dtype=torch.int32), torch.tensor([[1.5], [0.5]])

    def run(module, x, a0, a1, b0, b1):
        h = module.shrink(x, [a0, a1], plan, ranks)
        return module.expand(h, [b0, b1], plan, ranks, scalings, [0, 4])

    assert_close(run(ops, x, *a, *b).detach(), run(ops.reference, x, *a, *b).detach())
    assert torch.autograd.gradcheck(lambda *args: run(ops, *args), (x, *a, *b))


# With kernels, on a GPU or in Triton's interpreter.


@pytest.fixture
def on_kernels():
    triton_backend = pytest.importorskip("peft_multibatch.ops.triton_backend", reason="needs triton")
    if DEVICE == "cpu" and not triton_backend.INTERPRETED:
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    model = peft_model().to(DEVICE)
    return model, peft_multibatch.enable(model, backend="triton")


def test_kernels(on_kernels):
    model, mb = on_kernels
    for entries in (MIXTURES, *OTHERS):
        assert_close(logits(model, entries), wanted(model, entries))
    mb.disable()


def test_a_graph_of_kernels(on_kernels):
    torch._dynamo.reset()
    model, mb = on_kernels
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    fast = torch.compile(model.get_base_model(), fullgraph=True, backend=backend)
    for entries in (OTHERS[1], MIXTURES, *OTHERS):
        with mb.batch(entries):
            actual = logits(fast)
        assert_close(actual, wanted(model, entries))
    assert len(graphs) == 2
    mb.disable()


def test_adapters_of_a_mixture_that_are_deleted():
    model = peft_model()
    model.add_adapter("extra", lora_configs()["three"])
    mb = peft_multibatch.enable(model)
    with mb.batch([{"extra": 0.5, "four": 0.5}] * 6):
        model.delete_adapter("extra")
        with pytest.raises(errors.UnknownAdapterError, match=r"was deleted inside an mb\.batch\(\) block"):
            logits(model)
