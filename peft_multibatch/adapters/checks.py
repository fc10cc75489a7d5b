"""Validates adapters: kernels read weights without checking them, so this is checked before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_multibatch.adapters.shards import is_split_forward, own, split_of
from peft_multibatch.errors import AdapterMismatchError, UnsupportedError


if TYPE_CHECKING:
    from peft_multibatch.compat import LoraLayer


def check_halves(name: str, layer: LoraLayer) -> None:
    """Check that a layer has all parts of an adapter.

    Raises:
        AdapterMismatchError: some are missing.
    """
    parts = {"lora_A": layer.lora_A, "lora_B": layer.lora_B, "scaling": layer.scaling}
    missing = [what for what, found in parts.items() if name not in found]
    if not missing:
        halves = {"lora_A": layer.lora_A._modules[name], "lora_B": layer.lora_B._modules[name]}
        missing = [f"weight of {what}" for what, half in halves.items() if half._parameters.get("weight", 0) is None]
    if missing:
        there = ", ".join(what for what in parts if what not in missing)
        raise AdapterMismatchError(
            f"adapter {name!r} has {there} and no {', '.join(missing)} in a layer: expected all of them. Load the "
            "adapter again from complete files; rows of other adapters aren't affected."
        )


def check_fit(name: str, layer: LoraLayer, lora_a: Tensor, lora_b: Tensor, scaling: Any) -> None:
    """Check that weights fit each other and their base layer, and that the scaling is valid.

    Args:
        name: the adapter's name.
        layer: the LoRA layer.
        lora_a: its ``lora_A``, expected to be ``[rank, in_features]``.
        lora_b: its ``lora_B``, expected to be ``[out_features, rank]``.
        scaling: PEFT's scaling, a number or a tensor of one.

    Raises:
        AdapterMismatchError: they don't.
    """
    base: Any = layer.get_base_layer()
    inputs, outputs = layer.in_features, layer.out_features
    if split_of(layer) is not None:
        outputs, inputs = own(base.weight).shape
    a, b = own(lora_a), own(lora_b)
    fits = (
        a.dim() == b.dim() == 2
        and a.shape[0] == b.shape[1]
        and a.shape[1] in (inputs, layer.in_features)
        and b.shape[0] in (outputs, layer.out_features)
    )
    if not fits:
        raise AdapterMismatchError(
            f"adapter {name!r} has lora_A of shape {list(a.shape)} and lora_B of shape {list(b.shape)} in a layer of "
            f"{inputs} inputs and {outputs} outputs: expected [rank, {inputs}] and [{outputs}, rank]. Load it again "
            "from files made for this model; rows of other adapters aren't affected."
        )
    if not (a.is_floating_point() and b.is_floating_point()):
        raise AdapterMismatchError(
            f"adapter {name!r} has weights of dtypes {a.dtype} and {b.dtype}: expected floating-point weights. "
            "Convert the adapter; rows of other adapters aren't affected."
        )
    check_scaling(name, scaling)


def check_scaling(name: str, scaling: Any) -> None:
    """Check that a scaling is a finite number.

    Raises:
        AdapterMismatchError: it isn't finite in float32, or not a number.
    """
    if isinstance(scaling, Tensor) and scaling.numel() != 1:
        return  # PEFT's own module runs these
    try:
        number = float(scaling)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or abs(number) > torch.finfo(torch.float32).max:
        raise AdapterMismatchError(
            f"adapter {name!r} has a scaling (lora_alpha / r) of {scaling!r}: expected a finite number in float32. "
            "Set another lora_alpha; rows of other adapters aren't affected."
        )


# Tuners, by their folder in PEFT, whose layers compute a row only from the row and the adapter. Each was compared with
# PEFT, one adapter at a time (tests/layers/test_tuners.py); all others are refused.
TUNERS = (
    "beft", "boft", "c3a", "deft", "delora", "fourierft", "frod", "glora", "gralora", "hira", "hra", "ia3",
    "ln_tuning", "loha", "lokr", "lora", "miss", "oft", "osf", "peanut", "psoft", "pvera", "randlora", "road", "shira",
    "supertuning", "tinylora", "trainable_tokens", "unilora", "vblora", "vera", "waveft",
)  # fmt: skip


def check_kind(name: str, config: Any) -> None:
    """Check that an adapter's tuner supports mixed batches.

    Raises:
        UnsupportedError: it doesn't.
    """
    kind = getattr(config.peft_type, "value", config.peft_type) if config is not None else "lora"
    if kind.lower() not in TUNERS:
        raise UnsupportedError(
            f"adapter {name!r} has the PEFT type {kind}: expected LoRA, or a tuner whose layers compute a row only "
            "from the row and the adapter. Delete it, or run the adapters one at a time without adapter_ids."
        )


def check_any_kind(configs: Mapping[str, Any]) -> None:
    """Check that at least one of a model's adapters, if there are any, has a tuner that supports mixed batches.

    Raises:
        UnsupportedError: none has.
    """
    refusal = None
    for name, config in configs.items():
        try:
            return check_kind(name, config)
        except UnsupportedError as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal


KNOWN_VARIANTS = ("DoraLinearVariant",)
"""LoRA variants that run as products."""

CONTEXT_VARIANTS = ("Arrow",)
"""LoRA variants whose forward depends on other adapters."""


def why_apart(layer: LoraLayer, name: str) -> str:
    """Why an adapter needs PEFT's own module in a layer; the empty string if it can run as a product.

    Products only read the weights of ``lora_A`` and ``lora_B``. That suffices unless their modules do anything else.

    Raises:
        UnsupportedError: the adapter's variant depends on other adapters.
    """
    variant = type(layer.lora_variant[name]).__name__ if name in layer.lora_variant else ""
    if variant.startswith(CONTEXT_VARIANTS):
        raise UnsupportedError(
            f"adapter {name!r} uses the variant {variant}, whose rows depend on other adapters: expected plain LoRA. "
            "Run it by itself, without adapter_ids."
        )
    if variant and variant not in KNOWN_VARIANTS:
        return f"it uses the variant {variant}"
    dropout = layer.lora_dropout._modules.get(name)
    if dropout is not None and type(dropout) not in (nn.Identity, nn.Dropout):
        return f"its dropout is a {type(dropout).__name__}"
    halves = {"lora_A": layer.lora_A._modules.get(name), "lora_B": layer.lora_B._modules.get(name)}
    for what, half in halves.items():
        if half is None:
            continue
        if type(half) is not nn.Linear:
            return f"its {what} is a {type(half).__name__}"
        if half._parameters.get("bias") is not None:
            return f"its {what} has a bias"
        weight = half._parameters.get("weight")
        if weight is not None and weight.layout != torch.strided:
            return f"its {what} isn't dense"
    if isinstance(layer.scaling.get(name), Tensor) and layer.scaling[name].numel() != 1:
        return "its scaling isn't a single number"
    magnitude = layer.lora_magnitude_vector._modules.get(name) if variant else None
    for what, module in (*halves.items(), ("dropout", dropout), ("magnitude", magnitude)):
        attributes = {} if module is None else module.__dict__
        is_known = "_hf_hook" in attributes or is_split_forward(attributes.get("forward"))
        if "forward" in attributes and not is_known:
            return f"the forward of its {what} was replaced"
        if any(attributes.get(hooks) for hooks in HOOKS):
            return f"its {what} has hooks"
    return ""


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The attributes of a module with its hooks."""
