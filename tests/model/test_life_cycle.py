"""Changes to a model after `enable`: afterwards, a mixed batch matches PEFT, one adapter at a time."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from models import LLAMA_LIKE, base_model, left_padded, lora_configs, peft_model, row_by_row
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.functional import delete_adapter, set_adapter
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from tolerances import assert_close, relative_error
from torch import nn

import peft_multibatch
from peft_multibatch import errors


NAMES = ["three", "eight", "__base__", "four", "three", "eight"]


def varied_model():
    """Build a model with fast and slow layers: DoRA, an embedding, a saved module and trainable tokens."""
    shared = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(
        base_model(), LoraConfig(r=3, target_modules=["q_proj", "v_proj"], use_dora=True, **shared), "three"
    )
    model.add_adapter("four", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], **shared))
    targets = ["q_proj", "down_proj", "embed_tokens"]
    model.add_adapter("eight", LoraConfig(r=8, target_modules=targets, **shared))
    for key, parameter in model.named_parameters():
        if "magnitude" in key or "modules_to_save" in key:
            parameter.data *= torch.rand_like(parameter) + 0.5
        elif "lora_" in key:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


MODELS = {"fast": peft_model, "varied": varied_model}


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**left_padded(), **kwargs).logits


def one_at_a_time(model, names=NAMES):
    with torch.no_grad():
        return torch.cat(row_by_row(model, names, left_padded(), lambda row: model(**row).logits))


def randomize(model, name):
    for key, parameter in model.named_parameters():
        if f".{name}" in key and ("lora_A" in key or "lora_B" in key):
            parameter.data = torch.randn_like(parameter) / 4
    return model


def other_weights(model, name, folder):
    """Save a checkpoint of an adapter like the model's, with other weights."""
    other = randomize(copy.deepcopy(model), name)
    other.save_pretrained(folder, selected_adapters=[name])
    return str(folder / name)


def select(model, folder):
    model.set_adapter("eight")


def select_two(model, folder):
    model.base_model.set_adapter(["three", "four"])


def switch_off_and_on(model, folder):
    with model.disable_adapter():
        logits(model)
    model.base_model.disable_adapter_layers()
    logits(model, adapter_ids=NAMES)
    model.base_model.enable_adapter_layers()


def merge_and_unmerge(model, folder):
    model.set_adapter("eight")
    for safe_merge in (False, True):
        model.merge_adapter(["eight"], safe_merge=safe_merge)
        with pytest.raises(errors.MergedAdaptersError):
            logits(model, adapter_ids=NAMES)
        model.unmerge_adapter()


def unmerge_by_disabling(model, folder):
    model.merge_adapter(["three"])
    with model.disable_adapter():
        logits(model)


def overwrite_from_disk(model, folder):
    model.load_adapter(other_weights(model, "three", folder), adapter_name="three")


def delete_and_load(model, folder):
    path = other_weights(model, "four", folder)
    model.delete_adapter("four")
    model.load_adapter(path, adapter_name="four")


def hotswap(model, folder):
    model.set_adapter("three")
    hotswap_adapter(model, other_weights(model, "three", folder), adapter_name="three", torch_device="cpu")


def write_state_dict(model, folder):
    state = get_peft_model_state_dict(randomize(copy.deepcopy(model), "eight"), adapter_name="eight")
    set_peft_model_state_dict(model, state, adapter_name="eight")


def replace_state_dict(model, folder):
    model.load_state_dict(randomize(copy.deepcopy(model), "three").state_dict(), assign=True)


def replace_layer(model, folder):
    attention = model.get_base_model().model.layers[0].self_attn
    attention.q_proj = randomize(copy.deepcopy(attention), "three").q_proj


def train_and_back(model, folder):
    model.train()
    model.set_requires_grad(["three", "four", "eight"])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    model(**left_padded(), adapter_ids=NAMES).logits.square().mean().backward()
    optimizer.step()
    model.eval()


def to_double(model, folder):
    model.double()


def to_bfloat16(model, folder):
    model.to(torch.bfloat16)


def to_half(model, folder):
    model.half()


def to_another_device_and_back(model, folder):
    state = copy.deepcopy(model.state_dict())
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    rope = model.get_base_model().model.rotary_emb
    rope.inv_freq.copy_(rope.compute_default_rope_parameters(model.config)[0])


CHANGES = [
    select, select_two, switch_off_and_on, merge_and_unmerge, unmerge_by_disabling, overwrite_from_disk, hotswap,
    delete_and_load, write_state_dict, replace_state_dict, replace_layer, train_and_back, to_double, to_bfloat16,
    to_half, to_another_device_and_back,
]  # fmt: skip
KEEPS_RESULTS = {select, select_two, switch_off_and_on, to_another_device_and_back}


pytestmark = [
    pytest.mark.filterwarnings("ignore:Multiple active adapters:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning"),  # layers without the merged adapter
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


@pytest.mark.parametrize(
    ("kind", "change"),
    # PEFT can't hot-swap DoRA's magnitudes or embeddings
    [(kind, change) for kind in MODELS for change in CHANGES if (kind, change) != ("varied", hotswap)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_after_a_change(kind, change, tmp_path):
    model = MODELS[kind]()
    mb = peft_multibatch.enable(model)
    before = logits(model, adapter_ids=NAMES)
    change(model, tmp_path)
    after = logits(model, adapter_ids=NAMES)
    assert torch.equal(after, before) == (change in KEEPS_RESULTS)
    check(model, after)
    mb.disable()
    check(model, after)


def check(model, mixed, names=NAMES):
    """Compare with PEFT; in half precision, errors against float32 may be as large as PEFT's, which rounds more
    often."""
    alone = one_at_a_time(model, names)
    if mixed.dtype in (torch.float32, torch.float64):
        assert_close(mixed, alone)
        return
    check_rounding(mixed, alone, one_at_a_time(copy.deepcopy(model).float(), names))


def check_rounding(mixed, alone, exact):
    real = left_padded()["attention_mask"].bool()
    ours, peft = (relative_error(rows[real], exact[real]) for rows in (mixed, alone))
    assert ours <= 1.05 * peft, (ours, peft)


def test_many_changes_in_a_row(tmp_path):
    """A change must not hide the next one."""
    model = varied_model()
    mb = peft_multibatch.enable(model)
    for change in (
        delete_and_load,
        to_double,
        overwrite_from_disk,
        merge_and_unmerge,
        train_and_back,
        replace_state_dict,
        select,
    ):
        change(model, tmp_path / change.__name__)
        check(model, logits(model, adapter_ids=NAMES))
    assert mb.adapter_names == ["three", "four", "eight"]


@pytest.mark.parametrize("source", ["three", "eight"], ids=["smaller rank", "same rank"])
def test_hotswap_into_a_model_that_is_prepared_for_other_ranks(tmp_path, source):
    """PEFT pads the weights, and makes scalings tensors that it modifies in place."""
    config = {"target_modules": LLAMA_LIKE, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = get_peft_model(base_model(), LoraConfig(r=8, lora_alpha=8, **config), "eight")
    model.add_adapter("four", LoraConfig(r=4, lora_alpha=4, **config))
    rank = {"three": 3, "eight": 8}[source]
    other = get_peft_model(base_model(), LoraConfig(r=rank, lora_alpha=32, **config), source)
    other.save_pretrained(tmp_path)
    prepare_model_for_compiled_hotswap(model, target_rank=12, config=model.peft_config)
    peft_multibatch.enable(model.eval())
    names = ["four", "eight", "__base__"] * 2
    before = logits(model, adapter_ids=names)
    check(model, before, names)
    hotswap_adapter(model, str(tmp_path / source), adapter_name="eight", torch_device="cpu")
    after = logits(model, adapter_ids=names)
    assert not torch.allclose(after, before, atol=1e-3)
    check(model, after, names)
    assert_close(after[1::3], one_at_a_time(other.eval(), [source] * 6)[1::3])


@pytest.mark.parametrize("kind", MODELS)
def test_new_adapters(kind):
    """Adapters that are added, combined from others, and added again under a deleted name."""
    model = MODELS[kind]()
    mb = peft_multibatch.enable(model)
    logits(model, adapter_ids=NAMES)
    model.add_adapter("new", LoraConfig(r=5, target_modules=["k_proj", "q_proj"], init_lora_weights=False))
    if kind == "fast":
        model.base_model.add_weighted_adapter(["three", "eight"], [0.7, 0.3], "both", combination_type="cat")
    model.eval()
    names = ["new", "both" if kind == "fast" else "three", "__base__", "four", "eight", "new"]
    check(model, logits(model, adapter_ids=names), names)
    model.delete_adapter("new")
    with pytest.raises(errors.UnknownAdapterError):
        logits(model, adapter_ids=names)
    model.add_adapter("new", LoraConfig(r=2, target_modules=["k_proj", "up_proj"], init_lora_weights=False))
    check(model.eval(), logits(model, adapter_ids=names), names)
    assert mb.adapter_names[:4] == ["three", "four", "eight", "new"]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save", "state_dict", "save_pretrained"])
def test_copies_are_models_of_their_own(kind, copied, tmp_path):
    model = MODELS[kind]()
    peft_multibatch.enable(model)
    mixed = logits(model, adapter_ids=NAMES)
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    elif copied == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif copied == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    elif copied == "state_dict":
        buffer, twin = io.BytesIO(), MODELS[kind]()
        torch.save(model.state_dict(), buffer)
        twin.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    else:
        model.save_pretrained(tmp_path)
        twin = base_model()
        for name in ("three", "four", "eight"):
            if isinstance(twin, PeftModel):
                twin.load_adapter(tmp_path / name, adapter_name=name)
            else:
                twin = PeftModel.from_pretrained(twin, tmp_path / name, adapter_name=name)
        twin.eval()
    check(twin, mixed)  # without ids
    peft_multibatch.enable(twin)
    assert_close(logits(twin, adapter_ids=NAMES), mixed)
    randomize(twin, "eight")  # and independently of the original
    check(twin, logits(twin, adapter_ids=NAMES))
    assert torch.equal(logits(model, adapter_ids=NAMES), mixed)
    check(model, mixed)


def test_two_models_in_force_at_once():
    first, second = peft_model(), randomize(varied_model(), "eight")
    handles = [peft_multibatch.enable(model) for model in (first, second)]
    others = NAMES[::-1]
    with handles[0].batch(NAMES), handles[1].batch(others):
        mixed = [logits(model) for model in (first, second)]
        randomize(first, "eight")
        assert torch.equal(logits(second), mixed[1])
        changed = logits(first)
    assert not torch.allclose(changed, mixed[0])
    check(first, changed)
    check(second, mixed[1], others)
    handles[0].disable()
    assert torch.equal(logits(second, adapter_ids=others), mixed[1])
    check(first, changed)


def test_enabled_twice_with_changes_in_between():
    model = varied_model()
    mb = peft_multibatch.enable(model)
    logits(model, adapter_ids=NAMES)
    randomize(model, "eight")
    assert peft_multibatch.enable(model) is mb
    check(model, logits(model, adapter_ids=NAMES))
    mb.disable()
    randomize(model, "three")
    again = peft_multibatch.enable(model)
    check(model, logits(model, adapter_ids=NAMES))
    assert again.adapter_names == ["three", "four", "eight"]


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_left_of_a_model_takes_no_ids_and_new_adapters(kind, how):
    model = MODELS[kind]()
    name = "eight"
    expected = one_at_a_time(model, [name if how == "merge_and_unload" else "__base__"] * 6)
    peft_multibatch.enable(model)
    logits(model, adapter_ids=NAMES)
    left = model.merge_and_unload(adapter_names=[name]) if how == "merge_and_unload" else model.unload()
    assert_close(logits(left), expected)
    with pytest.raises(errors.ModelStateError):
        logits(left, adapter_ids=NAMES)
    again = get_peft_model(left, lora_configs()["four"], "four").eval()
    peft_multibatch.enable(again)
    names = ["four", "__base__", "four"] * 2
    mixed = logits(again, adapter_ids=names)
    check(again, mixed, names)
    assert_close(mixed[1::3], expected[1::3])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.linear(x).relu())


def test_a_plain_module_with_injected_adapters():
    config = {"r": 2, "init_lora_weights": False}
    net, x = Net(), torch.randn(4, 6)
    for name in ("one", "two"):
        net = inject_adapter_in_model(LoraConfig(target_modules=["linear"], **config), net, name)
    mb = peft_multibatch.enable(net.eval())

    def check_rows(names):
        mixed = net(x, adapter_ids=names)
        for row, name in enumerate(names):
            set_adapter(net, name)
            assert_close(mixed[row], net(x[row : row + 1])[0])
        return mixed

    before = check_rows(["one", "two", "two", "one"])
    inject_adapter_in_model(LoraConfig(target_modules=["head", "linear"], **config), net, "three")
    check_rows(["three", "two", "one", "three"])
    state = {key: torch.randn_like(value) for key, value in get_peft_model_state_dict(net, adapter_name="one").items()}
    set_peft_model_state_dict(net, state, adapter_name="one")
    after = check_rows(["one", "two", "three", "one"])
    assert not torch.allclose(before[0], after[0])
    assert torch.equal(before[1], after[1])
    delete_adapter(net, "two", prefix="lora_")
    net.peft_config.pop("two", None)
    check_rows(["one", "three", "three", "one"])
    assert mb.adapter_names == ["one", None, "three"]
    with pytest.raises(errors.UnknownAdapterError):
        net(x, adapter_ids=["two"] * 4)


@pytest.fixture
def _accelerate_begins_anew():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_accelerate_begins_anew")
@pytest.mark.parametrize("order", ["prepared, then enabled", "enabled, then prepared"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(order, precision):
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = peft_model()
    if order == "prepared, then enabled":
        model = accelerator.prepare_model(model)
        alone = one_at_a_time(model)
        peft_multibatch.enable(model)
    else:
        alone = one_at_a_time(accelerator.prepare_model(peft_model()))
        peft_multibatch.enable(model)
        model = accelerator.prepare_model(model)
    mixed = logits(model, adapter_ids=NAMES)
    if precision == "no":
        assert_close(mixed, alone)
    else:
        assert mixed.dtype == alone.dtype == torch.float32
        check_rounding(mixed, alone, one_at_a_time(peft_model()))
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert_close(logits(unwrapped, adapter_ids=NAMES), one_at_a_time(peft_model()))
    randomize(unwrapped, "eight")
    after = logits(unwrapped, adapter_ids=NAMES)
    assert not torch.allclose(after, mixed, atol=1e-2)
    check(unwrapped, after)
    peft_multibatch.disable(model)
    check(unwrapped, after)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_switched_on_and_off(reentrant):
    model = peft_model().train()
    model.set_requires_grad(["three", "four", "eight"])
    model.enable_input_require_grads()
    peft_multibatch.enable(model)

    def gradients():
        model.zero_grad()
        model(**left_padded(), use_cache=False, adapter_ids=NAMES).logits.square().mean().backward()
        return torch.cat([p.grad.flatten() for key, p in model.named_parameters() if "lora_" in key])

    plain = gradients()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(gradients(), plain)
    model.get_base_model().gradient_checkpointing_disable()
    randomize(model, "eight")
    changed = gradients()
    assert not torch.allclose(changed, plain)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(gradients(), changed)


def test_transformers_own_adapters(tmp_path):
    """Without a PeftModel, adapters are added, activated, overwritten in place and deleted."""
    config = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    for seed in (1, 2):
        other = get_peft_model(base_model(), LoraConfig(r=4, **config))
        torch.manual_seed(seed)
        randomize(other, "default").save_pretrained(tmp_path / str(seed))
    model = base_model()
    model.enable_peft_hotswap(target_rank=6)
    mb = peft_multibatch.enable(model)
    model.load_adapter(str(tmp_path / "1"), adapter_name="one")
    model.add_adapter(LoraConfig(r=2, **config), adapter_name="two")

    def check_rows(names):
        mixed = logits(model, adapter_ids=names)
        for row, name in enumerate(names):
            if name == "__base__":
                model.disable_adapters()
            else:
                model.set_adapter(name)
            assert_close(mixed[row], logits(model)[row])
            model.enable_adapters()
        return mixed

    names = ["one", "two", "__base__"] * 2
    before = check_rows(names)
    model.load_adapter(str(tmp_path / "2"), adapter_name="one", hotswap=True)
    after = check_rows(names)
    assert not torch.allclose(after[0], before[0], atol=1e-3)
    assert torch.equal(after[1], before[1])
    model.set_adapter("one")
    model.delete_adapter("two")
    with pytest.raises(errors.UnknownAdapterError):
        logits(model, adapter_ids=names)
    model.load_adapter(str(tmp_path / "1"), adapter_name="three")
    check_rows(["one", "three", "__base__"] * 2)
    assert mb.adapter_names == ["one", None, "three"]
