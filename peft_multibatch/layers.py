"""How each PEFT layer class runs a mixed batch: one handler per class, found through the table at the end.

A handler is a function in the place of the layer's ``forward``. Without a call in force it does what PEFT does.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as lora
from peft.tuners.lora.tp_layer import LoraParallelLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from peft_multibatch import ops
from peft_multibatch.bank import KNOWN_VARIANTS
from peft_multibatch.errors import MergedAdaptersError, ModelStateError, UnsupportedError
from peft_multibatch.ids import Entry
from peft_multibatch.routing import Call, Graph, take_plan
from peft_multibatch.segments import BASE


if TYPE_CHECKING:
    from peft_multibatch.bank import Bank
    from peft_multibatch.fusion import Group
    from peft_multibatch.routing import Router

STATE = "_multibatch"
"""Attribute of a patched module that holds its ``Patch``."""

ALORA_OFFSETS = "alora_offsets"
"""Argument with which PEFT's hooks tell layers where aLoRA adapters begin."""


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


def linear(self: LoraLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``lora.Linear`` and its like: the base layer's output plus every row's own delta; siblings run as one."""
    patch = self._multibatch  # not by the name in STATE: every projection of every token comes through here
    if patch is None:
        return type(self).forward(self, x, *args, **kwargs)
    router = patch.router
    call = router.current()
    if call is None or self._disable_adapters:
        return patch.original(x, *args, **kwargs)
    if self.merged_adapters:
        check_state(patch.name, self)
    if kwargs:
        kwargs.pop(ALORA_OFFSETS, None)  # PEFT's, of the adapter that is active outside of the batch
    if self.training and _uses_dropout(self):
        return per_segment(self, x, *args, **kwargs)

    group = patch.group
    if group is None or args or kwargs:
        return _add_deltas(call, router, patch.bank, [_base_output(self, x, *args, **kwargs)], x)[0]
    if patch.index == 0:
        whole = group.base_output(x)
        ys = [whole] if whole is not None else [_base_output(layer, x) for layer in group.layers]
        ys = _add_deltas(call, router, group.bank, ys, x)
        if whole is not None:
            ys = list(ys[0].split(group.bank.widths, dim=-1))
        call.stash[group] = x, _version(call, x), [None, *ys[1:]]
        return ys[0]
    source, version, waiting = call.stash.get(group, (None, 0, []))
    if source is x and version == _version(call, x) and waiting[patch.index] is not None:
        y = waiting[patch.index]
        waiting[patch.index] = None
        if patch.index == len(waiting) - 1:
            del call.stash[group]
        return y
    if isinstance(call, Call) and source is not None and source is not x:
        group.split("its projections read different tensors")
    return _add_deltas(call, router, patch.bank, [_base_output(self, x)], x)[0]


def _version(call: Call | Graph, x: Tensor) -> int:
    """Tells whether a tensor was written in place; graphs don't let that happen, and inference tensors don't count."""
    return 0 if isinstance(call, Graph) or x.is_inference() else x._version


def _base_output(layer: LoraLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What the layer gives without adapters, in a tensor that nobody else holds."""
    base = layer.base_layer
    if "forward" in base.__dict__ or base._forward_hooks:
        # deltas are added in place, which must not reach what a hook kept, or returned from somewhere else
        return base(x, *args, **kwargs).clone()
    hooked = base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    if type(base) is not nn.Linear or hooked or args or kwargs or nn.modules.module._has_any_global_hook():
        return base(x, *args, **kwargs)
    parameters: dict[str, Any] = base._parameters  # what calling the module comes to, without its cost
    return F.linear(x, parameters["weight"], parameters["bias"])


def _uses_dropout(layer: LoraLayer) -> bool:
    return any(not isinstance(dropout, nn.Identity) and dropout.p > 0 for dropout in layer.lora_dropout.values())


def _add_deltas(call: Call | Graph, router: Router, bank: Bank, ys: list[Tensor], x: Tensor) -> list[Tensor]:
    """Add to every slice's output the deltas of ``x`` ``[..., K]``, row by row; in place for inference.

    ``ys`` is one tensor ``[..., N]`` for each slice, or one with all slices side by side; so is the result.
    """
    if isinstance(call, Graph):
        return _add_in_graph(call, router, bank, ys, x)
    ys = _add(call, router, bank, ys, x)
    if bank.has_variants():
        ys = _scale(call, bank, ys)
    return ys


def _add(call: Call, router: Router, bank: Bank, ys: list[Tensor], x: Tensor) -> list[Tensor]:
    mix, kernels = call.mix, router.kernels
    if torch.is_grad_enabled() and (mix.trains(bank) or x.requires_grad or any(y.requires_grad for y in ys)):
        call.num_rows(x)
        return _add_through_ops(mix.op_inputs(bank), bank, ys, x) if mix.adapters else ys
    if kernels is not None and kernels.runs_on(x):
        if kernels.is_capturing():
            plans, tables = router.graph.capture(call, bank, x.device)
            ys = [y.contiguous() for y in ys]
            for plan in plans:
                kernels.add_(ys, x, bank.widths, plan, tables)
            return ys
        products = mix.products.get(bank)
        if products is None or not products.fit(ys, x):
            call.num_rows(x)
            ys = [y.contiguous() for y in ys]
            router.graph.prepare(call, x.device)
            plans, tables = mix.plans(x.device), mix.tables(bank, x.device)
            products = mix.products[bank] = kernels.Products(ys, x, bank.widths, mix.terms, plans, tables)
        if products.can_run:
            products(ys, x, call.workspaces)
            return ys
    call.num_rows(x)  # dimension 0 has to map to samples, not just all rows together
    _check_not_capturing(x)
    if mix.adapters:
        ys = [y.contiguous() for y in ys]
        outputs, rows = [y.view(-1, y.shape[-1]) for y in ys], x.reshape(-1, x.shape[-1])
        slices = outputs if len(outputs) == len(bank.widths) else outputs[0].split(bank.widths, dim=-1)
        with _without_autocast(x.device.type):
            for term in mix.terms:
                ops.torch_backend.apply_(slices, rows, term, mix.weights(bank))
    return ys


def _scale(call: Call, bank: Bank, ys: list[Tensor]) -> list[Tensor]:
    """DoRA: every row's output without bias times the magnitudes of its own adapter over the norms of its weights.

    Raises:
        UnsupportedError: a mixture of DoRA adapters.
    """
    _check_not_capturing(ys[0])
    for name in [call.mix.adapters[slot].name for slot in call.mix.mixed]:
        if any(name in layer.lora_variant for layer in bank.layers):
            raise UnsupportedError(
                f"a mixture names {name!r}, a DoRA adapter, whose output isn't a delta that can be weighted: expected "
                "plain LoRA. Give the row that adapter alone, or leave it out of mixtures."
            )
    scales = None if torch.is_grad_enabled() else call.dora_scales.get(bank)
    if scales is None:
        scales = bank.dora_scales(call.mix.adapters)
        if call.inside and not torch.is_grad_enabled():  # for as long as one call of the model, so for all its tokens
            call.dora_scales[bank] = scales
    found = []
    for layer, y, scale in zip(bank.layers, ys, scales):
        if scale is not None:
            rows = call.mix.positions(y.device)  # the base model's -1 is the last row of the scales
            bias = layer.base_layer.bias
            start = torch.zeros((), dtype=y.dtype, device=y.device) if bias is None else bias.to(y.dtype)
            grouped = y.reshape(len(rows), -1, y.shape[-1])
            y = torch.lerp(start.expand_as(grouped), grouped, scale[rows].to(y.dtype)[:, None]).view(y.shape)
        found.append(y)
    return found


def _check_not_capturing(x: Tensor) -> None:
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            "a CUDA graph is being captured of a layer that doesn't run on kernels alone, and which rows belong to "
            "which adapter would be part of it for good: expected float16, bfloat16 or float32, the backend triton, "
            "and no DoRA or layers that run per segment, see mb.report(). Run it without CUDA graphs."
        )


def _add_in_graph(graph: Graph, router: Router, bank: Bank, ys: list[Tensor], x: Tensor) -> list[Tensor]:
    kernels = router.kernels
    if bank.has_variants():
        raise UnsupportedError(
            "a model was compiled with DoRA adapters, whose norms are computed when a call begins: expected adapters "
            "without variants. Run it without torch.compile, or pass disable_compile=True to generate."
        )
    if kernels is None or torch.is_grad_enabled() or not kernels.runs_on(x):
        graph.arm()
        plans = [take_plan(graph.buffer.packed, graph.key, index) for index in range(graph.terms)]
        return _add_through_ops((plans, bank.lora_a, bank.lora_b, bank.ranks, bank.scalings), bank, ys, x)
    if graph.contended or not graph.here.thread.active:
        raise UnsupportedError(
            "a compiled model was called on a GPU while other ids, or ids at all, are in force on another thread or "
            "task: expected one at a time, because a graph reads its plan at one place. Run the calls after each "
            "other, put ids in force on the thread that calls, or pass disable_compile=True to generate."
        )
    graph.arm_kernels(bank.key, str(x.device))
    ys = [y.contiguous() for y in ys]
    for table in bank.held:
        if table.dtype not in kernels.DTYPES:
            raise UnsupportedError(
                f"a model was compiled whose adapters have weights of the dtype {table.dtype}: expected float16, "
                "bfloat16 or float32, and contiguous weights. Convert the adapters, or run without torch.compile."
            )
        for buffer in graph.buffers[str(x.device)]:
            ops.add_(ys, x, bank.widths, buffer.packed, table.rows, table.rank, table.is_aligned, table.dtype)
    return ys


def _add_through_ops(inputs: tuple, bank: Bank, ys: list[Tensor], x: Tensor) -> list[Tensor]:
    plans, lora_a, lora_b, ranks, scalings = inputs
    with _without_autocast(x.device.type):
        rows = x.reshape(-1, x.shape[-1])
        deltas = [
            ops.expand(ops.shrink(rows, lora_a, plan, ranks), lora_b, plan, ranks, scalings, bank.slice_offsets)
            for plan in plans
        ]
        delta = functools.reduce(operator.add, deltas)
    parts = delta.split([y.shape[-1] for y in ys], dim=-1)
    return [(y + part.view(y.shape)).to(y.dtype) for y, part in zip(ys, parts)]


def _without_autocast(device_type: str) -> AbstractContextManager:
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def per_segment(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Any other layer: PEFT's own module, once per segment on its rows, with its adapter as the active one."""
    patch = getattr(self, STATE)
    if patch is None:
        return type(self).forward(self, x, *args, **kwargs)
    call = _current_call(patch, self)
    if call is None:
        return patch.original(x, *args, **kwargs)
    kwargs.pop(ALORA_OFFSETS, None)
    if call.packed:  # the tokens of all requests in one row
        flat = x.flatten(0, 1)
        call.mix.segments.rows_per_entry(len(flat))
        return _run_per_segment(self, call, patch, flat, *args, **kwargs).unflatten(0, x.shape[:2])
    return _run_per_segment(self, call, patch, x, *args, **kwargs)


def _run_per_segment(self: nn.Module, call: Call, patch: Patch, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    entries = call.mix.segments.num_entries
    if len(x) == 1 < entries and call.inside and isinstance(get_base(self), nn.Embedding):
        x = x.expand(call.rows or entries, *x.shape[1:])  # positions, which are the same for all samples
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

    offsets = None
    if isinstance(self, lora.Linear) and any(map(_is_alora, self.lora_variant.values())):
        offsets = _offsets(self, call, patch, x, entries)

    def run(view: Any, rows: slice | Tensor) -> Any:
        if offsets is not None:
            kwargs[ALORA_OFFSETS] = [offsets[row] for row in torch.arange(len(x))[rows].tolist()]

        def own(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) else value

        return type(self).forward(view, x[rows], *map(own, args), **{key: own(value) for key, value in kwargs.items()})

    # routers return several tensors, all of them token by token; what other layers return beside needn't be so
    dims = itertools.repeat(0) if isinstance(self, lora.ParamWrapper) else ()
    return _for_each_segment(call, patch, self, len(x), x.device, run, dims)


def _is_alora(variant: Any) -> bool:
    return type(variant).__name__.startswith("ALora")


def _offsets(layer: lora.Linear, call: Call, patch: Patch, x: Tensor, entries: int) -> Sequence[int | None] | None:
    """For each row where an aLoRA adapter begins in it; None where no adapter of the batch is one."""
    if call.invocations is None:
        used = [adapter.name for adapter in call.mix.adapters.values() if adapter.name in layer.lora_variant]
        if any(_is_alora(layer.lora_variant[name]) for name in used):
            raise UnsupportedError(
                f"{patch.name} ran under the aLoRA adapter {used[0]!r} without a call of the model, which looks for "
                "the invocation tokens: expected model(input_ids, ...) or generate. Layers by themselves, and "
                "continuous batching, can't run aLoRA."
            )
        return None
    if len(x) != entries or x.dim() != 3 or x.shape[1] != call.invocations.tokens:
        raise UnsupportedError(
            f"{patch.name} has an aLoRA adapter and received rows of the shape {list(x.shape)} for {entries} samples "
            f"of {call.invocations.tokens} tokens: expected [samples, tokens, features]. Generate without beams and "
            "with one sequence for every prompt, or remove the adapter from this layer."
        )
    return call.invocations.offsets


def tiled_experts(self: Any, x: Tensor) -> Tensor:
    """``lora.ParamWrapper`` where every expert gets the rows of all samples: as ``per_segment``, expert by expert."""
    patch = getattr(self, STATE)
    if patch is None:
        return type(self).forward(self, x)
    call = _current_call(patch, self)
    if call is None:
        return patch.original(x)

    def rows_first(tiles: Tensor) -> Tensor:
        return tiles.unflatten(0, (self.num_experts, -1)).transpose(0, 1)

    def experts_first(tiles: Tensor) -> Tensor:
        return tiles.transpose(0, 1).flatten(0, 1)

    def run(view: Any, rows: slice | Tensor) -> Tensor:
        return rows_first(type(self).forward(view, experts_first(tiles[rows])))

    tiles = rows_first(x)
    return experts_first(_for_each_segment(call, patch, self, len(tiles), x.device, run, dims=()))


def attention(self: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``lora.MultiheadAttention``: as ``per_segment``; samples are in dimension 1 where ``batch_first`` isn't set."""
    patch = getattr(self, STATE)
    if patch is None:
        return type(self).forward(self, query, key, value, *args, **kwargs)
    call = _current_call(patch, self)
    if call is None:
        return patch.original(query, key, value, *args, **kwargs)
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


def _current_call(patch: Patch, layer: Any) -> Call | None:
    call = None if layer._disable_adapters else patch.router.current()
    if isinstance(call, Graph):
        raise UnsupportedError(
            f"{patch.name} runs PEFT's own code per segment, because of its class or because it trains with dropout, "
            "and the segments of a batch aren't known while a graph is compiled: expected a model all of whose "
            "adapters run segmented, see mb.report(). Run it without torch.compile."
        )
    if call is not None:
        check_state(patch.name, layer)
    return call


def _for_each_segment(
    call: Call,
    patch: Patch,
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
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _check_not_capturing(next(layer.parameters()))
    segments, entries = call.mix.runs
    for index, rows in segments.rows(num_rows, device):
        outputs.append(run(view_for(layer, entries[index], patch), rows))
        order.append(rows)
    if not outputs:
        return run(single_adapter_view(layer, None), slice(0, 0))
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


def view_for(layer: Any, entry: Entry, patch: Patch) -> Any:
    """The same layer with what one entry names active: an adapter, several with their weights, or none.

    Raises:
        UnsupportedError: a mixture of adapters whose outputs here aren't sums of deltas.
    """
    names = patch.router.names
    if not isinstance(entry, tuple):
        return single_adapter_view(layer, None if entry == BASE else names[entry])
    weights = {str(names[slot]): weight for slot, weight in entry}
    if isinstance(layer, LoraLayer) and not layer.lora_variant.keys() & weights.keys():
        return single_adapter_view(layer, list(weights), weights)
    present = sorted(adapters_of(layer) & weights.keys())
    if present:
        raise UnsupportedError(
            f"a mixture names adapter {present[0]!r}, and in {patch.name} what it gives isn't a delta that can be "
            f"weighted ({type(layer).__name__}): expected plain LoRA, without variants, copies of modules and trained "
            "tokens. Give the row one adapter alone, or leave that adapter out of mixtures."
        )
    return single_adapter_view(layer, None)


def adapters_of(layer: Any) -> set[str]:
    """Names of the adapters that a PEFT layer has something for."""
    if isinstance(layer, BaseTunerLayer):
        return set(layer._get_available_adapters())
    if isinstance(layer, TrainableTokensWrapper):
        return set(layer.token_adapter.trainable_tokens_delta)
    return set(layer.modules_to_save)


def single_adapter_view(layer: nn.Module, name: str | list[str] | None, weights: dict | None = None) -> Any:
    """The same layer, its modules and parameters shared, with one adapter active, or with none.

    The layer's own attributes stay untouched, because other threads may be using them.

    Args:
        layer: the layer.
        name: the adapter, or the adapters of a mixture.
        weights: of a mixture, what each adapter counts beside its scaling.
    """
    if any(parameter.is_meta for parameter in layer.parameters()):
        raise ModelStateError(
            f"parameters of a {type(layer).__name__} are on the meta device, as offloading leaves them between calls: "
            "expected them on a real device. Load the model without offloading."
        )
    view: Any = copy.copy(layer)
    view._disable_adapters = name is None
    view._active_adapter = name if isinstance(name, list) else [name] if name is not None else []
    if weights is not None:
        view.scaling = {key: scaling * weights.get(key, 1.0) for key, scaling in view.scaling.items()}
    if isinstance(layer, TrainableTokensWrapper):  # what does the work has a state of its own, and may lack the name
        tokens = layer.token_adapter
        own = single_adapter_view(tokens, name if name in tokens.trainable_tokens_delta else None)
        view._modules = {**layer._modules, "token_adapter": own}
    # these two put weights into the base module while they run: into a copy of it, here
    elif isinstance(layer, lora.ParamWrapper):
        is_nested = isinstance(layer.base_layer, lora.ParamWrapper)
        base = single_adapter_view(layer.base_layer, name, weights) if is_nested else _copy_of(layer.base_layer)
        view._modules = {**layer._modules, "base_layer": base}
    elif isinstance(layer, lora.MultiheadAttention):
        base, out_proj = _copy_of(layer.base_layer), single_adapter_view(layer.base_layer.out_proj, name, weights)
        out_proj._modules = {**out_proj._modules, "base_layer": _copy_of(out_proj.base_layer)}
        base._modules["out_proj"] = out_proj
        view._modules = {**layer._modules, "base_layer": base}
        view.merged_adapters, out_proj.merged_adapters = [], []
    return view


def _copy_of(module: nn.Module) -> nn.Module:
    """A module with the same parameters that may be replaced without touching the original's."""
    copied = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[name] = dict(module.__dict__[name])
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.requires_grad:
            # with a version counter of its own: parametrizations count as changes, which autograd would complain of
            copied._parameters[name] = nn.Parameter(parameter.data, requires_grad=False)
    return copied


def get_base(layer: Any) -> nn.Module:
    """The module of the base model that a PEFT layer stands for."""
    while isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
    return layer


ALL = (linear, per_segment, tiled_experts, attention)
for _handler in ALL:
    _handler.__name__ = "forward"  # bound methods are pickled by this name: unpickled, a layer has its class's forward

PER_SEGMENT = "per segment"
SEGMENTED = "segmented"

# The first match in a layer class's method resolution order counts. None: rows routed through it would not be right.
HANDLERS: dict[type, Callable[..., Tensor] | None] = {
    lora.Linear: linear,
    lora.MultiheadAttention: attention,
    LoraParallelLinear: None,  # Megatron's rows are positions first
    LoraLayer: per_segment,
    ModulesToSaveWrapper: per_segment,
    TrainableTokensWrapper: per_segment,
    AuxiliaryTrainingWrapper: None,
    BaseTunerLayer: per_segment,  # another tuner than LoRA: see TUNERS
}

# Classes whose forward is nothing but the base layer's output plus the delta; what a subclass does nobody knows. By
# name, because importing them imports the packages that they are for.
BASE_PLUS_DELTA = {
    f"peft.tuners.lora.{name}"
    for name in (
        "layer.Linear", "aqlm.AqlmLoraLinear", "awq.AwqLoraLinear", "bnb.Linear4bit", "bnb.Linear8bitLt",
        "eetq.EetqLoraLinear", "gptq.GPTQLoraLinear", "hqq.HqqLoraLinear", "inc.IncLoraLinear", "te.TeLinear",
        "torchao.TorchaoLoraLinear",
    )
}  # fmt: skip

# Other tuners, by their folder in PEFT, whose layers compute a row from nothing but the row and the adapter. Each was
# compared with PEFT one adapter at a time (tests/test_tuners.py); whoever isn't here is refused.
TUNERS = (
    "beft", "boft", "c3a", "deft", "delora", "fourierft", "frod", "glora", "gralora", "hira", "hra", "ia3",
    "ln_tuning", "loha", "lokr", "lora", "miss", "oft", "osf", "peanut", "psoft", "pvera", "randlora", "road", "shira",
    "supertuning", "tinylora", "trainable_tokens", "unilora", "vblora", "vera", "waveft",
)  # fmt: skip

# Variants whose forward depends on more than the rows and the adapter: other adapters.
CONTEXT_VARIANTS = ("Arrow",)

# Parts of a layer's name whose rows aren't those of the samples, and what they are.
OTHER_ROWS = {
    "experts": "is inside a mixture of experts and sees rows gathered from all samples",
    "relative_attention_bias": "sees positions, not samples",
}
# Classes of experts to which the rows of all samples are given, first for one expert, then for the next.
TILED_EXPERTS = ("Llama4TextExperts",)

MEDIA_PARTS = (
    "aligner", "audio", "codec", "connector", "image_", "language_projection", "merger", "perceiver", "projector",
    "qformer", "resampler", "talker", "token2wav", "tokenizer_encoder", "video_tower", "vision", "visual",
)  # fmt: skip
MEDIA_CONFIGS = (
    "acoustic_tokenizer_encoder_config", "audio_config", "codec_config", "projector_config", "vision_config",
)  # fmt: skip

# Models whose layers see positions first and samples second, or whose rows are tiled.
OTHER_ORDER = (
    "dia", "fsmt", "led", "longformer", "mask2former", "musicgen", "musicgen_decoder", "musicgen_melody",
    "musicgen_melody_decoder", "oneformer", "vibevoice", "xlnet",
)  # fmt: skip


def _has_media(config: Any) -> bool:
    """Whether a configuration, or one inside it, is of a model that reads pictures or sound beside its text."""
    inner = (getattr(config, key, None) for key in getattr(config, "sub_configs", ()))
    return any(hasattr(config, name) for name in MEDIA_CONFIGS) or any(map(_has_media, inner))


def find_handler(name: str, layer: Any, config: Any) -> tuple[Callable[..., Tensor], str]:
    """The handler of a layer and, where it is not the fast one, the reason.

    Args:
        name: the layer's name in the model, for messages.
        layer: a PEFT layer.
        config: the model's transformers configuration, or None.

    Raises:
        UnsupportedError: a row of a mixed batch would not be right in this layer.
    """
    kind = type(layer).__name__
    expected = "expected LoRA layers that see the rows of each sample together"
    advice = "Remove the adapters from it, or run the adapters one at a time without adapter_ids."
    handler = next((HANDLERS[cls] for cls in type(layer).__mro__ if cls in HANDLERS), None)
    tuner = type(layer).__module__.removeprefix("peft.tuners.").split(".")[0]
    if handler is None or (isinstance(layer, BaseTunerLayer) and tuner not in TUNERS):
        raise UnsupportedError(f"{name} is a {type(layer).__module__}.{kind}: {expected}. {advice}")
    if getattr(config, "model_type", None) in OTHER_ORDER:
        raise UnsupportedError(
            f"{name} belongs to a model of the type {config.model_type!r}, whose rows aren't in the order of the "
            f"samples: {expected}. {advice}"
        )
    parts = name.split(".")
    for part, what in OTHER_ROWS.items():
        if part in parts and not isinstance(layer, lora.ParamWrapper):  # whose experts get all samples in order
            raise UnsupportedError(f"{name} {what}: {expected}. {advice}")
    words = (*MEDIA_PARTS, "encoder") if hasattr(config, "projector_config") else MEDIA_PARTS  # Granite Speech's
    if _has_media(config) and any(word in part for part in parts for word in words):
        raise UnsupportedError(
            f"{name} is inside the vision or audio part of a model that also reads text, and sees images, patches or "
            f"frames, not samples: {expected}. {advice}"
        )
    base = getattr(layer, "base_layer", None)
    if isinstance(base, BaseTunerLayer) and not (isinstance(layer, lora.ParamWrapper) and type(base) is type(layer)):
        raise UnsupportedError(
            f"{name} is a {kind} around a {type(base).__name__}, two tuners on one layer: {expected}. {advice}"
        )
    if isinstance(layer, ModulesToSaveWrapper):
        inner = [key for key, module in layer.named_modules() if isinstance(module, BaseTunerLayer)]
        if inner:
            raise UnsupportedError(f"{name} is a {kind} with adapters inside it ({inner[0]}): {expected}. {advice}")
    if not isinstance(layer, LoraLayer):
        what = kind if tuner not in TUNERS else f"{kind} of the tuner {tuner}"
        return handler, f"{what} runs PEFT's own code"
    if getattr(layer.get_base_layer(), "_hf_device_mesh", None) is not None:
        raise UnsupportedError(f"{name} is split over devices by tensor parallelism, which is not supported. {advice}")
    if isinstance(layer, lora.ParamWrapper) and type(get_base(layer)).__name__ in TILED_EXPERTS:
        handler = tiled_experts
    variants = {type(variant).__name__ for variant in layer.lora_variant.values()}
    for variant in variants:
        if variant.startswith(CONTEXT_VARIANTS):
            raise UnsupportedError(f"{name} has an adapter of the variant {variant}, which is not supported. {advice}")
    if f"{type(layer).__module__}.{kind}" not in BASE_PLUS_DELTA:
        if handler is linear:
            return per_segment, f"{kind} is a subclass of lora.Linear with code of its own"
        return handler, f"{kind} runs PEFT's own code"
    if not variants <= KNOWN_VARIANTS:
        return per_segment, f"an adapter is of the variant {', '.join(sorted(variants))}"
    submodules = [module for modules in (layer.lora_A, layer.lora_B) for module in modules._modules.values()]
    if any(module._forward_hooks or module._forward_pre_hooks for module in submodules):
        return per_segment, "somebody hooked its lora_A or lora_B"
    if any(layer.lora_bias.values()):
        return per_segment, "an adapter has a bias (lora_bias)"
    return linear, ""
