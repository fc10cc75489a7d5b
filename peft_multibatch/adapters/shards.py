"""Layers that are split over devices by tensor parallelism or FSDP.

With tensor parallelism, transformers stores weights as DTensors, and PEFT splits adapters with them. In a column-wise
layer, a rank has rows of the weight and of ``lora_B``, and computes some columns of the output, including the delta.
In a row-wise layer, it has columns of the weight and of ``lora_A``, and computes a partial sum. ``lora_B`` is linear,
so partial deltas are added to the partial outputs of the base layer, and a single all-reduce sums up both.

FSDP splits only the storage: weights are whole while a sharded module runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_multibatch.compat import SPLITS_ADAPTERS, LoraLayer, lora
from peft_multibatch.errors import AdapterIdsError, UnsupportedError


if torch.distributed.is_available():
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor, Shard

    SHARDED: Any = (DTensor,)
    GATHERED: Any = (FSDPModule,)
    FLATTENED: Any = (FullyShardedDataParallel,)
else:
    SHARDED = GATHERED = FLATTENED = ()

shard_of = attrgetter("_local_tensor")
"""Returns a DTensor's local shard; ``to_local()`` would make a new view every time."""


def own(tensor: Tensor) -> Tensor:
    """A parameter, or this rank's shard of it."""
    return shard_of(tensor) if isinstance(tensor, SHARDED) else tensor


EXPECTED = "expected plain LoRA on linear layers that are split 'colwise' or 'rowwise'"

PLANS = ("colwise", "rowwise")
"""transformers' plans for which PEFT splits adapters; the index is the dimension that is split."""


class Split(NamedTuple):
    """How tensor parallelism splits a layer.

    Attributes:
        dim: the split dimension of the weight: 0 column-wise, 1 row-wise.
        group: the ranks that have the shards.
        device: the device of this rank's shard.
    """

    dim: int
    group: Any
    device: torch.device


def split_of(layer: LoraLayer) -> Split | None:
    """How a layer that passed ``check`` is split; None if every rank has all of it."""
    base: Any = layer.get_base_layer()
    weight, plan = base._parameters.get("weight"), getattr(base, "_hf_tp_plan", None)
    if not isinstance(weight, SHARDED) or plan not in PLANS:
        return None
    return Split(PLANS.index(plan), weight.device_mesh.get_group(), shard_of(weight).device)


def is_sharded(layer: nn.Module) -> bool:
    """Whether any of a layer's parameters is sharded."""
    return any(isinstance(parameter, SHARDED) for parameter in layer.parameters())


def check(name: str, layer: Any, advice: str) -> None:
    """Check that a split layer can run mixed batches.

    Raises:
        UnsupportedError: it can't.
    """
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else None
    if type(layer) is not lora.Linear or type(base) is not nn.Linear:
        what = type(layer).__name__ if base is None else f"{type(layer).__name__} around a {type(base).__name__}"
        raise UnsupportedError(f"{name} is a {what} that is split over devices: {EXPECTED}. {advice}")
    weight: Any = base._parameters["weight"]
    plan = getattr(base, "_hf_tp_plan", None)
    if plan is None and not SPLITS_ADAPTERS:
        raise UnsupportedError(
            f"{name} is split over devices, and peft {version('peft')} doesn't split its adapters, so that PEFT can't "
            "run them either: expected peft 0.21.1 or newer. Upgrade peft."
        )
    if plan not in PLANS or not isinstance(weight, SHARDED) or weight.placements != (Shard(PLANS.index(plan)),):
        raise UnsupportedError(
            f"{name} is split over devices by the plan {plan!r}, for which PEFT doesn't split adapters: {EXPECTED} "
            f"by transformers. {advice}"
        )


def check_adapter(name: str, layer: Any, adapter: str) -> None:
    """Check that an adapter can run in a split layer.

    Raises:
        UnsupportedError: it can't.
    """
    split = split_of(layer)
    assert split is not None
    if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
        raise UnsupportedError(
            f"{name} is split over devices, and adapter {adapter!r} has a variant or a bias: {EXPECTED}. Run the "
            "adapter by itself, without adapter_ids."
        )
    dim = split.dim
    parts, whole = (layer.lora_B, layer.lora_A) if dim == 0 else (layer.lora_A, layer.lora_B)
    part, weight = parts[adapter].weight, layer.get_base_layer()._parameters["weight"]
    is_split = isinstance(part, SHARDED) and shard_of(part).shape[dim] == shard_of(weight).shape[dim]
    if not is_split or isinstance(whole[adapter].weight, SHARDED):
        raise UnsupportedError(
            f"{name} is split over devices by the plan {PLANS[dim]!r}, but the weights of adapter {adapter!r} are not "
            f"split with it: expected an adapter that PEFT added to the split model. Run the adapter by itself, "
            "without adapter_ids."
        )


def check_parts(name: str, layer: nn.Module, advice: str) -> None:
    """Check that FSDP doesn't shard modules inside a layer, whose weights are gathered whenever they run.

    Raises:
        UnsupportedError: it does.
    """
    inside = next((key for key, module in layer.named_modules() if key and isinstance(module, GATHERED)), None)
    if inside is not None:
        raise UnsupportedError(
            f"{name} contains a module that FSDP shards by itself ({inside}) and that runs once per adapter of the "
            "batch, so ranks with different batches would gather different weights: expected whole layers of the "
            f"model, such as decoder layers. Pass those to fully_shard. {advice}"
        )


def check_gathered(name: str, layer: Any, advice: str) -> None:
    """Check that a layer sharded by FSDP isn't also split by tensor parallelism.

    Raises:
        UnsupportedError: it is.
    """
    if isinstance(layer, LoraLayer) and getattr(layer.get_base_layer(), "_hf_tp_plan", None) is not None:
        raise UnsupportedError(
            f"{name} is both split by tensor parallelism and sharded by FSDP, a combination that isn't tested: "
            f"expected one of the two. {advice}"
        )


def check_gradients(layers: Sequence[Any], x: Tensor) -> None:
    """Check that split layers don't need gradients.

    Raises:
        UnsupportedError: the input or a parameter requires gradients.
    """
    if x.requires_grad or any(parameter.requires_grad for layer in layers for parameter in layer.parameters()):
        raise UnsupportedError(
            "a model split by tensor parallelism was called with ids and with gradients: expected inference. Call it "
            "under torch.no_grad(), or train one adapter at a time without ids."
        )


def base_output(layer: LoraLayer, split: Split, x: Tensor) -> Tensor:
    """This rank's part of the base layer's output, its columns or its partial sum, in a new tensor."""
    if isinstance(x, SHARDED):
        raise UnsupportedError(
            "a layer split by tensor parallelism received a DTensor: expected this rank's local tensor, as with "
            "transformers' own plans. Use tp_plan='auto', or run the adapters one at a time without adapter_ids."
        )
    base: Any = layer.base_layer
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    if _is_hooked(base):  # hooks have to see the whole sum; `sum_up` calls the layer and adds the delta
        return x.new_zeros(*x.shape[:-1], len(weight)) if split.dim else base(x).clone()
    return F.linear(x, shard_of(weight), None if split.dim or bias is None else own(bias))


def sum_up(layer: LoraLayer, split: Split, x: Tensor, y: Tensor) -> Tensor:
    """The sum of a row-wise layer's output over ranks; a column-wise layer's output unchanged."""
    if split.dim == 0:
        return y
    dist.all_reduce(y, group=split.group)
    base: Any = layer.base_layer
    if _is_hooked(base):
        return base(x) + y
    bias = base._parameters["bias"]
    return y if bias is None else y + own(bias)


def is_split_forward(forward: Any) -> bool:
    """Whether a forward is the one that transformers' tensor parallelism installs."""
    return getattr(forward, "__qualname__", "").startswith("TensorParallelLayer.")


def _is_hooked(base: nn.Module) -> bool:
    """Whether the base layer has hooks or a replaced forward, other than those of tensor parallelism."""
    return bool(
        not is_split_forward(base.__dict__.get("forward"))
        or base._forward_hooks
        or base._forward_pre_hooks
        or nn.modules.module._has_any_global_hook()
    )


def check_same(ids: Sequence[Any], names: Sequence[Any], split: Split) -> None:
    """Check that all ranks that compute the same rows got the same ids. Raises on every rank, or on none.

    Raises:
        AdapterIdsError: they didn't, or a rank refused its ids.
    """
    digest = hashlib.sha256(repr([ids, names]).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    ends = torch.tensor([number, -number], dtype=torch.int64, device=split.device)
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=split.group)
    high, low = ends.tolist()
    if high != -low:
        raise AdapterIdsError(
            "the ranks of a model split by tensor parallelism got different adapter_ids, or have different adapters, "
            f"here {list(ids)} of {list(names)}: expected the same on every rank, as for input_ids. Pass every rank "
            "the same ids, and add adapters in the same order."
        )
