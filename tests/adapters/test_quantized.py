"""Quantized base models with PEFT's own LoRA classes, against PEFT, one adapter at a time.

Each needs its own package and is skipped without it. `pip install -e .[dev]` installs those that are small and run
on a CPU.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import LLAMA_LIKE, SIZES, alone, left_padded, row_by_row
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.te import TeLinear
from tolerances import assert_close, relative_error
from torch import nn

import peft_multibatch
from peft_multibatch.layers.table import PER_SEGMENT, SEGMENTED


NAMES = ["one", "two", "__base__", "two", "one", "one"]
# bitsandbytes packs blocks of 64 weights
CONFIG = transformers.LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1})


def plain() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(CONFIG).eval()


def loaded(quantization: Any, device: str) -> Any:
    """Quantize with transformers while loading."""
    with tempfile.TemporaryDirectory() as folder:
        plain().save_pretrained(folder)
        options = {"quantization_config": quantization, "device_map": device, "dtype": torch.float32}
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def replaced(quantize: Callable[[nn.Linear], nn.Module]) -> Any:
    """Quantize layer by layer, for formats that this version of transformers can't load."""
    model = plain()
    for part in model.model.layers.modules():
        for name, child in part.named_children():
            if type(child) is nn.Linear:
                setattr(part, name, quantize(child))
    return model


def bitsandbytes_8bit(device: str, threshold: float = 0.0) -> Any:
    """By default without outlier columns, which depend on all rows of a batch."""
    return loaded(transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold), device)


def bitsandbytes_4bit(device: str) -> Any:
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    options["bnb_4bit_compute_dtype"] = torch.float32
    return loaded(transformers.BitsAndBytesConfig(load_in_4bit=True, **options), device)


def torchao_int8(device: str) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return loaded(transformers.TorchAoConfig(Int8WeightOnlyConfig()), device)


def quanto(device: str) -> Any:
    return loaded(transformers.QuantoConfig(weights="int8"), device)


def hqq(device: str) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=4, group_size=16)
    return replaced(lambda layer: HQQLinear(layer, settings, compute_dtype=torch.float32, device=device)).to(device)


def aqlm(device: str) -> Any:
    from aqlm import QuantizedLinear

    def random(layer: nn.Linear) -> nn.Module:
        quantized = QuantizedLinear(layer.in_features, layer.out_features, 8, 1, 2, 4, bias=False)
        nn.init.normal_(quantized.codebooks, std=0.03)
        nn.init.ones_(quantized.scales)
        quantized.codes.data.random_(0, 16)
        return quantized

    return replaced(random).to(device)


def _grid(layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zero points of 4-bit weights in groups of 16 inputs, ``[N, groups]``."""
    scales = layer.weight.detach().unflatten(1, (-1, 16)).abs().amax(-1) / 7
    return scales, torch.full_like(scales, 8)


def gptq(device: str) -> Any:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    def pack(layer: nn.Linear) -> nn.Module:
        sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
        quantized = TorchLinear(bits=4, group_size=16, sym=True, desc_act=False, **sizes)
        quantized.pack(layer, *_grid(layer), torch.arange(layer.in_features, dtype=torch.int32) // 16)
        quantized.post_init()
        return quantized.eval()

    return replaced(pack).to(device)


def awq(device: str) -> Any:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    def pack(layer: nn.Linear) -> nn.Module:
        sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
        quantized = AwqTorchLinear(bits=4, group_size=16, sym=True, desc_act=False, register_buffers=True, **sizes)
        quantized.pack(layer, *_grid(layer))
        quantized.post_init()
        return quantized.eval()

    return replaced(pack).to(device)


# name: (package, function that builds the base model on a device, PEFT's class)
KINDS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "bitsandbytes 8-bit": ("bitsandbytes", bitsandbytes_8bit, "Linear8bitLt"),
    "bitsandbytes 4-bit": ("bitsandbytes", bitsandbytes_4bit, "Linear4bit"),
    "torchao": ("torchao", torchao_int8, "TorchaoLoraLinear"),
    "optimum-quanto": ("optimum.quanto", quanto, "Linear"),
    "HQQ": ("hqq", hqq, "HqqLoraLinear"),
    "AQLM": ("aqlm", aqlm, "AqlmLoraLinear"),
    "GPTQ": ("gptqmodel", gptq, "GPTQLoraLinear"),
    "AWQ": ("gptqmodel", awq, "AwqLoraLinear"),
}


def set_threshold(monkeypatch: pytest.MonkeyPatch, kind: str, threshold: float) -> None:
    """Set the absolute value from which bitsandbytes multiplies a column of the batch without rounding it."""
    package, _, name = KINDS[kind]
    monkeypatch.setitem(KINDS, kind, (package, lambda device: bitsandbytes_8bit(device, threshold), name))


def is_installed(package: str) -> bool:
    parent = package.rpartition(".")[0]
    return (not parent or is_installed(parent)) and importlib.util.find_spec(package) is not None


def build(kind: str, device: str = "cpu", **second: Any) -> Any:
    """Build a quantized model with two adapters, on different layers and of different ranks."""
    shared = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the packages
        base = KINDS[kind][1](device)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=LLAMA_LIKE, **shared), "one")
        model.add_adapter("two", LoraConfig(r=3, target_modules=LLAMA_LIKE[:-1], **shared, **second))
    return model.eval()


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    return model(**inputs_on(model.device), **kwargs).logits


def inputs_on(device: torch.device | str) -> dict[str, torch.Tensor]:
    return {key: value.to(device) for key, value in left_padded().items()}


@pytest.fixture(params=KINDS)
def kind(request):
    package = KINDS[request.param][0]
    if not is_installed(package):
        pytest.skip(f"the package {package} is not installed")
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


pytestmark = pytest.mark.filterwarnings("ignore")  # unrelated warnings of the packages


def dtype_of(kind: str) -> torch.dtype:
    """Return the dtype that the layers compute in, whatever their input's dtype."""
    return torch.float16 if KINDS[kind][0] == "gptqmodel" or kind == "bitsandbytes 8-bit" else torch.float32


@torch.no_grad()
def test_mixed_batch(kind, device):
    """One product of the quantized layer covers the whole batch, and every row gets its own delta."""
    model = build(kind, device)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert type(layer).__name__ == KINDS[kind][2]
    expected = torch.cat(row_by_row(model, NAMES, inputs_on(device), lambda row: model(**row).logits))
    base = alone(model, None, lambda: logits(model))
    mb = peft_multibatch.enable(model)
    assert PER_SEGMENT not in {entry.how for entry in mb.report()}
    assert device == "cpu" or mb.report().backend == "triton"
    calls = []
    layer.base_layer.register_forward_pre_hook(lambda *args: calls.append(args))
    actual = logits(model, adapter_ids=NAMES)
    assert len(calls) == 1
    assert_close(actual, expected, dtype_of(kind))
    assert_close(actual - base, expected - base, dtype_of(kind))
    assert torch.equal(actual[2], base[2])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bitsandbytes 8-bit"], indirect=True)
def test_outliers(kind, device, monkeypatch):
    """bitsandbytes looks for outlier columns in the whole batch, so a row depends on the others, also in PEFT's mixed
    batches."""
    set_threshold(monkeypatch, kind, 1.0)
    model = build(kind, device)
    expected = model(**inputs_on(device), adapter_names=NAMES).logits
    one_by_one = torch.cat(row_by_row(model, NAMES, inputs_on(device), lambda row: model(**row).logits))
    peft_multibatch.enable(model)
    actual = logits(model, adapter_ids=NAMES)
    assert relative_error(one_by_one, expected) > 10 * relative_error(actual, expected)
    assert_close(actual, expected, dtype_of(kind))


def test_gradients(kind, device, monkeypatch):
    """Compare the gradients of every adapter's weights in a model that never ran inference, where bitsandbytes
    packs weights."""
    if kind == "bitsandbytes 8-bit":
        # Columns with a value this large aren't rounded to 8 bits. For others the last bit of a float32 may decide on
        # the result, so that PEFT's own gradients change by up to 0.002 if embeddings change by 3e-7.
        set_threshold(monkeypatch, kind, 1e-3)
    model = build(kind, device).train()
    model.set_requires_grad(["one", "two"])
    weights = [p for key, p in model.named_parameters() if "lora_" in key]
    inputs = inputs_on(device)

    def one_at_a_time():
        total = 0
        for row, name in enumerate(NAMES):
            own = {key: value[row : row + 1] for key, value in inputs.items()}
            total = total + alone(model, name, lambda own=own: model(**own).logits).square().sum()
            model.set_requires_grad(["one", "two"])
        return total

    expected = torch.autograd.grad(one_at_a_time(), weights)
    peft_multibatch.enable(model)
    actual = torch.autograd.grad(logits(model, adapter_ids=NAMES).square().sum(), weights)
    for mine, theirs in zip(actual, expected):
        assert theirs.norm() > 0
        assert_close(mine, theirs, dtype_of(kind))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bitsandbytes 4-bit", "torchao", "optimum-quanto", "HQQ"], indirect=True)
def test_dora(kind):
    """DoRA, where PEFT supports it on a CPU; norms are those of the dequantized weights."""
    model = build(kind, use_dora=True)
    for key, parameter in model.named_parameters():
        if "magnitude" in key:
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    expected = torch.cat(row_by_row(model, NAMES, left_padded(), lambda row: model(**row).logits))
    mb = peft_multibatch.enable(model)
    assert PER_SEGMENT not in {entry.how for entry in mb.report()}
    assert_close(logits(model, adapter_ids=NAMES), expected)


@torch.no_grad()
def test_base_weights_stay_apart(kind):
    model = build(kind)
    mb = peft_multibatch.enable(model)
    expected = logits(model, adapter_ids=NAMES)
    mb.disable()
    mb = peft_multibatch.enable(model, fuse="weights")
    assert torch.equal(logits(model, adapter_ids=NAMES), expected)
    fused = [entry.reason for entry in mb.report() if entry.how.startswith("fused")]
    reason = "base weights not fused: some base layers have hooks or aren't plain linear layers"
    assert fused and set(fused) == {reason}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bitsandbytes 4-bit", "torchao", "HQQ"], indirect=True)
def test_merging_and_back(kind):
    """PEFT quantizes the merged weights again, in a new module or tensor."""
    model = build(kind)
    peft_multibatch.enable(model)
    before = logits(model, adapter_ids=NAMES)
    model.merge_adapter(["one"])
    with pytest.raises(peft_multibatch.MergedAdaptersError):
        logits(model, adapter_ids=NAMES)
    model.unmerge_adapter()
    after = logits(model, adapter_ids=NAMES)
    assert not torch.equal(after, before)
    expected = torch.cat(row_by_row(model, NAMES, left_padded(), lambda row: model(**row).logits))
    assert_close(after, expected)


@torch.no_grad()
@pytest.mark.parametrize("layer", [AqlmLoraLinear, AwqLoraLinear, GPTQLoraLinear, TeLinear], ids=lambda c: c.__name__)
def test_classes_of_peft_around_a_plain_layer(layer):
    """PEFT's classes that can be built without their package: how they process the output of the inner layer."""
    configs = [LoraConfig(r=r, target_modules=["q_proj", "o_proj"], init_lora_weights=False) for r in (3, 4)]
    for config in configs:
        config._register_custom_module({nn.Linear: layer})
    model = get_peft_model(plain(), configs[0], "one")
    model.add_adapter("two", configs[1])
    model.eval()
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj) is layer
    expected = torch.cat(row_by_row(model, NAMES, left_padded(), lambda row: model(**row).logits))
    mb = peft_multibatch.enable(model)
    assert {entry.how for entry in mb.report()} == {SEGMENTED}
    assert_close(logits(model, adapter_ids=NAMES), expected)


def test_subclasses_of_those_are_refused():
    class Louder(AwqLoraLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    config = LoraConfig(r=3, target_modules=["q_proj"])
    config._register_custom_module({nn.Linear: Louder})
    with pytest.raises(peft_multibatch.UnsupportedError, match=r"is a test_quantized\.Louder: expected"):
        peft_multibatch.enable(get_peft_model(plain(), config, "one"))


@torch.no_grad()
def test_outliers_are_found_in_the_whole_batch():
    """As without adapters, LLM.int8() keeps a feature in high precision if any row of the batch needs it."""
    if not is_installed("bitsandbytes"):
        pytest.skip("the package bitsandbytes is not installed")
    model = build("bitsandbytes 8-bit")
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(6, 3, 128)
    x[0, :, 5] = 40
    expected = torch.stack([alone(model, name, lambda: layer(x))[row] for row, name in enumerate(NAMES)])
    mb = peft_multibatch.enable(model)
    with mb.batch(NAMES):
        assert_close(layer(x), expected)
