"""Add each row's delta to what base layers returned: eager or in a graph, with kernels or torch, gradients or not."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_multibatch import ops, streams
from peft_multibatch.adapters.dora import dora_scales
from peft_multibatch.calls.batch_plan import BatchPlan
from peft_multibatch.calls.call import Call
from peft_multibatch.calls.graphs import Graph
from peft_multibatch.calls.take_plan import take_plan
from peft_multibatch.errors import UnsupportedError
from peft_multibatch.layers.patch import check_not_capturing
from peft_multibatch.ops.gradients import Wanted, add_with_gradients, without_autocast
from peft_multibatch.ops.launches import LONG_ENTRY
from peft_multibatch.ops.torch_gradients import TorchProduct


if TYPE_CHECKING:
    from peft_multibatch.adapters.bank import Bank
    from peft_multibatch.calls.dropout import Dropouts
    from peft_multibatch.calls.router import Router


def add_deltas(call: Call | Graph, plan: Any, router: Router, bank: Bank, ys: list[Tensor], x: Tensor) -> list[Tensor]:
    """Add each row's delta for ``x``, ``[..., K]``, to the outputs of all slices; in place for inference.

    ``ys`` has one tensor ``[..., N]`` per slice, or a single one with all slices concatenated; so does the result.
    """
    if isinstance(call, Graph):
        return _add_in_graph(call, router, bank, ys, x)
    ys = _add(call, plan, router, bank, ys, x)
    if plan.has_dora(bank):
        ys = scale(call, plan, bank, ys)
    return ys


def _add(call: Call, plan: BatchPlan, router: Router, bank: Bank, ys: list[Tensor], x: Tensor) -> list[Tensor]:
    kernels = router.kernels
    dropouts = plan.dropping(bank)
    if torch.is_grad_enabled():
        trained = plan.trained(bank)
        wanted = tuple(parameter.requires_grad for parameter in trained.parameters)
        if any(wanted) or x.requires_grad or any(y.requires_grad for y in ys):
            call.num_rows(x.shape)
            return _add_as_node(call, plan, router, bank, ys, x, Wanted(x.requires_grad, wanted), dropouts)
    if dropouts is not None:
        call.num_rows(x.shape)
        wanted = (False,) * len(plan.trained(bank).parameters)
        return _add_as_node(call, plan, router, bank, ys, x, Wanted(False, wanted), dropouts)
    if kernels is not None and kernels.runs_on(x):
        is_capturing = kernels.is_capturing()
        if is_capturing or call.for_graphs:
            if plan is not call.plan:
                check_not_capturing(x.device)
            packed, tables = router.graph.fixed(call, bank, x.device, is_capturing, _is_long(plan, x))
            can_run = plan is call.plan and not router.graph.captures.why_no_kernels(plan)
            if can_run and kernels.takes(ys, x, tables):
                call.num_rows(x.shape)
                ys = [y.contiguous() for y in ys]
                for each in packed:
                    kernels.add_(ys, x, bank.widths, each, tables)
                return ys
            check_not_capturing(x.device)  # before tensors are kept that only a replay of the graph would fill
        ys, products = products_of(call, plan, router, bank, ys, x)
        if products.can_run:
            products(ys, x, call.workspaces)
            return ys
    call.num_rows(x.shape)  # dimension 0 has to map to samples, not just the flattened rows
    check_not_capturing(x.device)
    if plan.adapters:
        ys = [y.contiguous() for y in ys]
        outputs, rows = [y.view(-1, y.shape[-1]) for y in ys], x.reshape(-1, x.shape[-1])
        slices = outputs if len(outputs) == len(bank.widths) else outputs[0].split(bank.widths, dim=-1)
        stacks = call.stacks.take(bank, plan, len(rows)) if call.stacks is not None and x.is_cpu else []
        if stacks and {x.dtype} == {*(y.dtype for y in ys), *(stack.dtype for stack in stacks)}:
            for stack in stacks:
                stack.add_(slices, rows)
            return ys
        with without_autocast(x.device.type):
            for segments in plan.components:
                ops.torch_backend.apply_(slices, rows, segments, plan.weights(bank))
    return ys


def _is_long(plan: BatchPlan, x: Tensor) -> bool:
    """Whether graphs read plans of single entries for an input, because it has many rows per entry."""
    return x.shape[:-1].numel() >= LONG_ENTRY * plan.segments.num_entries


def products_of(
    call: Call, plan: BatchPlan, router: Router, bank: Bank, ys: list[Tensor], x: Tensor, adds: bool = True
) -> tuple[list[Tensor], Any]:
    """``ys``, contiguous, and the products that add their deltas, or write them there."""
    place = bank, streams.key(x.device), adds
    products = plan.products.get(place)
    if products is None or not products.fit(ys, x):
        call.num_rows(x.shape)
        ys = [y.contiguous() for y in ys]
        if not call.is_media:  # which no graph runs
            router.graph.prepare(call, x.device, _is_long(plan, x))
        assert router.kernels is not None
        tables = plan.tables(bank, x.device)
        products = router.kernels.Products(ys, x, bank.widths, plan.components, tables, adds)
        plan.products[place] = products
    return ys, products


def _add_as_node(
    call: Call,
    plan: BatchPlan,
    router: Router,
    bank: Bank,
    ys: list[Tensor],
    x: Tensor,
    wanted: Wanted,
    dropouts: Dropouts | None,
) -> list[Tensor]:
    """As ``_add``, with gradients and dropout."""
    trained, kernels = plan.trained(bank), router.kernels
    if not trained.parameters:
        return ys
    check_not_capturing(x.device)
    if kernels is not None and kernels.runs_on(x):
        tables = plan.tables(bank, x.device)
        if kernels.takes(ys, x, tables, trains=True):
            from peft_multibatch.ops.triton_gradients import TritonProduct  # imports triton

            drops = None if dropouts is None else dropouts.table(call.draws, x.device)
            product = TritonProduct(plan.components, tables, trained, wanted, drops)
            return add_with_gradients(product, trained, ys, x)
    masks = {} if dropouts is None else dropouts.masks(call.draws)
    return add_with_gradients(TorchProduct(plan.components, trained, wanted, masks), trained, ys, x)


def scale(call: Call, plan: BatchPlan, bank: Bank, ys: list[Tensor]) -> list[Tensor]:
    """DoRA: scale each row's output, except for the bias, by its adapter's magnitudes divided by the weight norms.

    Raises:
        UnsupportedError: a mixture names a DoRA adapter.
    """
    check_not_capturing(ys[0].device)
    for adapter in [plan.adapters[slot] for slot in plan.mixed]:
        if any(part and part.magnitude is not None for part in adapter.parts(bank.layers)):
            name = adapter.name
            raise UnsupportedError(
                f"a mixture names {name!r}, a DoRA adapter, which can't be weighted because it scales the whole "
                "output: expected plain LoRA. Give the row that adapter alone, or leave it out of mixtures."
            )
    scales = None if torch.is_grad_enabled() else call.dora_scales.get(bank)
    if scales is None:
        scales = dora_scales(bank.layers, plan.adapters)
        if call.inside and not torch.is_grad_enabled():  # kept for all tokens of one call of the model
            call.dora_scales[bank] = scales
    found = []
    for layer, y, scale in zip(bank.layers, ys, scales):
        if scale is not None:
            rows = plan.positions(y.device)  # -1, the base model, selects the last row of the scales
            bias = layer.base_layer.bias
            start = torch.zeros((), dtype=y.dtype, device=y.device) if bias is None else bias.to(y.dtype)
            grouped = y.reshape(len(rows), -1, y.shape[-1])
            y = torch.lerp(start.expand_as(grouped), grouped, scale[rows].to(y.dtype)[:, None]).view(y.shape)
        found.append(y)
    return found


def _add_in_graph(graph: Graph, router: Router, bank: Bank, ys: list[Tensor], x: Tensor) -> list[Tensor]:
    kernels = router.kernels
    if kernels is None or torch.is_grad_enabled() or not kernels.runs_on(x):
        graph.arm()
        trains = torch.is_grad_enabled()
        plans = [take_plan(graph.plans, x.shape, graph.key, index, trains) for index in range(graph.components)]
        lora_a, lora_b = (bank.lora_a, bank.lora_b) if trains else (bank.inference_a, bank.inference_b)
        return _add_through_ops((plans, lora_a, lora_b, bank.ranks, bank.scalings), bank, ys, x)
    if graph.contended or not graph.here.thread.active:
        raise UnsupportedError(
            "a compiled model was called on a GPU while adapter_ids are active on another thread or task: expected "
            "one batch at a time, because the graph reads its plan from a fixed address. Make the calls one after "
            "the other, open mb.batch on the thread that calls, or pass disable_compile=True to generate."
        )
    if graph.no_kernels:
        raise UnsupportedError(
            f"a model was compiled, and {graph.no_kernels}: expected adapters of a dtype and rank with kernels. Run "
            "it without torch.compile, or pass disable_compile=True to generate."
        )
    graph.arm_kernels(bank.key, str(x.device))
    ys = [y.contiguous() for y in ys]
    for table in bank.graph_tables:
        for buffer in graph.buffers[str(x.device)]:
            pieces, entries = buffer.short.packed, buffer.long.packed
            ops.add_(ys, x, bank.widths, pieces, entries, table.rows, table.rank, table.is_aligned, table.dtype)
    return ys


def _add_through_ops(inputs: tuple, bank: Bank, ys: list[Tensor], x: Tensor) -> list[Tensor]:
    plans, lora_a, lora_b, ranks, scalings = inputs
    with without_autocast(x.device.type):
        rows = x.reshape(-1, x.shape[-1])
        deltas = [
            ops.expand(ops.shrink(rows, lora_a, plan, ranks), lora_b, plan, ranks, scalings, bank.slice_offsets)
            for plan in plans
        ]
        delta = functools.reduce(operator.add, deltas)
    parts = delta.split([y.shape[-1] for y in ys], dim=-1)
    return [(y + part.view(y.shape)).to(y.dtype) for y, part in zip(ys, parts)]
