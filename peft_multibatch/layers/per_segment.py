"""Handlers that run PEFT's own module once per segment, on the segment's rows and with its adapter active."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_multibatch.adapters import views
from peft_multibatch.adapters.views import get_base
from peft_multibatch.calls.batch_plan import BatchPlan
from peft_multibatch.calls.call import Call
from peft_multibatch.calls.graphs import Graph
from peft_multibatch.compat import ALORA_OFFSETS, BaseTunerLayer, LoraLayer, ModulesToSaveWrapper, lora
from peft_multibatch.errors import UnsupportedError
from peft_multibatch.layers.patch import STATE, PatchedLayer, check_merged, check_not_capturing, handles
from peft_multibatch.layers.rows import Inputs, Outputs
from peft_multibatch.plan.ids import Entry, ids_of
from peft_multibatch.plan.segments import BASE


def _along(dim: int) -> Callable[..., Any]:
    """The handler for layers whose tensors have the samples in this dimension."""

    @handles()
    def per_segment(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        patch = getattr(self, STATE)
        if patch is None:
            return type(self).forward(self, *args, **kwargs)
        call = current_call(patch, self)
        if call is None:
            return patch.original(*args, **kwargs)
        if self in call.base_layers:
            return run_base(self, patch, *args, **kwargs)
        kwargs.pop(ALORA_OFFSETS, None)
        if isinstance(self, BaseTunerLayer) and not args and "x" not in kwargs:
            raise UnsupportedError(no_input(patch.name, kwargs))
        run, inputs = _runner(self, call, patch, args, kwargs, dim)
        first = inputs.first

        def dim_of(number: int, part: Tensor) -> int:
            return inputs.dim if part.dim() >= first.dim() else 0

        is_known = not isinstance(self, ModulesToSaveWrapper)  # these can wrap any module
        return for_each_segment(call, patch, self, inputs.num_rows, first.device, run, dim_of, is_known)

    return per_segment


per_segment = _along(0)
"""Handler for any other layer: runs PEFT's own module once per segment, with the segment's adapter active."""

PER_SEGMENT_ALONG = {1: _along(1), 2: _along(2)}
"""The same for layers whose samples are in a later dimension, by dimension."""


def no_input(name: str, kwargs: dict[str, Any]) -> str:
    """The error message for a layer whose input was passed under another name than PEFT's."""
    return (
        f"{name} was called with {', '.join(kwargs) or 'nothing'} by name: expected its input as the first argument, "
        "as PEFT's layers take it. Change the call, or remove the adapters from this layer."
    )


@handles()
def base_only(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Handler for a layer whose adapters are refused: all rows get the base layer's output."""
    patch = getattr(self, STATE)
    if patch is None:
        return type(self).forward(self, *args, **kwargs)
    call = patch.router.current(patch)
    if call is None:
        return patch.original(*args, **kwargs)
    kwargs.pop(ALORA_OFFSETS, None)
    return views.bare(self)(*args, **kwargs)


@handles()
def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Handler for a layer whose forward was replaced: refuses mixed batches, since its rows can't be mapped."""
    patch = getattr(self, STATE)
    if patch is None:
        return type(self).forward(self, *args, **kwargs)
    if patch.router.current(patch) is None:
        return patch.original(*args, **kwargs)
    raise UnsupportedError(patch.refusal)


def run_base(layer: Any, patch: PatchedLayer, *args: Any, **kwargs: Any) -> Any:
    """The output of a layer without adapters, whichever are active outside of the batch."""
    if getattr(layer, "merged_adapters", None):  # PEFT unmerges them first
        return patch.original(*args, **kwargs)
    return type(layer).forward(views.check_loaded(views.view_of(layer, {})), *args, **kwargs)


def run_apart(
    self: Any, call: Call, patch: PatchedLayer, slots: frozenset[int], x: Tensor, y: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Replace the rows of some adapters in a product's output with the outputs of PEFT's own module.

    Args:
        slots: the slots of these adapters.
        x: the layer's input, ``[..., K]``.
        y: the product's output, ``[..., N]``, with the base model's output in these rows; may be written in place.
    """
    check_not_capturing(x.device)
    run, inputs = _runner(self, call, patch, (x, *args), kwargs)
    segments, kinds = call.plan.runs
    rows_y = y.flatten(0, 1) if inputs.dim else y
    for index, rows in segments.rows(inputs.num_rows, x.device, patch.name):
        if not slots.intersection(ids_of(kinds[index])):
            continue
        part = run(loaded_view_for(self, kinds[index], call.plan, patch), rows).to(y.dtype)
        part = part.flatten(0, 1) if inputs.dim else part
        if torch.is_grad_enabled() and (part.requires_grad or rows_y.requires_grad):
            if isinstance(rows, slice):
                rows = torch.arange(len(rows_y), dtype=torch.int64, device=x.device)[rows]
            rows_y = rows_y.index_copy(0, rows, part)
        else:
            rows_y[rows] = part
    return rows_y.view(y.shape)


def _runner(
    self: Any, call: Call, patch: PatchedLayer, args: tuple, kwargs: dict[str, Any], dim: int = 0
) -> tuple[Callable[[Any, slice | Tensor], Any], Inputs]:
    """A function that runs a view of a layer on some rows of all its arguments, and these arguments."""
    entries = call.plan.segments.num_entries
    x = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.dim()), None)
    if call.packed and x is not None:  # the tokens of all requests, in a single row or without a batch dimension
        dim = max(x.dim() - (1 if isinstance(get_base(self), nn.Embedding) else 2), 0)
    elif call.inside and isinstance(get_base(self), nn.Embedding) and args and x is args[0] and len(x) == 1 < entries:
        args = x.expand(call.rows or entries, *x.shape[1:]), *args[1:]  # positions, shared by all samples
    elif call.is_media and x is not None:
        dim = call.dim_of_rows(x.shape)
    inputs = Inputs(patch.name, call.plan.runs[0], args, kwargs, dim, patch.is_shared)
    if not call.packed and dim == 0:
        call.check_order(inputs.first.shape, patch.name)
    if isinstance(self, lora.ParamWrapper) and self.num_experts > 1 and inputs.num_tensors == 1:
        raise UnsupportedError(
            f"{patch.name} has experts that were called without routing, on rows that may not be in sample order: "
            "expected hidden states and routing with the same rows. Remove the adapters from these parameters, or "
            "run them one at a time."
        )
    offsets = _offsets(self, call, patch, inputs.first, entries) if isinstance(self, lora.Linear) else None

    def run(view: Any, rows: slice | Tensor) -> Any:
        own, named = inputs.of(rows)
        if offsets is not None:
            numbers = range(inputs.num_rows)[rows] if isinstance(rows, slice) else rows.tolist()
            named[ALORA_OFFSETS] = [offsets[number] for number in numbers]
        return type(self).forward(view, *own, **named)

    return run, inputs


def loaded_view_for(layer: Any, entry: Entry, plan: BatchPlan, patch: PatchedLayer) -> Any:
    """As ``view_for``, after checking that its parameters are in memory."""
    return views.check_loaded(view_for(layer, entry, plan, patch))


def view_for(layer: Any, entry: Entry, plan: BatchPlan, patch: PatchedLayer) -> Any:
    """A view of the layer in which an entry's adapters are active: one, several with weights, or none.

    Raises:
        UnsupportedError: the entry is a mixture, and an adapter's output in this layer isn't a delta.
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
            f"a mixture names adapter {min(weights)!r}, whose output in {patch.name} isn't a delta that can be "
            f"weighted ({type(layer).__name__}): expected plain LoRA, without variants, copies of modules or trained "
            "tokens. Give the row that adapter alone, or leave it out of mixtures."
        )
    return views.view_of(layer, {})


def _offsets(
    layer: lora.Linear, call: Call, patch: PatchedLayer, x: Tensor, entries: int
) -> Sequence[int | None] | None:
    """The offset at which an aLoRA adapter starts in each row; None if the batch has no aLoRA adapter."""
    used = [adapter.name for adapter in call.plan.adapters.values() if adapter.variant(layer).startswith("ALora")]
    if not used:
        return None
    if call.invocations is None:
        raise UnsupportedError(
            f"{patch.name} was called with the aLoRA adapter {used[0]!r} outside of a call of the model, which finds "
            "the invocation tokens: expected model(input_ids, ...) or generate. Layers called by themselves, and "
            "continuous batching, can't run aLoRA: remove the adapter from the batch."
        )
    if len(x) != entries or x.dim() != 3 or x.shape[1] != call.invocations.tokens:
        raise UnsupportedError(
            f"{patch.name} has an aLoRA adapter and received an input of shape {list(x.shape)} for {entries} samples "
            f"of {call.invocations.tokens} tokens: expected [samples, tokens, features]. Generate without beams and "
            "with one sequence per prompt, or remove the adapter from this layer."
        )
    return call.invocations.offsets


def current_call(patch: PatchedLayer, layer: Any) -> Call | None:
    """The active call, after checking that the layer can run it."""
    call = patch.router.current(patch)
    if call is None:
        return None
    if isinstance(call, Graph):
        if layer._disable_adapters and patch.is_disabled_on(call.here.thread):
            return None
        raise UnsupportedError(
            f"{patch.name} runs PEFT's own code once per segment, and segments aren't known when the model is "
            "compiled: expected a model whose adapters all run segmented (see mb.report()). Run it without "
            "torch.compile."
        )
    if layer not in call.base_layers:
        check_merged(patch.name, layer)
    if patch.router.is_gathered and torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters()):
        raise UnsupportedError(
            f"{patch.name} is sharded by FSDP and was called with adapter_ids and with gradients, which can't be "
            "reduced across ranks whose batches have different adapters: expected inference. Call the model under "
            "torch.no_grad(), train with DistributedDataParallel, or train one adapter at a time without ids."
        )
    return call


def for_each_segment(
    call: Call,
    patch: PatchedLayer,
    layer: Any,
    num_rows: int,
    device: torch.device,
    run: Callable[[Any, slice | Tensor], Any],
    dim_of: Callable[[int, Tensor], int],
    is_known: bool = True,
) -> Any:
    """Run a layer once per segment and join its outputs.

    Args:
        run: called with a view of the layer and the rows of a segment.
        dim_of: as for ``Outputs``.
        is_known: whether the outputs are known to have the samples in that dimension; if not, it is checked.
    """
    check_not_capturing(device)
    segments, entries = call.plan.runs
    found = segments.rows(num_rows, device, patch.name)
    views_of = [loaded_view_for(layer, entry, call.plan, patch) for entry in entries]
    if not found:
        return run(views.check_loaded(views.view_of(layer, {})), slice(0, 0))
    parts = [run(views_of[index], rows) for index, rows in found]
    if len(parts) == 1:
        return parts[0]
    labels = [label(entries[index], call.plan) for index, _ in found]
    outputs = Outputs(patch.name, segments, parts, labels, dim_of)
    if not (is_known or outputs.is_certain or outputs.spec == patch.outputs):
        both = torch.cat([torch.arange(num_rows, dtype=torch.int64, device=device)[rows] for _, rows in found[:2]])
        with _without_traces(views_of[found[0][0]]) as view:
            outputs.check_grows(run(view, both))
        patch.outputs = outputs.spec
    return outputs.joined()


@contextmanager
def _without_traces(view: nn.Module) -> Iterator[Any]:
    """Run a module once more without side effects on its buffers and torch's random generators."""
    before = [(buffer, buffer.clone()) for buffer in view.buffers()]
    devices = {parameter.device for parameter in view.parameters() if parameter.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(list(devices)):
        yield view
    for buffer, value in before:
        buffer.data.copy_(value)  # through .data, so that autograd doesn't count it as a change


def label(entry: Entry, plan: BatchPlan) -> str:
    """A segment's adapter or mixture, for messages."""
    names = [repr(plan.adapters[slot].name) for slot in ids_of(entry)]
    return f"the mixture of {' and '.join(names)}" if isinstance(entry, tuple) else "".join(names) or "no adapter"
