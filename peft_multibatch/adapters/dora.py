"""DoRA: the factors by which adapters scale whole outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_multibatch.adapters.adapter import AnyAdapter
from peft_multibatch.compat import dequantize_module_weight
from peft_multibatch.errors import ModelStateError


if TYPE_CHECKING:
    from peft_multibatch.compat import LoraLayer


def dora_scales(layers: Sequence[LoraLayer], adapters: Mapping[int, AnyAdapter]) -> list[Tensor | None]:
    """DoRA's factors for the outputs of each slice, ``[S + 1, N]``; the last row is for the base model.

    A factor is the magnitude divided by the norm of the adapted weights, or 1 for adapters without DoRA; None for
    slices without DoRA. Computed from the current weights, because in-place changes can't be detected.

    Raises:
        ModelStateError: the base layer is offloaded.
    """
    found: list[Tensor | None] = []
    for layer in layers:
        parts = {adapter: adapter.parts([layer])[0] for adapter in adapters.values()}
        if not any(part is not None and part.magnitude is not None for part in parts.values()):
            found.append(None)
            continue
        if any(parameter.is_meta for parameter in layer.base_layer.parameters()):
            raise ModelStateError(
                "a layer with a DoRA adapter is offloaded, and DoRA reads base weights and magnitudes without "
                "calling their modules, which PEFT can't do there either: expected them on a real device. Don't "
                "offload layers with DoRA adapters."
            )
        weight = dequantize_module_weight(layer.base_layer)
        weight = weight.t() if layer.fan_in_fan_out else weight
        rows = []
        for part in parts.values():
            if part is None or part.magnitude is None:
                rows.append(torch.ones(len(weight), dtype=weight.dtype, device=weight.device))
                continue
            with torch.no_grad():  # DoRA treats the norm as a constant in gradients
                delta = part.lora_b @ part.lora_a * part.scaling
                norm = torch.linalg.norm(weight.to(delta.dtype) + delta, dim=1)
            rows.append(part.magnitude / norm)
        rows.append(torch.ones(len(weight), dtype=weight.dtype, device=weight.device))
        found.append(torch.stack(rows))
    return found
