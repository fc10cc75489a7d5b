"""`enable` and `disable`: calls without ids, leftovers, threads, exceptions and copies."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading

import peft.tuners.lora.layer
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from models import base_model, left_padded, lora_configs, peft_model, row_by_row
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tolerances import assert_close

import peft_multibatch


NAMES = ["three", "eight", "__base__", "four", "three", "eight"]


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**left_padded(), **kwargs).logits


def attributes(model):
    """Return everything that enabling could leave in a module: instance attributes by identity, and hooks."""
    return {
        name: {key: id(value) for key, value in module.__dict__.items()} | {"hooks": len(module._forward_pre_hooks)}
        for name, module in model.named_modules()
    }


def test_disable_leaves_no_trace(tmp_path):
    model = peft_model()
    plain, state = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    generated = model.generate(**left_padded(), max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path / "before")
    before = attributes(model)

    mb = peft_multibatch.enable(model)
    logits(model, adapter_ids=NAMES)
    model.generate(**left_padded(), max_new_tokens=2, adapter_ids=NAMES)
    assert torch.equal(logits(model), plain)  # enabled, without ids: as PEFT
    assert list(model.state_dict()) == list(state)
    model.save_pretrained(tmp_path / "between")
    mb.disable()

    # transformers and PEFT cache generation settings, with or without this package
    def comparable(found):
        return {name: {k: v for k, v in values.items() if k != "generation_config"} for name, values in found.items()}

    assert comparable(attributes(model)) == comparable(before)
    assert torch.equal(logits(model), plain)
    assert torch.equal(model.generate(**left_padded(), max_new_tokens=4, do_sample=False), generated)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "after")
    files = sorted(
        path.relative_to(tmp_path / "before") for path in (tmp_path / "before").rglob("*") if path.is_file()
    )
    assert len(files) >= 6
    for folder in ("between", "after"):
        for file in files:
            assert (tmp_path / folder / file).read_bytes() == (tmp_path / "before" / file).read_bytes(), file


def test_torch_save_of_a_state_dict_is_the_same_file():
    def saved(model):
        buffer = io.BytesIO()
        torch.save({key: value for key, value in model.state_dict().items() if "lora_" in key}, buffer)
        return len(buffer.getvalue())

    model = peft_model()
    before = saved(model)
    peft_multibatch.enable(model)
    logits(model, adapter_ids=NAMES)
    assert saved(model) == before


def test_enable_is_idempotent():
    model = peft_model()
    mb = peft_multibatch.enable(model)
    assert peft_multibatch.enable(model) is mb
    assert peft_multibatch.enable(model.get_base_model()) is mb
    peft_multibatch.disable(model)
    peft_multibatch.disable(model)
    again = peft_multibatch.enable(model)
    assert again is not mb
    with pytest.raises(peft_multibatch.NotEnabledError, match="this handle was disabled"), mb.batch(NAMES):
        pass


def test_enable_inside_out():
    """Enable the inner model first, then the PeftModel around it: there is one handle, and PEFT's own argument
    works on both."""
    model = peft_model()
    expected = torch.cat(row_by_row(model, NAMES, left_padded(), lambda row: logits_of(model, row)))
    mb = peft_multibatch.enable(model.get_base_model())
    assert peft_multibatch.enable(model) is mb
    for outer in (model, model.get_base_model()):
        assert_close(logits(outer, adapter_names=NAMES), expected)
    mb.disable()
    assert "forward" not in model.__dict__


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_adapter_names_takes_the_fast_path(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("PEFT's own loop over adapters ran")

    model = peft_model()
    expected = logits(model, adapter_names=NAMES)
    peft_multibatch.enable(model)
    monkeypatch.setattr(peft.tuners.lora.layer.LoraLayer, "_mixed_batch_forward", never)
    assert_close(logits(model, adapter_names=NAMES), expected)


def test_none_means_no_ids():
    model = peft_model()
    plain = logits(model)
    peft_multibatch.enable(model)
    assert torch.equal(logits(model, adapter_ids=None, adapter_names=None), plain)


@pytest.mark.parametrize("call", ["forward", "generate", "batch()"])
def test_after_an_exception_the_next_call_is_plain(call):
    model = peft_model()
    plain = logits(model)
    mb = peft_multibatch.enable(model)

    def fail(*args):
        raise KeyError("in the middle of a forward")

    handle = model.base_model.model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(KeyError, match="in the middle"):
        if call == "forward":
            logits(model, adapter_ids=NAMES)
        elif call == "generate":
            model.generate(**left_padded(), max_new_tokens=2, adapter_ids=NAMES)
        else:
            with mb.batch(NAMES):
                logits(model)
    handle.remove()
    assert torch.equal(logits(model), plain)
    assert mb._router.active() is None
    assert not mb._router.graph.active
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_batches_nest():
    model = peft_model()
    mb = peft_multibatch.enable(model)
    plain, mixed = logits(model), logits(model, adapter_ids=NAMES)
    with mb.batch(NAMES):
        assert torch.equal(logits(model), mixed)
        assert torch.equal(logits(model, adapter_ids=[-1] * 6), logits(model, adapter_ids=["__base__"] * 6))
        with mb.batch(["eight"] * 6):
            eight = logits(model)
        assert torch.equal(logits(model), mixed)
    assert torch.equal(eight, logits(model, adapter_ids=[2] * 6))
    assert torch.equal(logits(model), plain)


def test_two_threads_get_their_own_rows():
    model = peft_model()
    mixes = [NAMES, NAMES[::-1], ["eight"] * 6, None]
    plain = logits(model)
    mb = peft_multibatch.enable(model)
    expected = [plain if mix is None else logits(model, adapter_ids=mix) for mix in mixes]
    barrier, wrong = threading.Barrier(len(mixes)), []

    def work(index):
        barrier.wait()
        for turn in range(15):
            if mixes[index] is None:
                result = logits(model)
            elif turn % 2:
                result = logits(model, adapter_ids=mixes[index])
            else:
                with mb.batch(mixes[index]):
                    result = logits(model)
            if not torch.equal(result, expected[index]):
                wrong.append((index, turn))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(mixes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_two_models_do_not_meet():
    first, second = peft_model(), peft_model()
    mb = peft_multibatch.enable(first)
    peft_multibatch.enable(second)
    plain = logits(second)
    with mb.batch(NAMES):
        assert torch.equal(logits(second), plain)


def test_a_copy_is_plain_and_says_so():
    model = peft_model()
    peft_multibatch.enable(model)
    mixed = logits(model, adapter_ids=NAMES)
    twin = copy.deepcopy(model)
    with pytest.raises(peft_multibatch.NotEnabledError, match="passed to a copy of an enabled model"):
        logits(twin, adapter_ids=NAMES)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert logits(twin).abs().sum() > 0  # the copy runs with its own weights
    peft_multibatch.enable(twin)
    assert torch.equal(logits(twin, adapter_ids=NAMES), mixed)


def test_pickle_gives_a_plain_model():
    model = peft_model()
    plain = logits(model)
    peft_multibatch.enable(model)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin), plain)
    peft_multibatch.enable(twin)
    assert torch.equal(logits(twin, adapter_ids=NAMES), logits(model, adapter_ids=NAMES))


@pytest.mark.parametrize("method", ["forward", "generate"])
@pytest.mark.parametrize("hooks", ["none", "before", "after"])
def test_signatures_are_the_models_own_and_name_ids(method, hooks):
    model = peft_model()
    parts = [model, model.get_base_model(), model.get_base_model().model][: 2 if method == "generate" else 3]
    before = [dict(inspect.signature(getattr(part, method)).parameters) for part in parts]
    if hooks == "before":
        add_hook_to_module(parts[1], AlignDevicesHook("cpu"))
    mb = peft_multibatch.enable(model)
    if hooks == "after":
        add_hook_to_module(parts[1], AlignDevicesHook("cpu"))
    for part, known in zip(parts, before):
        found = dict(inspect.signature(getattr(part, method)).parameters)
        ids = found.pop("adapter_ids")
        found.pop("self", None)  # accelerate copies the signature of the unbound function
        assert ids.kind is inspect.Parameter.KEYWORD_ONLY and ids.default is None
        assert found == known
    mb.disable()
    for part, known in zip(parts, before):
        found = dict(inspect.signature(getattr(part, method)).parameters)
        found.pop("self", None)
        assert "adapter_ids" not in found or hooks == "after"
        assert found.keys() - {"adapter_ids"} == known.keys()


def test_plain_modules_with_injected_adapters():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(6, 6)

        def forward(self, x):
            return self.linear(x)

    net = Net()
    for name in ("one", "two"):
        net = inject_adapter_in_model(LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False), net, name)
    x = torch.randn(4, 6)
    mb = peft_multibatch.enable(net)
    assert mb.adapter_names == ["one", "two"]
    mixed = net(x, adapter_ids=[0, 1, -1, 0])
    layer = net.linear
    expected = layer.base_layer(x)
    for row, name in [(0, "one"), (1, "two"), (3, "one")]:
        delta = layer.lora_B[name](layer.lora_A[name](x[row])) * layer.scaling[name]
        expected = expected.index_add(0, torch.tensor([row]), delta[None])
    assert_close(mixed, expected)


def test_adapters_added_to_an_enabled_model_without_any():
    model = base_model()
    mb = peft_multibatch.enable(model)
    assert mb.adapter_names == []
    for name, config in lora_configs().items():
        model.add_adapter(config, adapter_name=name)
    assert mb.adapter_names == ["three", "four", "eight"]
    assert not torch.allclose(logits(model, adapter_ids=NAMES)[2], logits(model, adapter_ids=[0] * 6)[2])


def test_unloaded_adapters_are_gone():
    model = peft_model()
    peft_multibatch.enable(model)
    inner = model.unload()
    with pytest.raises(peft_multibatch.NoAdaptersError):
        logits(inner, adapter_ids=NAMES)


def test_sequence_classification_with_a_head_per_adapter():
    import transformers

    config = transformers.LlamaConfig(**{**base_model().config.to_dict(), "num_labels": 3})
    shared = {"task_type": "SEQ_CLS", "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]}
    model = get_peft_model(
        transformers.LlamaForSequenceClassification(config), LoraConfig(r=4, **shared), adapter_name="one"
    )
    model.add_adapter("two", LoraConfig(r=2, **shared))
    for name in ("one", "two"):
        torch.nn.init.normal_(model.base_model.model.score.modules_to_save[name].weight)
    model.eval()
    names = ["one", "two", "__base__", "two", "one", "one"]
    expected = torch.cat(row_by_row(model, names, left_padded(), lambda row: logits_of(model, row)))
    peft_multibatch.enable(model)
    assert_close(logits(model, adapter_ids=names), expected)


def test_accelerate_hooks_stay_in_their_place():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model = peft_model()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    expected = torch.cat(row_by_row(model, NAMES, left_padded(), lambda row: logits_of(model, row)))
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    mb = peft_multibatch.enable(model)
    assert_close(logits(model, adapter_ids=NAMES), expected)
    mb.disable()
    mb = peft_multibatch.enable(model)
    remove_hook_from_module(layer)
    mb.disable()
    assert "_hf_hook" not in layer.__dict__
    plain = logits(model)
    peft_multibatch.enable(model)
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))  # wraps ours
    assert_close(logits(model, adapter_ids=NAMES), expected)
    peft_multibatch.disable(model)
    assert torch.equal(logits(model), plain)


def test_loading_from_disk_into_an_enabled_model(tmp_path):
    model = peft_model()
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(base_model(), tmp_path / "three", adapter_name="three").eval()
    mb = peft_multibatch.enable(fresh)
    for name in ("four", "eight"):
        fresh.load_adapter(tmp_path / name, adapter_name=name)
    assert mb.adapter_names == ["three", "four", "eight"]
    peft_multibatch.enable(model)
    assert_close(logits(fresh, adapter_ids=NAMES), logits(model, adapter_ids=NAMES))
