"""A model with one layer of each kind, and two adapters on one of them."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Tiny(nn.Module):
    """One layer of each kind that PEFT adapts, each with its own input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 20)
        self.embedding = nn.Embedding(30, 12)
        self.conv1d = nn.Conv1d(3, 6, 3)
        self.conv2d = nn.Conv2d(3, 6, 3)
        self.head = nn.Linear(12, 4)

    def forward(self, layer, x):
        return getattr(self, layer)(x)


def build(layer="linear", dtype=torch.float32, adapter_dtype=None, second=None, **options):
    shared = {"target_modules": [layer], "init_lora_weights": False, **options}
    model = get_peft_model(
        Tiny().to(dtype), LoraConfig(r=4, lora_alpha=8, **shared), "one", autocast_adapter_dtype=False
    )
    model.add_adapter("two", LoraConfig(r=3, lora_alpha=6, **{**shared, **(second or {})}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype or dtype)
            if layer == "embedding":
                nn.init.normal_(parameter)  # PEFT initializes one of an embedding's two matrices with zeros
    return model.eval()


def make_input(layer, rows=5, dtype=torch.float32):
    if layer == "embedding":
        return torch.randint(0, 30, (rows, 7))
    shape = {"linear": (7, 12), "head": (12,), "conv1d": (3, 9), "conv2d": (3, 8, 8)}[layer]
    return torch.randn(rows, *shape).to(dtype)
