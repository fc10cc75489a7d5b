"""What a patched layer knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_multibatch.errors import MergedAdaptersError, UnsupportedError


if TYPE_CHECKING:
    from peft_multibatch.adapters.bank import Bank
    from peft_multibatch.calls.router import Router
    from peft_multibatch.layers.fusion import Group

STATE = "_multibatch"
"""Attribute of a patched module that holds its ``Patch``."""


class Patch:
    """What a patched layer needs to know. A copy or a pickle of the layer has None in its place, and is plain PEFT.

    Attributes:
        name: the layer's name in the model.
        router: tells which call is in force.
        original: the layer's own ``forward``, bound.
        bank: the layer's bank, alone; None where it runs per segment.
        group: the projection group it belongs to, or None where it runs by itself.
        index: its slice in the group.
    """

    def __init__(self, name: str, router: Router, original: Callable[..., Tensor], bank: Bank | None) -> None:
        self.name = name
        self.router = router
        self.original = original
        self.bank = bank
        self.group: Group | None = None
        self.index = 0

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


def check_state(name: str, layer: Any) -> None:
    """Raise where a layer's adapters can't be told apart by rows.

    Raises:
        MergedAdaptersError: an adapter is merged into the base weights.
    """
    if layer.merged_adapters and not layer._disable_adapters:
        raise MergedAdaptersError(
            f"adapter_ids was passed while {layer.merged_adapters} is merged into the base weights of {name}: "
            "expected unmerged adapters. Call model.unmerge_adapter() first."
        )


def check_not_capturing(device: torch.device) -> None:
    """Raise where code of ours that a replay wouldn't run is being captured.

    Raises:
        UnsupportedError: it is.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            "a CUDA graph is being captured of a layer that doesn't run on kernels alone, and which rows belong to "
            "which adapter would be part of it for good: expected float16, bfloat16 or float32, the backend triton, "
            "and no DoRA or layers that run per segment, see mb.report(). Run it without CUDA graphs."
        )
