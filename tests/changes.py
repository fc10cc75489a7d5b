"""Adapters of all kinds, and changes to their weights, valid and invalid."""

from __future__ import annotations

import functools

import torch
from models import LLAMA_LIKE, base_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
KINDS = {
    "attention": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 8, "target_modules": LLAMA_LIKE},
    "mlp": {"r": 2, "target_modules": ["gate_proj", "down_proj"]},
    "rslora": {"r": 3, "target_modules": ["k_proj", "q_proj", "up_proj"], "use_rslora": True},
    "pattern": {"r": 4, "target_modules": LLAMA_LIKE[1:], "rank_pattern": {"down_proj": 2, "v_proj": 7}},
    "dropout": {"r": 4, "target_modules": LLAMA_LIKE[::2], "lora_dropout": 0.5},
    "bias": {"r": 4, "target_modules": ["q_proj", "o_proj"], "lora_bias": True},
    "dora": {"r": 4, "target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "head": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    **{dtype: {"r": 4, "target_modules": ["q_proj", "k_proj", "gate_proj"]} for dtype in DTYPES},
}


def config(kind: str) -> LoraConfig:
    return LoraConfig(lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False, **KINDS[kind])


def parameters(model: PeftModel, name: str) -> list[nn.Parameter]:
    return [parameter for key, parameter in model.named_parameters() if f".{name}" in key]


def layers_of(model: PeftModel, name: str) -> list[LoraLayer]:
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer) and name in layer.lora_A]


def add(model: PeftModel | None, name: str, kind: str, seed: int) -> PeftModel:
    """Add an adapter whose weights depend only on the seed."""
    if model is None:
        model = get_peft_model(base_model(), config(kind), name)
    else:
        model.add_adapter(name, config(kind))
    torch.manual_seed(seed)
    for parameter in parameters(model, name):
        noise = torch.randn_like(parameter) / 8
        parameter.data = noise.to(DTYPES.get(kind, torch.float32)) + (parameter.data if parameter.ndim == 1 else 0)
    return model.eval()


@functools.cache
def saved(kind: str, seed: int, folder: str) -> str:
    """Return the folder of an adapter saved from another model."""
    path = f"{folder}/{kind}-{seed}"
    add(None, "stored", kind, seed).save_pretrained(path)
    return f"{path}/stored"


# Changes by users to the weights of one adapter in one layer.


def write_in_place(layer, name, factor):
    layer.lora_B[name].weight.data.mul_(factor)


def replace_data(layer, name, factor):
    weight = layer.lora_B[name].weight
    weight.data = weight.data.clone() * factor


def replace_parameter(layer, name, factor):
    layer.lora_B[name].weight = nn.Parameter(layer.lora_B[name].weight.detach() * factor)


def replace_as_accelerate_does(layer, name, factor):
    module = layer.lora_A[name]
    module._parameters["weight"] = nn.Parameter(module.weight.detach() * factor, requires_grad=False)


def replace_modules(layer, name, factor):
    """Replace modules by ones of another rank."""
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    rank = a.shape[0] % 5 + 2
    layer.lora_A[name] = nn.Linear(a.shape[1], rank, bias=False, dtype=a.dtype)
    layer.lora_B[name] = nn.Linear(rank, b.shape[0], bias=False, dtype=b.dtype)


def set_scale(layer, name, factor):
    layer.set_scale(name, factor)


def write_scaling(layer, name, factor):
    layer.scaling[name] = layer.scaling[name] * factor


def replace_scaling(layer, name, factor):
    layer.scaling = {key: value * factor for key, value in layer.scaling.items()}


def scale_layer(layer, name, factor):
    layer.scale_layer(factor)


def set_bias(layer, name, factor):
    weight = layer.lora_B[name].weight
    layer.lora_B[name].bias = nn.Parameter(torch.full((weight.shape[0],), factor, dtype=weight.dtype))


CHANGES = {
    change.__name__: change
    for change in (
        write_in_place, replace_data, replace_parameter, replace_as_accelerate_does, replace_modules, set_scale,
        write_scaling, replace_scaling, scale_layer, set_bias,
    )
}  # fmt: skip


# Changes that make an adapter unable to run.


def other_rank(layer, name):
    weight = layer.lora_A[name].weight
    weight.data = torch.randn(weight.shape[0] + 1, weight.shape[1], dtype=weight.dtype)


def other_columns(layer, name):
    weight = layer.lora_A[name].weight
    weight.data = torch.randn(weight.shape[0], weight.shape[1] + 8, dtype=weight.dtype)


def no_values(layer, name):
    layer.lora_B[name].to("meta")


def one_half(layer, name):
    del layer.lora_B[name]


def infinite_scaling(layer, name):
    layer.scaling[name] = float("inf")


FAULTS = {
    fault.__name__: fault for fault in (other_rank, other_columns, no_values, one_half, infinite_scaling)
}  # fmt: skip
