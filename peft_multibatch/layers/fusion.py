"""Sibling projections that read the same tensor become one group: q/k/v as three slices, gate/up as two.

The first layer of a group computes all of them, and the others hand out what it computed. They check that they were
given the very tensor that the first one saw, so that a model in which they aren't siblings after all is slower, not
wrong.

On request the base weights of a group stand side by side in one tensor as well, so that one matrix product takes the
place of three. PEFT's and transformers' parameters become views of it: names, values and saved files stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from peft_multibatch.adapters.bank import Bank, base_device
from peft_multibatch.adapters.checks import HOOKS
from peft_multibatch.calls.graphs import Graph


if TYPE_CHECKING:
    from peft_multibatch.calls.call import Call
    from peft_multibatch.compat import LoraLayer

logger = logging.get_logger(__name__)

Fuse = bool | Literal["weights"]
"""What may be asked for as ``fuse``."""

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
        reason: why the layers, or their base weights, don't run as one although they were meant to.
    """

    def __init__(self, name: str, layers: dict[str, LoraLayer]) -> None:
        self.name = name
        self.layers = tuple(layers.values())
        self.bank = Bank(self.layers)
        self.label = f"fused {'/'.join(layers)}"
        self.reason = ""
        self.is_split = False
        self._is_known = False  # how its input is treated in inference mode
        self._weight: Tensor | None = None  # of all base layers, side by side
        self._bias: Tensor | None = None
        self._addresses: list[int] = []

    def join(self) -> None:
        """Let the layers run as one."""
        for index, layer in enumerate(self.layers):
            layer._multibatch.group = self, index

    def split(self, reason: str) -> None:
        """Let every layer run by itself from now on."""
        if not self.is_split:
            logger.warning_once(f"{self.name}: not fused, because {reason}.")
        self.is_split, self.reason = True, f"not fused, because {reason}"
        self.part_weights()
        for layer in self.layers:
            layer._multibatch.group = None

    def join_weights(self) -> None:
        """Put the base weights side by side in one tensor, of which the parameters become views."""
        bases = [layer.base_layer for layer in self.layers]
        biases = [base._parameters.get("bias") for base in bases]
        if any(type(base) is not nn.Linear or _is_hooked(base) or _is_quantized(base) for base in bases):
            self.reason = "base weights apart: not all are plain linear layers without hooks"
        elif len({_kind(base.weight, bias) for base, bias in zip(bases, biases)}) > 1:
            self.reason = "base weights apart: their dtypes differ, or some have a bias and others none"
        elif len({parameter.data_ptr() for layer in self.layers for parameter in _parameters(layer)}) < len(
            self._find()
        ):
            self.reason = "base weights apart: layers share a parameter"
        elif any(base.weight.is_meta for base in bases):
            self.reason = "base weights apart: they are offloaded"
        else:
            self._weight = _side_by_side([base.weight for base in bases])
            self._bias = None if biases[0] is None else _side_by_side(biases)
            self._addresses = self._find()
            self.label = self.label.replace("fused", "fused with base weights", 1)

    def part_weights(self, reason: str = "") -> None:
        """Give every base layer memory of its own again."""
        if self._weight is None:
            return
        shared = {each.untyped_storage().data_ptr() for each in (self._weight, self._bias) if each is not None}
        for layer in self.layers:
            for parameter in _parameters(layer):
                if parameter.untyped_storage().data_ptr() in shared:
                    with torch.inference_mode(parameter.is_inference()):
                        parameter.data = parameter.data.clone()
        self._weight = self._bias = None
        self.label = self.label.replace("fused with base weights", "fused", 1)
        self.reason = self.reason or reason

    def version(self, call: Call | Graph, x: Tensor) -> Any:
        """What tells whether a group's input is written in place before the last of its layers has read it.

        Graphs don't let that happen. Tensors of inference mode count nothing; what a model does there is looked at
        once, when its group runs for the first time, unless a CUDA graph is being captured.
        """
        if isinstance(call, Graph):
            return 0
        if not x.is_inference():
            return x._version
        is_capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        return 0 if self._is_known or is_capturing else x.clone()

    def is_unchanged(self, call: Call | Graph, x: Tensor, version: Any, index: int) -> bool:
        """Whether the layer with this index gets the input of which ``version`` was told."""
        if isinstance(call, Graph):
            return True
        if not isinstance(version, Tensor):
            return version == (0 if x.is_inference() else x._version)
        is_same = torch.equal(version, x)
        if not is_same:
            self.split("its input is written in place between its projections")
        self._is_known = self._is_known or (is_same and index == len(self.layers) - 1)
        return is_same

    def check_weights(self) -> None:
        """Part base weights that aren't what was put side by side any more, or that somebody wants to hook.

        And let layers run by themselves that accelerate hooked: their weights may not be there before their turn.
        """
        if not self.is_split and any("_hf_hook" in layer.__dict__ for layer in self.layers):
            self.split("accelerate's hooks have to run before each projection")
        if not self.is_split and any(layer._forward_pre_hooks for layer in self.layers):
            self.split("somebody's hooks have to run before each projection")
        if self._weight is not None and (
            self._find() != self._addresses or any(_is_hooked(layer.base_layer) for layer in self.layers)
        ):
            self.part_weights("base weights apart: something moved, replaced or hooked them")

    def base_output(self, x: Tensor) -> Tensor | None:
        """The base layers' outputs side by side, ``[..., ΣN]``, or None where they have to run apart."""
        weight, bias = self._weight, self._bias
        if weight is None or torch.is_grad_enabled():  # a part of it can't be written in place where gradients flow
            return None
        return F.linear(x, weight, bias)

    def _find(self) -> list[int]:
        return [parameter.data_ptr() for layer in self.layers for parameter in _parameters(layer)]


def _parameters(layer: LoraLayer) -> list[Tensor]:
    return [parameter for parameter in layer.base_layer._parameters.values() if parameter is not None]


def _kind(weight: Tensor, bias: Tensor | None) -> tuple:
    return weight.dtype, weight.device, weight.is_inference(), bias is None


def _is_quantized(base: nn.Module) -> bool:
    return any(type(parameter.data) is not Tensor for parameter in base._parameters.values() if parameter is not None)


def _is_hooked(base: nn.Module) -> bool:
    return bool(
        "forward" in base.__dict__
        or any(base.__dict__[hooks] for hooks in HOOKS)
        or nn.modules.module._has_any_global_hook()
    )


def _side_by_side(parameters: list[Tensor]) -> Tensor:
    # what was made in inference mode must stay a tensor of that kind
    with torch.inference_mode(parameters[0].is_inference()):
        whole = torch.cat([parameter.data for parameter in parameters])
        for parameter, part in zip(parameters, whole.split([len(parameter) for parameter in parameters])):
            parameter.data = part
    return whole


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
        (layer.in_features, base_device(layer), hasattr(layer, "_hf_hook"), bool(layer._forward_pre_hooks))
        for layer in layers
    }
    return len(described) == 1 and described.pop()[2:] == (False, False)
