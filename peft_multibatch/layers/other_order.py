"""Handlers for layers whose rows aren't in the order of the samples."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_multibatch.calls.call import Call
from peft_multibatch.errors import UnsupportedError
from peft_multibatch.layers.patch import STATE, handles
from peft_multibatch.layers.per_segment import current_call, for_each_segment, per_segment, run_base


@handles()
def tiled(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``per_segment`` for a layer whose input repeats all samples; its rows are first brought into sample order."""
    patch = getattr(self, STATE)
    call = None if patch is None else patch.router.current(patch)
    entries = call.plan.segments.num_entries if isinstance(call, Call) else 0
    if not entries or len(x) % entries or len(x) == entries:
        return per_segment(self, x, *args, **kwargs)
    y = per_segment(self, x.unflatten(0, (-1, entries)).transpose(0, 1).flatten(0, 1), *args, **kwargs)
    return y.unflatten(0, (entries, -1)).transpose(0, 1).flatten(0, 1)


@handles()
def tiled_experts(self: Any, x: Tensor) -> Tensor:
    """``per_segment`` for a ``lora.ParamWrapper`` whose input repeats all samples once per expert."""
    patch = getattr(self, STATE)
    if patch is None:
        return type(self).forward(self, x)
    call = current_call(patch, self)
    if call is None:
        return patch.original(x)
    if self in call.base_layers:
        return run_base(self, patch, x)

    def rows_first(tiles: Tensor) -> Tensor:
        return tiles.unflatten(0, (self.num_experts, -1)).transpose(0, 1)

    def experts_first(tiles: Tensor) -> Tensor:
        return tiles.transpose(0, 1).flatten(0, 1)

    def run(view: Any, rows: slice | Tensor) -> Tensor:
        return rows_first(type(self).forward(view, experts_first(tiles[rows])))

    tiles = rows_first(x)
    return experts_first(for_each_segment(call, patch, self, len(tiles), x.device, run, lambda *_: 0))


@handles()
def attention(self: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``per_segment`` for ``lora.MultiheadAttention``; samples are in dimension 1 unless ``batch_first`` is set."""
    patch = getattr(self, STATE)
    if patch is None:
        return type(self).forward(self, query, key, value, *args, **kwargs)
    call = current_call(patch, self)
    if call is None:
        return patch.original(query, key, value, *args, **kwargs)
    if self in call.base_layers:
        return run_base(self, patch, query, key, value, *args, **kwargs)
    if query.dim() != 3 or args:
        raise UnsupportedError(
            f"{patch.name} was called with a query of {query.dim()} dimensions and {len(args)} positional arguments "
            "after value: expected a batched query of 3 dimensions, and masks as keyword arguments. Change the call, "
            "or run the adapters one at a time."
        )
    base: Any = self.base_layer
    batch = 0 if base.batch_first else 1

    def run(view: Any, rows: slice | Tensor) -> Any:
        index: Any = rows if batch == 0 else (slice(None), rows)
        own = dict(kwargs)
        if kwargs.get("key_padding_mask") is not None:
            own["key_padding_mask"] = kwargs["key_padding_mask"][rows]
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.dim() == 3:  # [samples × heads, targets, sources]
            own["attn_mask"] = mask.unflatten(0, (-1, base.num_heads))[rows].flatten(0, 1)
        return type(self).forward(view, query[index], key[index], value[index], **own)

    # samples are in the query's dimension in the output, and in dimension 0 in the attention weights
    dims = batch, 0
    return for_each_segment(call, patch, self, query.shape[batch], query.device, run, lambda n, _: dims[n])
