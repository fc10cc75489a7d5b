"""Mixtures of adapters, with PEFT's several active adapters as the reference."""

from __future__ import annotations

import torch
from models import alone
from peft.tuners.lora import LoraLayer


MIXTURES = [
    {"four": 0.7, "eight": 0.3},
    "three",
    {"four": 1.5, "three": -0.5, "eight": 0.25},
    -1,
    {"eight": 0.5},
    {"eight": 0.3, "four": 0.7},
]
OTHERS = [
    ["three", {"four": 0.2, "three": 0.8}, {"four": 0.2, "three": 0.8}, "three", -1, -1],
    ["four"] * 6,
    [{"eight": 2.0, "four": 1.0}] * 6,
]


def several(model, entry, call):
    """PEFT with all adapters of one entry active, each scaled by its weight."""
    if not isinstance(entry, dict):
        return alone(model, "__base__" if entry == -1 else entry, call)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [(layer, dict(layer.scaling), layer.active_adapters) for layer in layers]
    for layer in layers:
        layer.set_adapter(list(entry))
        layer.scaling.update({name: layer.scaling[name] * w for name, w in entry.items() if name in layer.scaling})
    try:
        return call()
    finally:
        for layer, scaling, active in before:
            layer.scaling.update(scaling)
            layer.set_adapter(active)


def expected(model, entries, inputs, call):
    rows = [{key: value[row : row + 1] for key, value in inputs.items()} for row in range(len(entries))]
    return torch.cat([several(model, entry, lambda row=row: call(row)) for entry, row in zip(entries, rows)])
