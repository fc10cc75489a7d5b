"""Sibling projections that read the same tensor become one group: q/k/v as three slices, gate/up as two.

The first layer of a group computes all of them, and the others hand out what it computed. They check that they were
given the very tensor that the first one saw, so that a model in which they aren't siblings after all is slower, not
wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from transformers.utils import logging

from peft_multibatch.bank import Bank


if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

logger = logging.get_logger(__name__)

# Names under one parent module, in the order in which models call them. Not every name has to be there: an adapter of
# q_proj and v_proj alone makes a group of two slices.
SIBLINGS = [
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, Bart and most others
    ("query", "key", "value"),  # BERT, ViT
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("q", "k", "v"),  # T5
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),  # T5 1.1
    ("w1", "w3"),  # Mixtral-like MLPs
]

# Attention over another sequence: k and v read the encoder's output, and only once.
CROSS = ("cross", "encoder_attn", "encdec")


class Group:
    """Layers that run as one.

    Attributes:
        layers: in the order of their slices.
        bank: their weights, one slice a layer.
        label: how ``report()`` names it, such as "fused qkv".
    """

    def __init__(self, name: str, layers: dict[str, LoraLayer]) -> None:
        self.name = name
        self.layers = tuple(layers.values())
        self.bank = Bank(self.layers)
        self.label = f"fused {'/'.join(layers)}"
        self.reason = ""

    def join(self) -> None:
        """Let the layers run as one."""
        for index, layer in enumerate(self.layers):
            layer._multibatch.group, layer._multibatch.index = self, index

    def split(self, reason: str) -> None:
        """Let every layer run by itself from now on."""
        if not self.reason:
            logger.warning_once(f"{self.name}: not fused, because {reason}.")
        self.reason = f"not fused, because {reason}"
        for layer in self.layers:
            layer._multibatch.group = None


def find_groups(layers: dict[str, LoraLayer]) -> list[Group]:
    """Group the layers that may run as one.

    Args:
        layers: the segmented layers by their names in the model.
    """
    groups: list[Group] = []
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        if any(word in parent.lower() for word in CROSS):
            continue
        for siblings in SIBLINGS:
            found = {child: layers[f"{parent}.{child}"] for child in siblings if f"{parent}.{child}" in layers}
            if len(found) > 1 and _alike(found.values()):
                groups.append(Group(parent, found))
    return groups


def _alike(layers: Iterable[LoraLayer]) -> bool:
    """Whether layers take the same input, on one device and without hooks that have to run at the layer's own turn."""
    described = {
        (layer.in_features, layer.weight.device, hasattr(layer, "_hf_hook"), bool(layer._forward_pre_hooks))
        for layer in layers
    }
    return len(described) == 1 and described.pop()[2:] == (False, False)
