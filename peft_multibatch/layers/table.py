"""The handler for each PEFT layer class, and the layers that are refused.

A handler is a function that replaces the layer's ``forward``. Without an active call it runs PEFT's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from peft_multibatch.adapters import shards
from peft_multibatch.adapters.checks import TUNERS
from peft_multibatch.adapters.views import get_base
from peft_multibatch.compat import (
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    LoraLayer,
    LoraParallelLinear,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    lora,
)
from peft_multibatch.errors import UnsupportedError
from peft_multibatch.layers import architectures
from peft_multibatch.layers.linear import linear
from peft_multibatch.layers.media import in_encoder
from peft_multibatch.layers.other_order import attention, tiled, tiled_experts
from peft_multibatch.layers.patch import is_replaced
from peft_multibatch.layers.per_segment import PER_SEGMENT_ALONG, base_only, per_segment, replaced


PER_SEGMENT = "per segment"
SEGMENTED = "segmented"

# The first match in a layer class's method resolution order counts. None: its rows can't be routed correctly.
HANDLERS: dict[type, Callable[..., Tensor] | None] = {
    lora.Linear: linear,
    lora.MultiheadAttention: attention,
    LoraParallelLinear: None,  # Megatron orders rows by position before sample
    LoraLayer: per_segment,
    ModulesToSaveWrapper: per_segment,
    TrainableTokensWrapper: per_segment,
    AuxiliaryTrainingWrapper: None,
    BaseTunerLayer: per_segment,  # tuners other than LoRA, if they are in TUNERS
}

# Classes whose forward only adds the delta to the base layer's output, which subclasses may not do. Listed by name,
# because importing them imports the quantization packages.
BASE_PLUS_DELTA = {
    f"peft.tuners.lora.{name}"
    for name in (
        "layer.Linear", "aqlm.AqlmLoraLinear", "awq.AwqLoraLinear", "bnb.Linear4bit", "bnb.Linear8bitLt",
        "eetq.EetqLoraLinear", "gptq.GPTQLoraLinear", "hqq.HqqLoraLinear", "inc.IncLoraLinear", "te.TeLinear",
        "torchao.TorchaoLoraLinear",
    )
}  # fmt: skip

# Part of a layer's name -> why its rows aren't those of the samples.
OTHER_ROWS = {
    "experts": "is inside a mixture of experts and sees rows gathered from all samples",
    "relative_attention_bias": "sees positions, not samples",
}
# Classes of experts whose input repeats the rows of all samples, once per expert.
TILED_EXPERTS = ("Llama4TextExperts",)


class Choice(NamedTuple):
    """How a layer runs.

    Attributes:
        handler: the function that replaces its forward.
        reason: why this isn't the fast handler, or the empty string.
        refusal: why adapters on this layer can't run in mixed batches, or the empty string. Rows of all other adapters
            get the base layer's output.
    """

    handler: Callable[..., Tensor]
    reason: str = ""
    refusal: str = ""


def choose(name: str, layer: Any, model: Any, is_gathered: bool = False) -> Choice:
    """Choose how a layer runs. This depends on its class and its place in the model, not on its adapters.

    Args:
        name: the layer's name in the model.
        layer: a PEFT layer.
        model: the model that contains it.
        is_gathered: whether FSDP gathers the layer's weights when it runs.
    """
    if is_replaced(layer):
        return Choice(
            replaced,
            "its forward was replaced",
            f"the forward of {name} was replaced, so its rows can't be mapped to samples: expected PEFT's forward. "
            "Restore it, or run the adapters one at a time without adapter_ids.",
        )
    try:
        handler, reason = _find_handler(name, layer, model, is_gathered)
        return Choice(in_encoder(handler) if architectures.encodes_media(model, name) else handler, reason)
    except UnsupportedError as error:
        return Choice(base_only, "adapters on this layer are refused", str(error))


def _find_handler(name: str, layer: Any, model: Any, is_gathered: bool) -> tuple[Callable[..., Tensor], str]:
    kind, config = type(layer).__name__, getattr(model, "config", None)
    expected = "expected LoRA layers that see the rows of each sample together"
    advice = "Remove the adapters from it, or run the adapters one at a time without adapter_ids."
    handler = next((HANDLERS[cls] for cls in type(layer).__mro__ if cls in HANDLERS), None)
    tuner = type(layer).__module__.removeprefix("peft.tuners.").split(".")[0]
    if handler is None or (isinstance(layer, BaseTunerLayer) and tuner not in TUNERS):
        raise UnsupportedError(f"{name} is a {type(layer).__module__}.{kind}: {expected}. {advice}")
    types = architectures.types_around(model, name)
    known, model_type = architectures.why_refused(types, name)
    if known:
        raise UnsupportedError(f"{name} belongs to a model of type {model_type!r}, and {known}: {expected}. {advice}")
    parts = name.split(".")
    for part, what in OTHER_ROWS.items():
        if part in parts and not isinstance(layer, lora.ParamWrapper):  # its experts get all samples in order
            raise UnsupportedError(f"{name} {what}: {expected}. {advice}")
    if architectures.encodes_media(model, name) and not architectures.media().intersection(types):
        raise UnsupportedError(
            f"{name} is inside the vision or audio part of a model that also reads text, and sees images, patches or "
            f"frames, not samples: {expected}. {advice}"
        )
    if getattr(config, "sparse_prediction", False) and parts[0] in ("head", "decoder"):
        raise UnsupportedError(
            f"{name} sees only the tokens that have labels, gathered from all samples, because the model's "
            f"configuration has sparse_prediction=True: {expected}. Set it to False, or leave the layer out of "
            "target_modules and modules_to_save."
        )
    base = getattr(layer, "base_layer", None)
    if isinstance(base, BaseTunerLayer) and not (isinstance(layer, lora.ParamWrapper) and type(base) is type(layer)):
        raise UnsupportedError(
            f"{name} is a {kind} around a {type(base).__name__}, two tuners on one layer: {expected}. {advice}"
        )
    if isinstance(layer, AuxiliaryTrainingWrapper):
        own = (layer, getattr(layer, "token_adapter", None))
        kinds = BaseTunerLayer, AuxiliaryTrainingWrapper
        found = (key for key, module in layer.named_modules() if isinstance(module, kinds) and module not in own)
        inner = next(found, None)
        if inner is not None:
            raise UnsupportedError(f"{name} is a {kind} with adapters inside it ({inner}): {expected}. {advice}")
    shards.check_parts(name, layer, advice)
    if is_gathered:
        shards.check_gathered(name, layer, advice)
    elif shards.is_sharded(layer):
        shards.check(name, layer, advice)
    behind = architectures.dim_of_samples(types, name)
    if behind:
        return PER_SEGMENT_ALONG[behind], f"its samples are in dimension {behind}"
    if architectures.is_tiled(types, name):
        return tiled, "its input repeats all samples"
    if not isinstance(layer, LoraLayer):
        what = kind if tuner not in TUNERS else f"{kind} of the tuner {tuner}"
        return handler, f"{what} runs PEFT's own code"
    if isinstance(layer, lora.ParamWrapper) and type(get_base(layer)).__name__ in TILED_EXPERTS:
        handler = tiled_experts
    if is_gathered and handler is linear:
        return per_segment, "FSDP gathers its weights when it runs"
    if f"{type(layer).__module__}.{kind}" not in BASE_PLUS_DELTA:
        if handler is linear:
            return per_segment, f"{kind} is a subclass of lora.Linear with its own code"
        return handler, f"{kind} runs PEFT's own code"
    return linear, ""
