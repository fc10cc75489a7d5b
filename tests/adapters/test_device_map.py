"""Models that are split over devices or offloaded: every row is right, and nothing on the meta device is read."""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    CpuOffload,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from models import SIZES, left_padded, lora_configs, row_by_row
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tolerances import assert_close

import peft_multibatch
from peft_multibatch import ModelStateError


NAMES = ["three", "__base__", "eight", "four", "three", "eight"]
GREEDY = {"max_new_tokens": 5, "do_sample": False}
CPU = torch.device("cpu")
PARTS = ("model.embed_tokens", "model.rotary_emb", *(f"model.layers.{i}" for i in range(3)), "model.norm", "lm_head")


# older versions of transformers warn about offloaded models, whose weights are on the meta device between calls
pytestmark = pytest.mark.filterwarnings(
    "ignore:You are calling .generate.. with the `input_ids` being on a device type"
)


def plain_model(**sizes):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 3, **sizes})).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with the base model and three adapters, and PEFT's logits and tokens for every row."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("saved"), plain_model()
    model.save_pretrained(folder / "base")
    configs = lora_configs()
    model = get_peft_model(model, configs.pop("three"), "three")
    for name, config in configs.items():
        model.add_adapter(name, config)
    model.save_pretrained(folder)
    return folder, *said_alone(model.eval(), NAMES)


def inputs_on(device):
    return {key: value.to(device) for key, value in left_padded().items()}


def said_alone(model, names, device=CPU):
    inputs = inputs_on(device)
    return (
        torch.cat(row_by_row(model, names, inputs, lambda row: logits(model, row))),
        torch.cat(row_by_row(model, names, inputs, lambda row: model.generate(**row, **GREEDY).cpu())),
    )


@torch.no_grad()
def logits(model, inputs, **ids):
    return model(**inputs, **ids).logits.cpu()


def with_adapters(model, folder, first="three", **options):
    """Load the adapters from disk, `first` with options; tests pass names, so their order doesn't matter."""
    model = PeftModel.from_pretrained(model, folder / first, first, **options)
    for name in lora_configs():
        if name != first:
            model.load_adapter(folder / name, name)
    return model.eval()


def check(model, saved, devices=(CPU,)):
    """Compare every way to pass ids with PEFT on a CPU, without hooks."""
    _, expected, tokens = saved
    mb = peft_multibatch.enable(model)
    inputs = inputs_on(devices[0])
    assert_close(logits(model, inputs, adapter_ids=NAMES), expected)
    assert_close(logits(model.get_base_model(), inputs, adapter_ids=NAMES), expected)
    ids = torch.tensor([mb.adapter_names.index(name) if name in mb.adapter_names else -1 for name in NAMES])
    for place in ("cpu", *devices):
        assert_close(logits(model, inputs, adapter_ids=ids.to(place)), expected)
    assert torch.equal(model.generate(**inputs, **GREEDY, adapter_ids=NAMES).cpu(), tokens)
    order = [5, 0, 1, 4, 3, 2]
    with mb.batch([NAMES[row] for row in order]):
        shuffled = {key: value[order] for key, value in inputs.items()}
        assert_close(logits(model.get_base_model(), shuffled), expected[order])
    return mb


def offload_base_layers(model):
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and "lora_" not in name:
            add_hook_to_module(module, AlignDevicesHook(CPU, offload=True))


def to_disk_in_part(model, folder, skipped=()):
    places = {part: "disk" if part == "model.layers.1" else "cpu" for part in PARTS if part not in skipped}
    dispatch_model(model, places, main_device="cpu", offload_dir=folder, skip_keys="past_key_values")


OFFLOADS = {
    "in memory": lambda model, _: cpu_offload(model, CPU),
    "in memory with buffers": lambda model, _: cpu_offload(model, CPU, offload_buffers=True),
    "on disk": lambda model, folder: disk_offload(model, folder, CPU),
    "in part on disk": to_disk_in_part,
    "block by block": lambda model, _: cpu_offload(model, CPU, preload_module_classes=["LlamaDecoderLayer"]),
    "LoRA layers whole": lambda model, _: cpu_offload(model, CPU, preload_module_classes=["Linear"]),
    "base layers alone": lambda model, _: offload_base_layers(model),
    "the whole model": lambda model, _: add_hook_to_module(model, CpuOffload(CPU)),
    "nothing, with hooks": lambda model, _: dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True),
}


@pytest.mark.parametrize("first", ["enable", "hooks"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded(offload, first, saved, tmp_path):
    model = with_adapters(plain_model(), saved[0])
    if first == "enable":
        peft_multibatch.enable(model)
    OFFLOADS[offload](model.get_base_model(), tmp_path)
    check(model, saved).disable()
    plain, tokens = said_alone(model, NAMES)
    assert torch.equal(plain, saved[1])
    assert torch.equal(tokens, saved[2])


@pytest.mark.filterwarnings("ignore:for .*lora_.* copying from a non-meta parameter")  # PEFT offloads it right after
def test_offloaded_by_a_device_map(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT writes offloaded weights below the working directory
    places = {part: "disk" if part == "model.layers.1" else "cpu" for part in PARTS}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved[0] / "base", device_map=places, offload_folder=tmp_path / "base"
    )
    assert all(parameter.is_meta for parameter in model.model.layers[1].parameters())
    peft_places = {f"base_model.model.{part}": place for part, place in places.items()}
    # PEFT dispatches the model again with its first adapter, so only that one is offloaded
    model = with_adapters(model, saved[0], "eight", device_map=peft_places, offload_dir=tmp_path / "adapters")
    attention = model.get_base_model().model.layers[1].self_attn
    assert attention.q_proj.lora_A["eight"].weight.is_meta
    assert not attention.q_proj.lora_A["three"].weight.is_meta
    check(model, saved)


def change_hooks(model, how):
    if how == "removed":
        remove_hook_from_submodules(model)
    elif how == "replaced":
        add_hook_to_module(model, AlignDevicesHook(CPU, io_same_device=True))
    elif how == "appended":
        cpu_offload(model, CPU)
    else:
        remove_hook_from_module(model)
        add_hook_to_module(model, AlignDevicesHook(CPU))


@pytest.mark.parametrize("how", ["removed", "replaced", "appended", "removed and added"])
def test_ids_are_not_ignored_where_hooks_change(how, saved):
    """transformers' own forward accepts any keyword, so ids that don't reach ours would silently have no effect."""
    model = with_adapters(plain_model(), saved[0]).get_base_model()
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    before = {module: module._old_forward for module in model.modules() if hasattr(module, "_old_forward")}
    mb = peft_multibatch.enable(model)
    change_hooks(model, how)
    assert_close(logits(model, left_padded(), adapter_ids=NAMES), saved[1])
    with pytest.raises(peft_multibatch.AdapterIdsLengthError):
        logits(model, left_padded(), adapter_ids=NAMES[1:])
    mb.disable()
    attribute = "forward" if how == "removed" else "_old_forward"
    assert all(getattr(module, attribute) == forward for module, forward in before.items())


def test_what_changes_where_it_was_offloaded_to_is_seen(saved):
    model = with_adapters(plain_model(), saved[0])
    cpu_offload(model.get_base_model(), CPU)
    peft_multibatch.enable(model)
    before = logits(model, left_padded(), adapter_ids=NAMES)
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and "four" in layer.lora_B:
            layer.lora_B["four"]._hf_hook.weights_map["weight"].mul_(3)
    after = logits(model, left_padded(), adapter_ids=NAMES)
    assert_close(after, said_alone(model, NAMES)[0])
    assert not torch.allclose(after[3], before[3])


def one_and_two(**options):
    """A model with two adapters; the options apply to the first."""
    shared = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    model = get_peft_model(plain_model(attention_bias=True), LoraConfig(**{**shared, **options}), "one")
    model.add_adapter("two", LoraConfig(**shared))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.normal_(0, 0.1)
    return model.eval()


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_offloaded_layers_that_run_per_segment(options):
    model, names = one_and_two(**options), ["one", "two", "__base__", "two", "one", "one"]
    expected = said_alone(model, names)[0]
    cpu_offload(model.get_base_model(), CPU)
    mb = peft_multibatch.enable(model)
    assert_close(logits(model, left_padded(), adapter_ids=names), expected)
    if "lora_bias" in options:
        assert mb.report().adapters[0].reason == "runs per segment, because its lora_B has a bias"
    else:
        assert any(layer.how == "per segment" for layer in mb.report())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, "a layer with a DoRA adapter is offloaded"),
        ({"target_modules": ["embed_tokens"]}, "parameters of a Embedding are on the meta device"),
        ({"trainable_token_indices": [3, 5]}, "parameters of a TrainableTokensWrapper are on the meta device"),
    ],
    ids=str,
)
def test_what_reads_offloaded_weights_apart_from_their_modules_is_refused(options, message):
    """PEFT alone can't run these either."""
    model, names = one_and_two(**options), ["one", "two", "__base__", "two", "one", "one"]
    cpu_offload(model.get_base_model(), CPU)
    peft_multibatch.enable(model)
    with pytest.raises(ModelStateError, match=message):
        logits(model, left_padded(), adapter_ids=names)


def test_weights_that_were_lost_are_refused(saved):
    """PEFT puts a new adapter on the base layer's device, here meta, where no hook knows its values."""
    model = plain_model()
    cpu_offload(model, CPU)
    with pytest.warns(UserWarning, match="which is a no-op"):
        model = with_adapters(model, saved[0], "eight")
    peft_multibatch.enable(model)
    with pytest.raises(ModelStateError, match=r"adapter 'eight' are on the meta device.*Load all adapters first"):
        logits(model, left_padded(), adapter_ids=NAMES)


@pytest.mark.parametrize("first", ["enable", "hooks"])
def test_weights_side_by_side_are_parted_where_they_are_offloaded(first, saved):
    model = with_adapters(plain_model(), saved[0])
    if first == "enable":
        peft_multibatch.enable(model, fuse="weights")
    offload_base_layers(model)
    mb = peft_multibatch.enable(model, fuse="weights")
    assert_close(logits(model, left_padded(), adapter_ids=NAMES), saved[1])
    reasons = {layer.reason for layer in mb.report() if layer.how.startswith("fused")}
    assert len(reasons) == 1
    assert reasons.pop().startswith("base weights not fused")


SEVERAL = [("cpu", "cpu"), pytest.param((0, 1), marks=pytest.mark.multi_gpu)]
WITH_CPU = [
    pytest.param((0, "cpu"), marks=pytest.mark.gpu, id="one GPU and offloaded layers"),
    pytest.param((0, 1, "cpu"), marks=pytest.mark.multi_gpu, id="two GPUs and offloaded layers"),
]


def loaded_over(devices, folder):
    """Load a model whose layers alternate between devices, so that rows move back and forth."""
    places = dict.fromkeys(PARTS, devices[0])
    places |= {f"model.layers.{index}": devices[(index + 1) % len(devices)] for index in range(3)}
    places["lm_head"] = devices[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", device_map=places)
    peft_places = {f"base_model.model.{part}": place for part, place in places.items()}
    return with_adapters(model, folder, "eight", device_map=peft_places)


def gpus_of(devices):
    return [torch.device(device) for device in devices if len({*devices}) == 1 or device != "cpu"]


@pytest.mark.parametrize("devices", [*SEVERAL, *WITH_CPU])
def test_over_several_devices(devices, saved):
    model, gpus = loaded_over(devices, saved[0]), gpus_of(devices)
    mb = check(model, saved, gpus)
    if gpus[0].type == "cuda":
        assert mb.report().backend == "triton"
        with torch.cuda.device(gpus[-1]):  # independent of the current device
            check(model, saved, gpus)
    tokens = model.generate(
        **inputs_on(gpus[0]), **GREEDY, adapter_ids=NAMES, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(tokens.cpu(), saved[2])
    model.load_adapter(saved[0] / "three", "again")
    assert_close(logits(model, inputs_on(gpus[0]), adapter_ids=["again", *NAMES[1:]]), saved[1])
    mb.disable()
    assert all("_multibatch" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("devices", SEVERAL)
def test_what_changes_on_several_devices_is_seen(devices, saved):
    model, gpus = loaded_over(devices, saved[0]), gpus_of(devices)
    check(model, saved, gpus)
    for name, parameter in model.named_parameters():
        if "lora_B.four" in name:
            parameter.data.mul_(3)
    model.delete_adapter("three")
    model.add_adapter("three", lora_configs()["three"])
    check(model, (None, *said_alone(model, NAMES, gpus[0])), gpus)


@pytest.mark.parametrize("devices", SEVERAL[1:])
def test_weights_side_by_side_are_not_for_several_devices(devices, saved):
    model = loaded_over(devices, saved[0])
    mb = peft_multibatch.enable(model, fuse="weights")
    assert_close(logits(model, inputs_on(0), adapter_ids=NAMES), saved[1])
    reasons = {layer.reason for layer in mb.report() if layer.how.startswith("fused")}
    assert reasons == {"base weights not fused: some base layers have hooks or aren't plain linear layers"}


@pytest.mark.multi_gpu
@pytest.mark.parametrize("how", ["auto", "balanced", "sequential"])
def test_device_maps_by_name(how, saved):
    memory = {0: "210KB", 1: "10GB"} if how == "sequential" else None
    model = transformers.AutoModelForCausalLM.from_pretrained(saved[0] / "base", device_map=how, max_memory=memory)
    used = sorted({*model.hf_device_map.values()})
    assert len(used) > 1 and (how != "sequential" or used == [0, 1])
    check(with_adapters(model, saved[0]), saved, [torch.device(each) for each in used])


@pytest.mark.parametrize("devices", SEVERAL)
def test_compiled_with_hooks(devices, saved):
    """Hooks break graphs, even between a projection that computes for its siblings and those siblings."""
    model, device = loaded_over(devices, saved[0]), gpus_of(devices)[0]
    layers = model.get_base_model().model.layers
    if device == CPU:
        add_hook_to_module(layers[1].self_attn.q_proj.base_layer, AlignDevicesHook(CPU))
    mb = peft_multibatch.enable(model)
    torch._dynamo.reset()
    for layer in layers[:2]:
        layer.compile(backend="eager")
    for shift in range(3):
        inputs = {key: value.roll(-shift, 0) for key, value in inputs_on(device).items()}
        with mb.batch(NAMES[shift:] + NAMES[:shift]):
            assert_close(logits(model, inputs), saved[1].roll(-shift, 0))
