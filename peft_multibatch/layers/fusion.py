"""Groups of sibling projections that read the same tensor: q/k/v as three slices, gate/up as two.

The first layer of a group computes the outputs of all, and the others return theirs. Each checks that it received the
same tensor as the first, so a model whose projections turn out not to be siblings is slower, but still correct.

With ``fuse="weights"``, the base weights of a group are also concatenated, so one matrix product replaces three.
PEFT's and transformers' parameters become views of the result; names, values and saved files stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from peft_multibatch.adapters.bank import Bank
from peft_multibatch.adapters.checks import HOOKS
from peft_multibatch.adapters.offload import base_device
from peft_multibatch.adapters.tables import Tables
from peft_multibatch.adapters.views import STATE
from peft_multibatch.calls.graphs import Graph


if TYPE_CHECKING:
    from peft_multibatch.calls.call import Call
    from peft_multibatch.compat import LoraLayer

logger = logging.get_logger(__name__)

Fuse = bool | Literal["weights"]
"""Values of ``fuse``."""

# Names under one parent module, in the order in which models call them. Names may be missing: an adapter on q_proj and
# v_proj alone gives a group of two slices.
SIBLINGS = [
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, Bart and most others
    ("query", "key", "value"),  # BERT, ViT
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("q", "k", "v"),  # T5
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),  # T5 1.1
    ("w1", "w3"),  # Mixtral-like MLPs
]

# Cross-attention: k and v read the encoder's output instead, and only once.
CROSS = ("cross", "encoder_attn", "encdec")


class Group:
    """Layers that run as one product.

    Attributes:
        layers: the layers, in the order of their slices.
        bank: their weights, one slice per layer.
        label: the group's label in ``report()``, such as "fused q_proj/v_proj".
        reason: why the layers, or their base weights, couldn't be fused; empty if they were.
    """

    def __init__(self, name: str, layers: dict[str, LoraLayer], tables: Tables) -> None:
        self.name = name
        self.layers = tuple(layers.values())
        self.bank = Bank(self.layers, tables)
        self.label = f"fused {'/'.join(layers)}"
        self.reason = ""
        self.is_split = False
        self._is_known = False  # whether the model was seen not to write the input in place in inference mode
        self._weight: Tensor | None = None  # the base weights, concatenated
        self._bias: Tensor | None = None
        self._places: list[tuple] = []

    def join(self) -> None:
        """Start running the layers as one product."""
        for index, layer in enumerate(self.layers):
            layer._multibatch.group = self, index

    def split(self, reason: str) -> None:
        """Run every layer by itself from now on."""
        if not self.is_split:
            logger.warning_once(f"{self.name}: not fused, because {reason}.")
        self.is_split, self.reason = True, f"not fused, because {reason}"
        self.part_weights()
        for layer in self.layers:
            layer._multibatch.group = None

    def join_weights(self) -> None:
        """Concatenate the base weights, and turn the parameters into views of the result."""
        bases = [layer.base_layer for layer in self.layers]
        biases = [base._parameters.get("bias") for base in bases]
        if any(type(base) is not nn.Linear or _is_hooked(base) or _is_quantized(base) for base in bases):
            self.reason = "base weights not fused: some base layers have hooks or aren't plain linear layers"
        elif len({_kind(base.weight, bias) for base, bias in zip(bases, biases)}) > 1:
            self.reason = "base weights not fused: their dtypes or devices differ, or only some have a bias"
        elif len({parameter.data_ptr() for layer in self.layers for parameter in _parameters(layer)}) < len(
            self._find()
        ):
            self.reason = "base weights not fused: layers share a parameter"
        elif any(base.weight.is_meta for base in bases):
            self.reason = "base weights not fused: they are offloaded"
        else:
            self._keep([parameter.data for layer in self.layers for parameter in _parameters(layer)])
            self._weight = _side_by_side([base.weight for base in bases])
            self._bias = None if biases[0] is None else _side_by_side(biases)
            self._places = self._find()
            self.label = self.label.replace("fused", "fused with base weights", 1)

    def part_weights(self, reason: str = "") -> None:
        """Give every base layer its own memory again."""
        if self._weight is None:
            return
        joined = [each for each in (self._weight, self._bias) if each is not None]
        self._keep(joined)
        shared = {each.untyped_storage().data_ptr() for each in joined}
        for layer in self.layers:
            for parameter in _parameters(layer):
                if parameter.untyped_storage().data_ptr() in shared:
                    with torch.inference_mode(parameter.is_inference()):
                        parameter.data = parameter.data.clone()
        self._weight = self._bias = None
        self.label = self.label.replace("fused with base weights", "fused", 1)
        self.reason = self.reason or reason

    def _keep(self, memory: list[Tensor]) -> None:
        patch = getattr(self.layers[0], STATE, None)
        if patch is not None:  # the model is still enabled
            patch.router.graph.keep(memory)

    def version(self, call: Call | Graph, x: Tensor) -> Any:
        """State that ``is_unchanged`` compares, to detect in-place writes to the input between the group's layers.

        Not needed in graphs. Inference tensors have no version counter, so the first run of a group in inference mode
        compares a copy of the input instead, unless a CUDA graph is being captured.
        """
        if isinstance(call, Graph):
            return 0
        if not x.is_inference():
            return x._version
        is_capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        return 0 if self._is_known or is_capturing else x.clone()

    def is_unchanged(self, call: Call | Graph, x: Tensor, version: Any, index: int) -> bool:
        """Whether the input is still the one from which ``version`` was made, when the layer ``index`` reads it."""
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
        """Stop fusing base weights that were replaced or hooked, and layers with hooks of their own.

        accelerate's hooks may load a layer's weights only when that layer is called.
        """
        if not self.is_split and any("_hf_hook" in layer.__dict__ for layer in self.layers):
            self.split("accelerate's hooks have to run before each projection")
        if not self.is_split and any(layer._forward_pre_hooks for layer in self.layers):
            self.split("forward pre-hooks have to run before each projection")
        if self._weight is not None and (
            self._find() != self._places
            or any(type(layer.base_layer) is not nn.Linear or _is_hooked(layer.base_layer) for layer in self.layers)
        ):
            self.part_weights("base weights not fused: they were moved, replaced or hooked")

    def base_output(self, x: Tensor) -> Tensor | None:
        """The base layers' outputs, concatenated, ``[..., ΣN]``; None if they have to run one by one."""
        weight, bias = self._weight, self._bias
        if weight is None or torch.is_grad_enabled():  # autograd doesn't allow in-place writes to slices of the output
            return None
        return F.linear(x, weight, bias)

    def _find(self) -> list[tuple]:
        """Where the base parameters are in memory, and how they are laid out there."""
        return [
            (parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride())
            for layer in self.layers
            for parameter in _parameters(layer)
        ]


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
    # parameters made in inference mode must stay inference tensors
    with torch.inference_mode(parameters[0].is_inference()):
        whole = torch.cat([parameter.data for parameter in parameters])
        for parameter, part in zip(parameters, whole.split([len(parameter) for parameter in parameters])):
            parameter.data = part
    return whole


def find_groups(layers: dict[str, LoraLayer], tables: Tables) -> list[Group]:
    """Group the layers that can run as one product.

    Args:
        layers: the segmented layers, by name in the model.
        tables: all tables of the model.
    """
    groups: list[Group] = []
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        if any(word in parent.lower() for word in CROSS):
            continue
        for siblings in SIBLINGS:
            found = {child: layers[f"{parent}.{child}"] for child in siblings if f"{parent}.{child}" in layers}
            if len(found) > 1 and _alike(found.values()):
                groups.append(Group(parent, found, tables))
    return groups


def _alike(layers: Iterable[LoraLayer]) -> bool:
    """Whether layers take inputs of the same size on one device, without hooks that must run before each of them."""
    described = {
        (layer.in_features, base_device(layer), hasattr(layer, "_hf_hook"), bool(layer._forward_pre_hooks))
        for layer in layers
    }
    return len(described) == 1 and described.pop()[2:] == (False, False)
