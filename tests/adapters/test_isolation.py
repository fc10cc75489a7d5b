"""Errors and special cases of one adapter don't affect the others."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from models import alone, base_model, left_padded, lora_configs, peft_model, row_by_row
from peft import LoraConfig, get_peft_model
from tolerances import assert_close
from torch import nn

import peft_multibatch
from peft_multibatch import errors


NAMES = ["three", "eight", "__base__", "four", "three", "eight"]
OTHERS = [name if name != "eight" else "four" for name in NAMES]


def logits(model, **ids):
    with torch.no_grad():
        return model(**left_padded(), **ids).logits


def expected(model, names):
    return torch.cat(row_by_row(model, names, left_padded(), lambda row: logits_of(model, row)))


def logits_of(model, row):
    with torch.no_grad():
        return model(**row).logits


def layer_of(model, name="q_proj"):
    return getattr(model.base_model.model.model.layers[0].self_attn, name)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


def hook_half(layer):
    layer.lora_A["eight"].register_forward_hook(lambda module, args, output: 3 * output)


def hook_before(layer):
    layer.lora_B["eight"].register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def hook_dropout(layer):
    layer.lora_dropout["eight"].register_forward_hook(lambda module, args, output: output + 1)


def hook_backward(layer):
    layer.lora_B["eight"].register_full_backward_hook(lambda module, before, after: None)


def give_a_bias(layer):
    layer.lora_B["eight"].bias = nn.Parameter(torch.randn(layer.out_features))


def replace_forward(layer):
    half = layer.lora_A["eight"]
    half.forward = lambda x: nn.functional.linear(x, -half.weight)


def replace_class(layer):
    other = Doubled(layer.in_features, 8, bias=False)
    other.weight = layer.lora_A["eight"].weight
    layer.lora_A["eight"] = other


def replace_dropout(layer):
    layer.lora_dropout["eight"] = Halved()


SPECIAL = [
    hook_half, hook_before, hook_dropout, hook_backward, give_a_bias, replace_forward, replace_class, replace_dropout,
]  # fmt: skip


@pytest.mark.parametrize("fuse", [True, False, "weights"])
@pytest.mark.parametrize("projection", ["q_proj", "v_proj"])
@pytest.mark.parametrize("change", SPECIAL, ids=lambda change: change.__name__)
def test_what_only_pefts_module_can_run_runs_beside_the_others(change, projection, fuse, monkeypatch):
    """This also holds if the change comes after the adapter was read, and in fused groups."""
    model = peft_model()
    mb = peft_multibatch.enable(model, fuse=fuse)
    before = logits(model, adapter_ids=NAMES)
    ways = [entry.how for entry in mb.report()]
    change(layer_of(model, projection))
    right = expected(model, NAMES)
    after = logits(model, adapter_ids=NAMES)
    assert_close(after, right)
    assert torch.allclose(before, after, atol=1e-5) == (change is hook_backward)
    assert [entry.how for entry in mb.report()] == ways
    assert [bool(adapter.reason) for adapter in mb.report().adapters] == [False, False, True]
    # all others run as before
    calls = []
    monkeypatch.setattr(type(layer_of(model)), "forward", lambda *args, **kwargs: calls.append(args))
    logits(model, adapter_ids=OTHERS)
    assert calls == []


def test_hooks_on_all_modules_see_every_half():
    model = peft_model()
    peft_multibatch.enable(model)
    halves = {half for part in ("lora_A", "lora_B") for half in getattr(layer_of(model), part).values()}
    seen = set()

    def triple(module, args, output):
        seen.add(module)
        return 3 * output if module in halves else None

    logits(model, adapter_ids=NAMES)
    with contextlib.ExitStack() as stack:
        handle = nn.modules.module.register_module_forward_hook(triple)
        stack.callback(handle.remove)
        right = expected(model, NAMES)
        seen.clear()
        assert_close(logits(model, adapter_ids=NAMES), right)
        assert seen >= halves
    assert_close(logits(model, adapter_ids=NAMES), expected(model, NAMES))


def test_dropout_is_part_of_the_product(monkeypatch):
    """Monte-Carlo dropout: the model is in eval mode, and one adapter's dropout in train mode."""
    shared = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base_model(), LoraConfig(r=4, **shared), "plain")
    model.add_adapter("drops", LoraConfig(r=4, lora_dropout=0.5, **shared))
    mb = peft_multibatch.enable(model.eval())
    names = ["plain", "drops", "__base__", "drops", "plain", "plain"]
    before = logits(model, adapter_ids=names)
    assert_close(before, expected(model, names))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    once, twice = logits(model, adapter_ids=names), logits(model, adapter_ids=names)
    for row, name in enumerate(names):
        assert torch.allclose(once[row], before[row], atol=1e-5) == (name != "drops")
        assert torch.allclose(once[row], twice[row], atol=1e-5) == (name != "drops")
    assert {entry.how for entry in mb.report()} == {"fused q_proj/v_proj"}
    ran = []
    forward = type(layer_of(model)).forward
    monkeypatch.setattr(
        type(layer_of(model)), "forward", lambda self, x, **kwargs: ran.append(len(x)) or forward(self, x, **kwargs)
    )
    logits(model, adapter_ids=names)
    assert not ran
    # a hooked adapter's rows need PEFT's module
    layer_of(model).lora_dropout["drops"].register_forward_hook(lambda *_: None)
    logits(model, adapter_ids=names)
    assert set(ran) == {2}


def segmenting_clip():
    shared = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**shared, "vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 1}
    vision = {**shared, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPSegConfig(
        text_config=text, vision_config=vision, projection_dim=8, extract_layers=[0], reduce_dim=8
    )
    torch.manual_seed(0)
    shared = {"r": 2, "init_lora_weights": False}
    model = transformers.CLIPSegForImageSegmentation(config)
    return (
        get_peft_model(model, LoraConfig(target_modules=r".*text.*q_proj", **shared), "text"),
        LoraConfig(target_modules=r".*(vision|text).*v_proj", **shared),
    )


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
def test_an_adapter_that_cannot_be_mixed_is_refused_and_the_others_run():
    model, config = segmenting_clip()
    model.eval()
    text, ids = model.base_model.model.clip.text_model, torch.randint(2, 50, (4, 5))
    names = ["text", "__base__", "text", "text"]
    with torch.no_grad():
        right = [
            alone(model, name, lambda row=row: text(ids[row : row + 1]).last_hidden_state)
            for row, name in enumerate(names)
        ]
    mb = peft_multibatch.enable(model)

    def mixed(names):
        with torch.no_grad(), mb.batch(names):
            return text(ids).last_hidden_state

    assert_close(mixed(names), torch.cat(right))
    for _ in range(2):
        model.add_adapter("vision", config)
        model.eval()
        assert mb.adapter_names == ["text", "vision"]
        assert_close(mixed(names), torch.cat(right))
        with pytest.raises(errors.UnsupportedError, match=r"adapter 'vision' can't run in a mixed batch: .*vision"):
            mixed([*names[:3], "vision"])
        found = {adapter.name: adapter for adapter in mb.report().adapters}
        assert (found["text"].state, found["vision"].state) == ("ready", "refused")
        assert "vision or audio part" in found["vision"].reason
        assert_close(mixed(names), torch.cat(right))
        model.delete_adapter("vision")  # PEFT leaves empty layers behind
        assert_close(mixed(names), torch.cat(right))
    assert mb.adapter_names == ["text", None]


def test_an_adapter_that_reaches_no_layer_is_not_the_base_model():
    model = peft_model()
    mb = peft_multibatch.enable(model)
    model.add_adapter("nowhere", lora_configs()["three"])
    for module in list(model.modules()):
        if hasattr(module, "lora_A") and "nowhere" in module.lora_A:
            module.delete_adapter("nowhere")
    with pytest.raises(errors.AdapterMismatchError, match="adapter 'nowhere' has no weights in any layer"):
        logits(model, adapter_ids=[*NAMES[:-1], "nowhere"])
    assert_close(logits(model, adapter_ids=NAMES), expected(model, NAMES))
    (*_, last) = mb.report().adapters
    assert (last.state, last.layers, last.version) == ("broken", 0, -1)


def test_a_call_ends_whatever_is_wrong_with_another(monkeypatch):
    """When it ends, graphs are to read the plan of the one that continues."""
    model = peft_model()
    mb = peft_multibatch.enable(model)
    graph = mb._router.graph
    graph._tables.add(graph.banks[0], torch.device("cpu"))
    refused = []

    def refuse(plan, _):
        refused.append([adapter.name for adapter in plan.adapters.values()])
        raise errors.ModelStateError("its weights are elsewhere")

    with mb.batch(["three"] * 2):
        monkeypatch.setattr(graph._tables, "bring_up_to_date", refuse)
        graph._written = None

        def run():
            with mb.batch(["eight"] * 2):
                pass

        with ThreadPoolExecutor(1) as pool:
            pool.submit(run).result()
        assert refused == [["three"]] and graph.active and not graph.contended
    assert not graph._calls and not graph.active


def test_weights_are_read_on_request():
    model = peft_model()
    model.add_adapter("untrained", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    layer_of(model).lora_B["eight"].weight.data[0, 0] = torch.nan
    mb = peft_multibatch.enable(model)
    assert [adapter.state for adapter in mb.report().adapters] == ["ready"] * 4
    three, four, eight, untrained = mb.report(check_weights=True).adapters
    assert (three.state, three.reason, four.state, four.reason) == ("ready", "", "ready", "")
    assert (eight.state, eight.reason) == ("broken", "some of its weights are not finite")
    assert untrained.reason.startswith("it equals the base model: every lora_B is zero")


def test_blocks_are_entered_in_every_way_that_context_managers_are():
    model = peft_model()
    mb = peft_multibatch.enable(model)
    right, plain = expected(model, NAMES), logits(model)

    @mb.batch(NAMES)
    def decorated():
        return logits(model)

    assert_close(decorated(), right)
    assert_close(decorated(), right)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mb.batch(NAMES))
        assert_close(logits(model), right)
    block = mb.batch(NAMES)
    block.__enter__()
    assert_close(logits(model), right)
    block.__exit__(None, None, None)
    assert torch.equal(logits(model), plain)
    with pytest.raises(ZeroDivisionError), mb.batch(NAMES):
        raise ZeroDivisionError
    assert torch.equal(logits(model), plain)
