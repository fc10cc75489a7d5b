"""Stored adapters match PEFT with the same files loaded, and don't change the model."""

from __future__ import annotations

import copy
import pickle
import time

import pytest
import torch
from models import base_model, left_padded, lora_configs, row_by_row
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from stored import WEIGHTS, by_peft, expected, logits, save, save_all
from tolerances import assert_close
from torch import nn
from transformers import GenerationConfig

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.plan.ids import resolve
from peft_multibatch.plan.names import AdapterNames


NAMES = ["three", "eight", "__base__", "four", "three", "eight"]
GREEDY = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def stored(folder):
    """A model without PEFT adapters, and its store."""
    model = base_model()
    store = peft_multibatch.enable(model).adapter_store(max_host_memory="10MB")
    store.register_folder(folder)
    return model, store


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "opt", "bloom", "gemma3", "deepseek_v3"])
def test_rows_are_those_of_peft(architecture, tmp_path):
    folder = save_all(tmp_path, architecture)
    model = base_model(architecture)
    store = peft_multibatch.enable(model).adapter_store()
    assert store.register_folder(folder).refused == {}
    inputs = left_padded()
    assert_close(logits(model, inputs, adapter_ids=NAMES), expected(NAMES, folder, logits, architecture=architecture))


SETTINGS = {
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "one layer, of a list that is named": {
        "target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "layers",
    },
    "a pattern": {"target_modules": r".*\.(q|k)_proj$"},
    "excluded modules": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "an excluded pattern": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.1.*"},
    "ranks and alphas by pattern": {
        "target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True, "lora_alpha": 3,
        "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 9},
    },
    "whole names": {"target_modules": ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.up_proj"]},
    "the head": {"target_modules": ["lm_head"]},
    "all linear layers": {"target_modules": "all-linear"},
    "no scaling": {"target_modules": ["q_proj"], "lora_alpha": 0},
}  # fmt: skip


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_settings_mean_what_they_mean_to_peft(tmp_path, options):
    folder = save(tmp_path / "own", LoraConfig(r=4, init_lora_weights=False, **options))
    model = base_model()
    peft_multibatch.enable(model).adapter_store().register("own", folder)
    names = ["own", "__base__", "own"]
    actual = logits(model, left_padded(3), adapter_ids=names)
    assert_close(actual, expected(names, {"own": folder}, logits))
    if options.get("lora_alpha") != 0:
        assert not torch.equal(actual[0], logits(model, left_padded(3))[0])


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_models_with_an_encoder(architecture, tmp_path):
    folder = save_all(tmp_path, architecture)
    model = base_model(architecture)
    peft_multibatch.enable(model).adapter_store().register_folder(folder)

    def call(model, inputs, **ids):
        return model.generate(**inputs, **ids, generation_config=GREEDY)

    actual = call(model, left_padded(), adapter_ids=NAMES)
    assert torch.equal(actual, expected(NAMES, folder, call, architecture=architecture))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generate(stored, folder, options):
    model, _ = stored

    def call(model, inputs, **ids):
        return model.generate(**inputs, **ids, generation_config=GREEDY, **options)

    assert torch.equal(call(model, left_padded(), adapter_ids=NAMES), expected(NAMES, folder, call))


def test_batch_blocks_and_parts_of_the_model(stored, folder):
    model, _ = stored
    mb = peft_multibatch.enable(model)

    def call(model, inputs):
        part = model.get_base_model().model if isinstance(model, PeftModel) else model.model
        with torch.no_grad():
            return part(**inputs).last_hidden_state

    with mb.batch(NAMES):
        actual = call(model, left_padded())
    assert_close(actual, expected(NAMES, folder, call))


def test_blocks_check_their_ids(stored):
    """The modules that stored adapters use have no adapter of PEFT's in the model."""
    model, _ = stored
    mb = peft_multibatch.enable(model)
    for ids in (["three", "eight"], ["three"] * 12):
        with mb.batch(ids), pytest.raises(errors.AdapterIdsLengthError, match="expected one entry per sample"):
            logits(model, left_padded(6))
        with mb.batch(ids), pytest.raises(errors.AdapterIdsLengthError, match="expected one entry per sample"):
            model.generate(**left_padded(6), generation_config=GREEDY)


@pytest.mark.parametrize("fuse", [True, False, "weights"])
def test_fused_projections(folder, fuse):
    model = base_model()
    mb = peft_multibatch.enable(model, fuse=fuse)
    mb.adapter_store().register_folder(folder)
    assert_close(logits(model, left_padded(), adapter_ids=NAMES), expected(NAMES, folder, logits))
    hows = {layer.name: layer.how for layer in mb.report()}
    q_proj = hows["model.layers.0.self_attn.q_proj"]
    assert q_proj == {True: "fused q_proj/k_proj/v_proj", False: "segmented"}.get(fuse, q_proj)


@pytest.mark.parametrize("is_global", [False, True])
def test_hooks_of_modules_run(stored, folder, is_global):
    model, _ = stored
    seen = []

    def note(module, *_):
        seen.append(module)

    layer = model.model.layers[0].self_attn.q_proj
    register = nn.modules.module.register_module_forward_hook if is_global else layer.register_forward_hook
    with register(note):
        actual = logits(model, left_padded(), adapter_ids=NAMES)
    assert_close(actual, expected(NAMES, folder, logits))
    assert layer in seen


def test_the_triton_kernels(folder):
    model = base_model()
    mb = peft_multibatch.enable(model, backend="triton")
    mb.adapter_store().register_folder(folder)
    assert_close(logits(model, left_padded(), adapter_ids=NAMES), expected(NAMES, folder, logits))


# Together with PEFT's adapters.


@pytest.fixture
def both(folder):
    """A `PeftModel` with the adapters p-three and p-four, and three, four and eight in its store."""
    configs = lora_configs()
    model = get_peft_model(base_model(), configs["three"], adapter_name="p-three")
    model.add_adapter("p-four", configs["four"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    store = peft_multibatch.enable(model.eval()).adapter_store()
    store.register_folder(folder)
    return model, store


def in_peft(both, folder):
    """The same model with all adapters in PEFT's modules."""
    model, _ = both
    other = get_peft_model(base_model(), lora_configs()["three"], adapter_name="p-three")
    other.add_adapter("p-four", lora_configs()["four"])
    other.load_state_dict(model.state_dict())
    for name in ("three", "four", "eight"):
        other.load_adapter(str(folder / name), name)
    return other.eval()


@pytest.fixture
def partly(folder):
    """A `PeftModel` with one adapter, only on q_proj, and three, four and eight in its store."""
    model = get_peft_model(base_model(), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    store = peft_multibatch.enable(model.eval()).adapter_store()
    store.register_folder(folder)
    return model, store


MIXED = ["p-three", "eight", "__base__", "p-four", "three", "four"]


def test_stored_adapters_beside_those_of_peft(both, folder):
    model, _ = both
    reference = in_peft(both, folder)
    rows = row_by_row(reference, MIXED, left_padded(), lambda row: logits(reference, row))
    assert_close(logits(model, left_padded(), adapter_ids=MIXED), torch.cat(rows))


def test_mixtures_of_stored_adapters_and_those_of_peft(both, folder):
    model, _ = both
    reference = in_peft(both, folder)
    mixtures = [{"eight": 0.7, "p-four": 0.3}, {"three": 0.5, "eight": -0.5}, "__base__", {"p-three": 1, "p-four": 2}]
    other = peft_multibatch.enable(reference)
    inputs = left_padded(4)
    expected = logits(reference, inputs, adapter_ids=mixtures)
    assert_close(logits(model, inputs, adapter_ids=mixtures), expected)
    other.disable()


def test_calls_without_ids_are_peft_s(both, folder):
    model, _ = both
    reference = in_peft(both, folder)
    reference.set_adapter("p-three")
    assert torch.equal(logits(model, left_padded()), logits(reference, left_padded()))
    with model.disable_adapter():
        assert torch.equal(logits(model, left_padded()), logits(base_model(), left_padded()))


def test_disabled_adapters_are_the_base_model_on_all_layers(partly, folder):
    model, _ = partly
    names = ["eight", "default", "three"]
    with model.disable_adapter():
        actual = logits(model, left_padded(3), adapter_ids=names)
    assert torch.equal(actual, logits(base_model(), left_padded(3)))
    actual = logits(model, left_padded(3), adapter_ids=names)[0]
    assert_close(actual, expected(["eight"] * 3, folder, logits)[0])


def test_peft_adds_an_adapter_to_layers_that_only_stored_ones_had(stored, folder):
    """A call that began before continues with the same rows, wherever the new layers are."""
    model, _ = stored
    mb = peft_multibatch.enable(model)
    before = expected(NAMES, folder, logits)
    with mb.batch(NAMES):
        assert_close(logits(model, left_padded()), before)
        wrapped = get_peft_model(model, lora_configs()["eight"], adapter_name="new").eval()
        layers = [model.model.layers[0].self_attn.q_proj, model.model.layers[1].mlp.down_proj]
        assert all(hasattr(layer, "lora_A") for layer in layers)
        assert_close(logits(model, left_padded()), before)
    assert_close(logits(wrapped, left_padded(), adapter_ids=NAMES), before)
    names = ["new", "eight", "__base__"]
    reference = get_peft_model(base_model(), lora_configs()["eight"], adapter_name="new").eval()
    reference.load_state_dict(wrapped.state_dict())
    reference.load_adapter(str(folder / "eight"), "eight")
    rows = row_by_row(reference, names, left_padded(3), lambda row: logits(reference, row))
    assert_close(logits(wrapped, left_padded(3), adapter_ids=names), torch.cat(rows))
    with nn.modules.module.register_module_forward_hook(lambda *_: None):  # covers views of PEFT's layers
        assert_close(logits(wrapped, left_padded(3), adapter_ids=names), torch.cat(rows))
    base = wrapped.unload()
    assert_close(logits(base, left_padded(), adapter_ids=NAMES), before)


def test_the_same_name_in_peft_and_in_the_store(both, folder):
    model, store = both
    with pytest.raises(errors.ModelStateError, match=r"'p-three' was registered .*: expected different names"):
        store.register("p-three", folder / "three")
    with pytest.raises(errors.ModelStateError, match=r"'eight' was added .*: expected different names"):
        model.add_adapter("eight", lora_configs()["eight"])
    assert "eight" not in model.peft_config and "eight" in store
    rows = logits(model, left_padded(1), adapter_ids=["eight"])
    assert_close(rows, expected(["eight"], folder, logits))


# Ids.


def test_ids_follow_the_sequence_in_which_adapters_came(both, folder):
    model, store = both
    mb = peft_multibatch.enable(model)
    assert mb.adapter_names == ["p-three", "p-four", "eight", "four", "three"]
    store.unregister("four")
    model.add_adapter("later", lora_configs()["eight"])
    store.register("latest", folder / "four")
    store.register("four", folder / "four")
    assert mb.adapter_names == ["p-three", "p-four", "eight", "four", "three", "later", "latest"]
    model.delete_adapter("later")
    assert mb.adapter_names == ["p-three", "p-four", "eight", "four", "three", None, "latest"]
    actual = logits(model, left_padded(3), adapter_ids=torch.tensor([2, -1, 6]))
    assert_close(actual, expected(["eight", "__base__", "four"], folder, logits))


def test_names_that_nobody_has(stored):
    model, store = stored
    with pytest.raises(errors.UnknownAdapterError, match=r"no adapter has this name: expected one of 0"):
        logits(model, left_padded(1), adapter_ids=["ate"])
    for method in (store.unregister, store.prefetch, store.pin):
        with pytest.raises(errors.UnknownAdapterError, match=r"no adapter of the store is called 'ate': expected"):
            method("ate")


def test_a_name_that_nobody_has_among_ten_thousand():
    names = AdapterNames()
    for number in range(10_000):
        names.add_stored(f"customer-{number}-sql")
    times = []
    for _ in range(3):
        begin = time.thread_time()
        with pytest.raises(errors.UnknownAdapterError, match=r"such as 77 \('customer-77-sql'\)"):
            resolve(["customer-77-sqk"], names)
        times.append(time.thread_time() - begin)
    assert min(times) < 0.15  # comparing with all names takes 0.25


def test_a_store_without_adapters():
    model = base_model()
    mb = peft_multibatch.enable(model)
    store = mb.adapter_store()
    with pytest.raises(errors.NoAdaptersError, match=r"adapter_store"):
        logits(model, left_padded(1), adapter_ids=["sql"])
    assert len(store) == 0 and mb.adapter_names == []
    with pytest.raises(errors.ModelStateError, match=r"has a store"):
        mb.adapter_store()


# Dtypes.


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("file", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_have_the_dtype_that_peft_gives_them(folder, tmp_path, base, file):
    adapter = tmp_path / "eight"
    adapter.mkdir()
    for each in (folder / "eight").iterdir():
        (adapter / each.name).write_bytes(each.read_bytes())
    save_file({k: v.to(file) for k, v in load_file(folder / "eight" / WEIGHTS).items()}, adapter / WEIGHTS)
    model = base_model(dtype=base)
    store = peft_multibatch.enable(model).adapter_store()
    store.register("eight", adapter)
    actual = logits(model, left_padded(), adapter_ids=["eight"] * 6)
    with by_peft(base_model(dtype=base), adapter) as reference:
        weight = reference.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
        assert_close(actual, logits(reference, left_padded()))
    assert [each.dtype for each in peft_multibatch.enable(model).report().adapters] == [str(weight.dtype)[6:]]
    layer = peft_multibatch.enable(model)._layers
    part = store.adapters([0])[0].parts(
        [next(each for each in layer if store._model.names[each].endswith("0.self_attn.q_proj"))]
    )
    assert torch.equal(part[0].lora_a, weight.detach())


def test_the_dtype_of_the_file_on_request(folder, tmp_path):
    adapter = tmp_path / "eight"
    adapter.mkdir()
    for each in (folder / "eight").iterdir():
        (adapter / each.name).write_bytes(each.read_bytes())
    tensors = {k: v.bfloat16() / 8 for k, v in load_file(folder / "eight" / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)
    model = base_model(dtype=torch.bfloat16)
    mb = peft_multibatch.enable(model)
    mb.adapter_store(dtype="file").register("eight", adapter)
    actual = logits(model, left_padded(), adapter_ids=["eight"] * 6)
    with by_peft(base_model(dtype=torch.bfloat16), adapter, autocast_adapter_dtype=False) as reference:
        assert_close(actual, logits(reference, left_padded()))
    assert mb.report().adapters[0].dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", torch.int8, 4])
def test_a_dtype_that_is_none(dtype):
    with pytest.raises(errors.UnsupportedError, match=r"dtype=.*: expected 'file'"):
        peft_multibatch.enable(base_model()).adapter_store(dtype=dtype)


# The model isn't changed.


def test_parameters_files_and_plain_calls_are_as_before(folder, tmp_path):
    model, plain = base_model(), base_model()
    state, names = model.state_dict(), [name for name, _ in model.named_modules()]
    dictionaries = {name: set(module.__dict__) for name, module in model.named_modules()}
    mb = peft_multibatch.enable(model)
    mb.adapter_store().register_folder(folder)
    assert torch.equal(logits(model, left_padded()), logits(plain, left_padded()))
    logits(model, left_padded(), adapter_ids=NAMES)
    assert torch.equal(logits(model, left_padded()), logits(plain, left_padded()))
    assert list(model.state_dict()) == list(state)
    assert all(model.state_dict()[key].data_ptr() == value.data_ptr() for key, value in state.items())
    assert [name for name, _ in model.named_modules()] == names
    model.save_pretrained(tmp_path / "saved")
    plain.save_pretrained(tmp_path / "plain")
    files = [sorted(each.name for each in (tmp_path / kind).iterdir()) for kind in ("saved", "plain")]
    assert files[0] == files[1]
    saved, other = (load_file(tmp_path / kind / "model.safetensors") for kind in ("saved", "plain"))
    assert saved.keys() == other.keys()
    mb.disable()
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == dictionaries
    assert torch.equal(logits(model, left_padded()), logits(plain, left_padded()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_plain_models(stored, folder, copied):
    model, _ = stored
    other = copied(model)
    assert torch.equal(logits(other, left_padded()), logits(base_model(), left_padded()))
    peft_multibatch.enable(other).adapter_store().register_folder(folder)
    assert_close(logits(other, left_padded(), adapter_ids=NAMES), expected(NAMES, folder, logits))
    assert_close(logits(model, left_padded(), adapter_ids=NAMES), expected(NAMES, folder, logits))


def test_weights_of_the_base_model_that_change(stored, folder):
    model, _ = stored
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.data = layer.weight.data * 2
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(model.model.layers[1].mlp.down_proj.weight.data / 2)

    def changed(model, inputs):
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        layers = [inner.model.layers[0].self_attn.q_proj, inner.model.layers[1].mlp.down_proj]
        weights = [getattr(layer, "base_layer", layer).weight for layer in layers]
        with torch.no_grad():
            weights[0].mul_(2), weights[1].div_(2)
            found = logits(model, inputs)
            weights[0].div_(2), weights[1].mul_(2)
        return found

    assert_close(logits(model, left_padded(), adapter_ids=NAMES), expected(NAMES, folder, changed))


def test_gradients_reach_the_base_model_through_stored_adapters(stored, folder):
    model, _ = stored
    inputs = left_padded(2)
    with by_peft(base_model(), folder / "eight") as reference:
        reference.get_input_embeddings().weight.requires_grad_(True)
        reference(**inputs).logits.square().mean().backward()
        wanted = reference.get_input_embeddings().weight.grad
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    model(**inputs, adapter_ids=["eight", "eight"]).logits.square().mean().backward()
    assert_close(model.get_input_embeddings().weight.grad, wanted)


def test_dropout_in_train_mode_is_refused(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1, init_lora_weights=False)
    folder = save(tmp_path / "dropping", config)
    model = base_model()
    peft_multibatch.enable(model).adapter_store().register("dropping", folder)
    logits(model, left_padded(1), adapter_ids=["dropping"])
    with pytest.raises(errors.UnsupportedError, match=r"dropout of 0.1, the model is in train mode.*: expected eval"):
        logits(model.train(), left_padded(1), adapter_ids=["dropping"])
    logits(model, left_padded(1), adapter_ids=["__base__"])


def test_verify_says_that_it_compares_with_peft(stored):
    model, _ = stored
    with pytest.raises(errors.UnsupportedError, match=r"'eight', a stored adapter.*: expected"):
        peft_multibatch.enable(model).verify(**left_padded(2), adapter_ids=["eight", "__base__"])


def test_verify_of_others_beside_stored_ones(both):
    model, _ = both
    assert peft_multibatch.enable(model).verify(**left_padded(3), adapter_ids=["p-three", "__base__", "p-four"])


def test_after_disable_the_store_is_closed(stored, folder):
    model, store = stored
    peft_multibatch.disable(model)
    with pytest.raises(errors.ModelStateError, match=r"model was disabled: expected an enabled"):
        store.register("again", folder / "eight")
    other = peft_multibatch.enable(model).adapter_store()
    other.register("eight", folder / "eight")
    assert_close(logits(model, left_padded(1), adapter_ids=["eight"]), expected(["eight"], folder, logits))


def test_compiled_models(folder):
    torch._dynamo.reset()
    model = base_model()
    mb = peft_multibatch.enable(model)
    mb.adapter_store().register_folder(folder)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    inputs = left_padded()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for names in (NAMES, NAMES[::-1]):
        with mb.batch(names):
            actual = logits(compiled, inputs)
        assert_close(actual, expected(names, folder, logits))
    assert len(graphs) == 1
    assert_close(logits(compiled, inputs), logits(base_model(), inputs))


def test_disabled_adapters_in_compiled_models_are_refused(partly):
    """Graphs learn about disabled layers from PEFT, which doesn't know layers that only stored adapters have."""
    torch._dynamo.reset()
    model, _ = partly
    mb = peft_multibatch.enable(model)
    names = ["eight", "default", "__base__", "three", "four", "eight"]
    compiled = torch.compile(model.get_base_model(), backend="eager")
    with mb.batch(names):
        rows = logits(compiled, left_padded())
    with model.disable_adapter(), pytest.raises(errors.UnsupportedError, match=r"disabled .*: expected .* Pass -1"):
        logits(model, left_padded(), adapter_ids=names)
    with mb.batch(names):
        assert_close(logits(compiled, left_padded()), rows)


def test_layers_whose_forward_was_replaced_are_refused(tmp_path):
    config = LoraConfig(r=4, target_modules=["gate_proj"], init_lora_weights=False)
    folder = save(tmp_path / "replaced", config, "llama")
    model = base_model()
    store = peft_multibatch.enable(model).adapter_store()
    layer = model.model.layers[0].mlp.gate_proj
    layer.forward = lambda x: nn.Linear.forward(layer, x)
    with pytest.raises(errors.AdapterUnsupportedError, match=r"forward was replaced.*load_adapter"):
        store.register("replaced", folder)
    assert len(store) == 0
