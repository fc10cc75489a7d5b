"""Handlers for all other layers: PEFT's own module, once per segment on its rows, with its adapter active."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_multibatch.adapters import views
from peft_multibatch.adapters.views import get_base
from peft_multibatch.calls.batch_plan import BatchPlan
from peft_multibatch.calls.call import Call
from peft_multibatch.calls.graphs import Graph
from peft_multibatch.compat import ALORA_OFFSETS, LoraLayer, lora
from peft_multibatch.errors import UnsupportedError
from peft_multibatch.layers.patch import STATE, PatchedLayer, check_merged, check_not_capturing, handles
from peft_multibatch.plan.ids import Entry, ids_of
from peft_multibatch.plan.segments import BASE


@handles()
def per_segment(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Any other layer: PEFT's own module, once per segment on its rows, with its adapter as the active one."""
    patch = getattr(self, STATE)
    if patch is None:
        return type(self).forward(self, x, *args, **kwargs)
    call = _current_call(patch, self)
    if call is None:
        return patch.original(x, *args, **kwargs)
    if self in call.base_layers:
        return run_base(self, patch, x, *args, **kwargs)
    kwargs.pop(ALORA_OFFSETS, None)
    if call.packed:  # the tokens of all requests, in one row or in none
        sizes = x.shape if isinstance(get_base(self), nn.Embedding) else x.shape[:-1]
        flat = x.flatten(0, len(sizes) - 1)
        call.plan.segments.rows_per_entry(len(flat))
        return _run_per_segment(self, call, patch, flat, *args, **kwargs).unflatten(0, sizes)
    return _run_per_segment(self, call, patch, x, *args, **kwargs)


@handles()
def base_only(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A layer in which no adapter can take part in a mixed batch: all rows get what the base layer gives."""
    patch = getattr(self, STATE)
    if patch is None:
        return type(self).forward(self, *args, **kwargs)
    call = patch.router.current()
    if call is None:
        return patch.original(*args, **kwargs)
    kwargs.pop(ALORA_OFFSETS, None)
    return views.bare(self)(*args, **kwargs)


@handles()
def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A layer whose forward somebody replaced, of which nobody knows what it does with rows."""
    patch = getattr(self, STATE)
    if patch is None:
        return type(self).forward(self, *args, **kwargs)
    if patch.router.current() is None:
        return patch.original(*args, **kwargs)
    raise UnsupportedError(patch.refusal)


def run_base(layer: Any, patch: PatchedLayer, *args: Any, **kwargs: Any) -> Any:
    """What a layer gives without adapters, whatever is active outside of the batch."""
    if getattr(layer, "merged_adapters", None):  # PEFT takes them out first
        return patch.original(*args, **kwargs)
    return type(layer).forward(views.check_loaded(views.view_of(layer, {})), *args, **kwargs)


def run_apart(
    self: Any, call: Call, patch: PatchedLayer, slots: frozenset[int], x: Tensor, y: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Let PEFT's own module run the rows of some adapters, in the place of what a product gave for them.

    Args:
        slots: the adapters'.
        x: the layer's input, ``[..., K]``.
        y: the product's output, ``[..., N]``, in which these rows are the base model's; may be written in place.
    """
    check_not_capturing(x.device)
    rows_x, rows_y = (x.flatten(0, -2), y.flatten(0, -2)) if call.packed else (x, y)
    run = _runner(self, call, patch, rows_x, args, kwargs)
    segments, kinds = call.plan.runs
    for index, rows in segments.rows(len(rows_x), x.device):
        if not slots.intersection(ids_of(kinds[index])):
            continue
        part = run(loaded_view_for(self, kinds[index], call.plan, patch), rows).to(y.dtype)
        if torch.is_grad_enabled() and (part.requires_grad or rows_y.requires_grad):
            where = torch.arange(len(rows_x), device=x.device)[rows] if isinstance(rows, slice) else rows
            rows_y = rows_y.index_copy(0, where, part)
        else:
            rows_y[rows] = part
    return rows_y.view(y.shape)


def _run_per_segment(self: nn.Module, call: Call, patch: PatchedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    entries = call.plan.segments.num_entries
    if len(x) == 1 < entries and call.inside and isinstance(get_base(self), nn.Embedding):
        x = x.expand(call.rows or entries, *x.shape[1:])  # positions, which are the same for all samples
    run = _runner(self, call, patch, x, args, kwargs)
    # routers return several tensors, all of them token by token; what other layers return beside needn't be so
    dims = itertools.repeat(0) if isinstance(self, lora.ParamWrapper) else ()
    return _for_each_segment(call, patch, self, len(x), x.device, run, dims)


def _runner(
    self: Any, call: Call, patch: PatchedLayer, x: Tensor, args: tuple, kwargs: dict[str, Any]
) -> Callable[[Any, slice | Tensor], Any]:
    """What runs a view of a layer on some rows of its input, and of all that comes beside it."""
    entries = call.plan.segments.num_entries
    others = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    # experts get their routing beside the hidden states, token by token
    is_routed = isinstance(self, lora.ParamWrapper) and all(len(value) == len(x) for value in others)
    if others and not is_routed:
        raise UnsupportedError(
            f"{type(self).__name__} was called with more than one tensor, and only the first can be split by samples: "
            "expected a layer with one input. Remove the adapters from this layer, or run them one at a time."
        )
    if isinstance(self, lora.ParamWrapper) and self.num_experts > 1 and not others:
        raise UnsupportedError(
            f"{patch.name} has experts that were called without routing, on rows that needn't be in the order of the "
            "samples: expected hidden states and routing with the same rows. Remove the adapters from these "
            "parameters, or run them one at a time."
        )
    offsets = _offsets(self, call, patch, x, entries) if isinstance(self, lora.Linear) else None

    def run(view: Any, rows: slice | Tensor) -> Any:
        if offsets is not None:
            kwargs[ALORA_OFFSETS] = [offsets[row] for row in torch.arange(len(x))[rows].tolist()]

        def own(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) else value

        return type(self).forward(view, x[rows], *map(own, args), **{key: own(value) for key, value in kwargs.items()})

    return run


def loaded_view_for(layer: Any, entry: Entry, plan: BatchPlan, patch: PatchedLayer) -> Any:
    """As ``view_for``, and its parameters are there to be read."""
    return views.check_loaded(view_for(layer, entry, plan, patch))


def view_for(layer: Any, entry: Entry, plan: BatchPlan, patch: PatchedLayer) -> Any:
    """The same layer with what one entry names active: an adapter, several with their weights, or none.

    Raises:
        UnsupportedError: a mixture of adapters whose outputs here aren't sums of deltas.
    """
    adapters = plan.adapters
    if not isinstance(entry, tuple):
        return views.view_of(layer, {}) if entry == BASE else adapters[entry].view(layer)
    weights = {adapters[slot].name: weight for slot, weight in entry if adapters[slot].has(layer)}
    present = [adapters[slot] for slot, _ in entry if adapters[slot].has(layer)]
    if isinstance(layer, LoraLayer) and not any(adapter.variant(layer) for adapter in present):
        return views.view_of(layer, {adapter.name: adapter.view(layer) for adapter in present}, weights)
    if present:
        raise UnsupportedError(
            f"a mixture names adapter {min(weights)!r}, and in {patch.name} what it gives isn't a delta that can be "
            f"weighted ({type(layer).__name__}): expected plain LoRA, without variants, copies of modules and trained "
            "tokens. Give the row one adapter alone, or leave that adapter out of mixtures."
        )
    return views.view_of(layer, {})


def _offsets(
    layer: lora.Linear, call: Call, patch: PatchedLayer, x: Tensor, entries: int
) -> Sequence[int | None] | None:
    """For each row where an aLoRA adapter begins in it; None where no adapter of the batch is one."""
    used = [adapter.name for adapter in call.plan.adapters.values() if adapter.variant(layer).startswith("ALora")]
    if not used:
        return None
    if call.invocations is None:
        raise UnsupportedError(
            f"{patch.name} ran under the aLoRA adapter {used[0]!r} without a call of the model, which looks for "
            "the invocation tokens: expected model(input_ids, ...) or generate. Layers by themselves, and "
            "continuous batching, can't run aLoRA."
        )
    if len(x) != entries or x.dim() != 3 or x.shape[1] != call.invocations.tokens:
        raise UnsupportedError(
            f"{patch.name} has an aLoRA adapter and received rows of the shape {list(x.shape)} for {entries} samples "
            f"of {call.invocations.tokens} tokens: expected [samples, tokens, features]. Generate without beams and "
            "with one sequence for every prompt, or remove the adapter from this layer."
        )
    return call.invocations.offsets


@handles()
def tiled_experts(self: Any, x: Tensor) -> Tensor:
    """``lora.ParamWrapper`` where every expert gets the rows of all samples: as ``per_segment``, expert by expert."""
    patch = getattr(self, STATE)
    if patch is None:
        return type(self).forward(self, x)
    call = _current_call(patch, self)
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
    return experts_first(_for_each_segment(call, patch, self, len(tiles), x.device, run, dims=()))


@handles()
def attention(self: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``lora.MultiheadAttention``: as ``per_segment``; samples are in dimension 1 where ``batch_first`` isn't set."""
    patch = getattr(self, STATE)
    if patch is None:
        return type(self).forward(self, query, key, value, *args, **kwargs)
    call = _current_call(patch, self)
    if call is None:
        return patch.original(query, key, value, *args, **kwargs)
    if self in call.base_layers:
        return run_base(self, patch, query, key, value, *args, **kwargs)
    if query.dim() != 3 or args:
        raise UnsupportedError(
            f"{patch.name} was called with a query of {query.dim()} dimensions and {len(args)} positional arguments "
            "behind the value: expected a batch, and masks by their names. Call it so, or run the adapters one at a "
            "time."
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

    # the output has samples where the query has them, the attention weights in dimension 0
    return _for_each_segment(call, patch, self, query.shape[batch], query.device, run, dims=(batch, 0))


def _current_call(patch: PatchedLayer, layer: Any) -> Call | None:
    call = patch.router.current()
    if call is None:
        return None
    if isinstance(call, Graph):
        if layer._disable_adapters:
            return None
        raise UnsupportedError(
            f"{patch.name} runs PEFT's own code per segment, because of its class, and the segments of a batch aren't "
            "known while a graph is compiled: expected a model all of whose adapters run segmented, see mb.report(). "
            "Run it without torch.compile."
        )
    if layer not in call.base_layers:
        check_merged(patch.name, layer)
    if patch.router.is_gathered and torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters()):
        raise UnsupportedError(
            f"{patch.name} was sharded by FSDP and called with ids and with gradients, which ranks whose batches "
            "have different adapters can't reduce together: expected inference. Call the model under "
            "torch.no_grad(), train with DistributedDataParallel, or one adapter at a time without ids."
        )
    return call


def _for_each_segment(
    call: Call,
    patch: PatchedLayer,
    layer: Any,
    num_rows: int,
    device: torch.device,
    run: Callable[[Any, slice | Tensor], Any],
    dims: Iterable[int],
) -> Any:
    """Run a layer once per segment and put its outputs together: a tensor, or a tuple of tensors and None.

    Args:
        run: called with a view of the layer and the rows of a segment.
        dims: where the rows are in each output of a tuple; empty where that isn't known.
    """
    outputs, order = [], []
    check_not_capturing(device)
    segments, entries = call.plan.runs
    for index, rows in segments.rows(num_rows, device):
        outputs.append(run(loaded_view_for(layer, entries[index], call.plan, patch), rows))
        order.append(rows)
    if not outputs:
        return run(views.check_loaded(views.view_of(layer, {})), slice(0, 0))
    positions = None
    if segments.permutation is not None:
        positions = torch.cat([rows for rows in order if isinstance(rows, Tensor)]).argsort()

    def join(parts: Sequence[Any], dim: int) -> Any:
        if all(part is None for part in parts):
            return None
        if not all(isinstance(part, Tensor) for part in parts):
            raise UnsupportedError(
                f"{patch.name} returned a {type(parts[0]).__name__}, which can't be put together from segments: "
                "expected a tensor. Remove the adapters from this layer, or run them one at a time."
            )
        result = torch.cat(list(parts), dim)
        return result if positions is None else result.index_select(dim, positions)

    if isinstance(outputs[0], tuple) and dims:
        return tuple(join(parts, dim) for parts, dim in zip(zip(*outputs), dims))
    return join(outputs, 0)
