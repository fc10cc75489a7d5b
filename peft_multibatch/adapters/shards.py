"""What a rank holds of a layer that is split over devices, by tensor parallelism or by FSDP.

With tensor parallelism transformers keeps weights as DTensors, and PEFT splits adapters with them. Of a column-wise
layer a rank holds rows of the weight and of ``lora_B``, and computes some columns of the output, delta included. Of a
row-wise layer it holds columns of the weight and of ``lora_A``, and computes a part of a sum. ``lora_B`` is linear, so
parts of the delta are added to parts of the base layer's output, and one all-reduce sums up both.

FSDP splits what is stored, not what is computed: weights are whole while the module that was sharded runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_multibatch.compat import LoraLayer, lora
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
"""A DTensor's own part; ``to_local()`` makes a new view every time."""


def own(tensor: Tensor) -> Tensor:
    """A parameter, or this rank's part of it."""
    return shard_of(tensor) if isinstance(tensor, SHARDED) else tensor


EXPECTED = "expected plain LoRA on linear layers that are split 'colwise' or 'rowwise'"

PLANS = ("colwise", "rowwise")
"""Ways of transformers to split a layer for which PEFT splits its adapters, by the dimension that is split."""


class Split(NamedTuple):
    """How tensor parallelism splits a layer.

    Attributes:
        dim: of the weight: 0 column-wise, 1 row-wise.
        group: the ranks that hold the parts.
        device: where this rank's part is.
    """

    dim: int
    group: Any
    device: torch.device


def split_of(layer: LoraLayer) -> Split | None:
    """How a layer that ``check`` let pass is split; None where every rank holds all of it."""
    base: Any = layer.get_base_layer()
    weight, plan = base._parameters.get("weight"), getattr(base, "_hf_tp_plan", None)
    if not isinstance(weight, SHARDED) or plan not in PLANS:
        return None
    return Split(PLANS.index(plan), weight.device_mesh.get_group(), shard_of(weight).device)


def is_sharded(layer: nn.Module) -> bool:
    """Whether a rank holds only a part of any of a layer's parameters."""
    return any(isinstance(parameter, SHARDED) for parameter in layer.parameters())


def check(name: str, layer: Any, advice: str) -> None:
    """Raise where a mixed batch would not be right in a layer of which this rank holds a part.

    Raises:
        UnsupportedError: it wouldn't.
    """
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else None
    if type(layer) is not lora.Linear or type(base) is not nn.Linear:
        what = type(layer).__name__ if base is None else f"{type(layer).__name__} around a {type(base).__name__}"
        raise UnsupportedError(f"{name} is split over devices, and is a {what}: {EXPECTED}. {advice}")
    weight: Any = base._parameters["weight"]
    plan = getattr(base, "_hf_tp_plan", None)
    if plan not in PLANS or not isinstance(weight, SHARDED) or weight.placements != (Shard(PLANS.index(plan)),):
        raise UnsupportedError(
            f"{name} is split over devices by the plan {plan!r}, for which PEFT doesn't split adapters: {EXPECTED}, "
            f"by transformers, and peft 0.21.1 or newer. {advice}"
        )


def check_adapter(name: str, layer: Any, adapter: str) -> None:
    """Raise where an adapter can't run in a split layer.

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
            f"{name} is split over devices by the plan {PLANS[dim]!r}, and the weights of adapter {adapter!r} are not "
            f"split with it: expected an adapter that PEFT added to the split model. Run the adapter by itself, "
            "without adapter_ids."
        )


def check_parts(name: str, layer: nn.Module, advice: str) -> None:
    """Raise where FSDP shards a part of a layer, which gathers its weights whenever it runs.

    Raises:
        UnsupportedError: it does.
    """
    inside = next((key for key, module in layer.named_modules() if key and isinstance(module, GATHERED)), None)
    if inside is not None:
        raise UnsupportedError(
            f"{name} has a part that FSDP shards by itself ({inside}) and that runs as often as a batch has adapters, "
            "so that ranks with different batches would put together different weights: expected whole layers of the "
            f"model, such as decoder layers. Pass those to fully_shard. {advice}"
        )


def check_gathered(name: str, layer: Any, advice: str) -> None:
    """Raise where FSDP shards a layer that tensor parallelism splits as well.

    Raises:
        UnsupportedError: it does.
    """
    if isinstance(layer, LoraLayer) and getattr(layer.get_base_layer(), "_hf_tp_plan", None) is not None:
        raise UnsupportedError(
            f"{name} is split by tensor parallelism and sharded by FSDP, which wasn't tested together: expected one "
            f"of the two. {advice}"
        )


def check_gradients(layers: Sequence[Any], x: Tensor) -> None:
    """Raise where split layers would have to give gradients.

    Raises:
        UnsupportedError: gradients are enabled, and the input or a parameter wants one.
    """
    if x.requires_grad or any(parameter.requires_grad for layer in layers for parameter in layer.parameters()):
        raise UnsupportedError(
            "a model split by tensor parallelism was called with ids and with gradients: expected inference. Call it "
            "under torch.no_grad(), or train one adapter at a time without ids."
        )


def base_output(layer: LoraLayer, split: Split, x: Tensor) -> Tensor:
    """What a rank computes of the base layer, in a tensor of its own: its columns, or its part of the sum."""
    if isinstance(x, SHARDED):
        raise UnsupportedError(
            "a layer split by tensor parallelism was given a DTensor: expected this rank's tensor, as transformers' "
            "own plans give it. Use tp_plan='auto', or run the adapters one at a time without adapter_ids."
        )
    base: Any = layer.base_layer
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    if _is_hooked(base):  # what hooks see is the whole sum, to which `sum_up` adds the delta's
        return x.new_zeros(*x.shape[:-1], len(weight)) if split.dim else base(x).clone()
    return F.linear(x, shard_of(weight), None if split.dim or bias is None else own(bias))


def sum_up(layer: LoraLayer, split: Split, x: Tensor, y: Tensor) -> Tensor:
    """The whole output of a row-wise layer, from the ranks' parts; of a column-wise one, what it is already."""
    if split.dim == 0:
        return y
    dist.all_reduce(y, group=split.group)
    base: Any = layer.base_layer
    if _is_hooked(base):
        return base(x) + y
    bias = base._parameters["bias"]
    return y if bias is None else y + own(bias)


def is_split_forward(forward: Any) -> bool:
    """Whether a forward is what transformers' tensor parallelism puts in its place."""
    return getattr(forward, "__qualname__", "").startswith("TensorParallelLayer.")


def _is_hooked(base: nn.Module) -> bool:
    """Whether anybody but transformers' tensor parallelism wants to see the base layer run."""
    return bool(
        not is_split_forward(base.__dict__.get("forward"))
        or base._forward_hooks
        or base._forward_pre_hooks
        or nn.modules.module._has_any_global_hook()
    )


def check_same(ids: Sequence[Any], names: Sequence[Any], split: Split) -> None:
    """Raise on every rank where ranks that compute the same rows were given different ids, or one can't run its own.

    Raises:
        AdapterIdsError: they were.
    """
    digest = hashlib.sha256(repr([ids, names]).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    ends = torch.tensor([number, -number], dtype=torch.int64, device=split.device)
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=split.group)
    high, low = ends.tolist()
    if high != -low:
        raise AdapterIdsError(
            "the ranks of a model split by tensor parallelism were given different adapter_ids, or have different "
            f"adapters, here {list(ids)} of {list(names)}: expected the same on every rank, as with input_ids. Pass "
            "every rank the same ids, and add adapters in the same order."
        )
