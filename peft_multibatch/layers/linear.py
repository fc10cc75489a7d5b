"""The fast handler: the base layer's output plus each row's delta, with sibling projections as one product."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_multibatch import ops, streams
from peft_multibatch.adapters import shards
from peft_multibatch.calls.batch_plan import BatchPlan
from peft_multibatch.calls.call import Call
from peft_multibatch.calls.graphs import Graph
from peft_multibatch.calls.take_plan import take_plan
from peft_multibatch.compat import ALORA_OFFSETS, LoraLayer
from peft_multibatch.errors import RowMappingError, UnsupportedError
from peft_multibatch.layers.base import base_output, frozen_bases
from peft_multibatch.layers.patch import check_merged, check_not_capturing, handles
from peft_multibatch.layers.per_segment import no_input, per_segment, run_apart, run_base
from peft_multibatch.ops.gradients import Wanted, add_with_gradients, without_autocast
from peft_multibatch.ops.torch_frozen import choose_product, linear_with_gradients
from peft_multibatch.ops.torch_gradients import TorchProduct


if TYPE_CHECKING:
    from peft_multibatch.adapters.bank import Bank
    from peft_multibatch.calls.dropout import Dropouts
    from peft_multibatch.calls.router import Router
    from peft_multibatch.layers.fusion import Group


@handles(is_fast=True)
def linear(self: LoraLayer, x: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """``lora.Linear`` and similar layers: the base output plus each row's delta, with siblings as one product."""
    patch = self._multibatch  # faster than getattr with STATE, and this runs for every projection of every token
    if patch is None:
        return type(self).forward(self, x, *args, **kwargs)
    router = patch.router
    call = router.current(patch)
    if call is None:
        return patch.original(x, *args, **kwargs) if x is not None else patch.original(*args, **kwargs)
    if self._disable_adapters and isinstance(call, Graph):
        return patch.original(x, *args, **kwargs)
    if kwargs:
        kwargs.pop(ALORA_OFFSETS, None)  # PEFT computes them for the active adapter, not for the batch's
        if x is None:
            raise UnsupportedError(no_input(patch.name, kwargs))
    if call.base_layers and self in call.base_layers:
        return run_base(self, patch, x, *args, **kwargs)
    if self.merged_adapters:
        check_merged(patch.name, self)

    group, index = None, 0
    if patch.group is not None and not (args or kwargs):
        group, index = patch.group
    bank = patch.bank if group is None else group.bank
    plan, apart = _plan_for(call, bank)
    if plan is not None:
        try:
            if group is None:
                y = _run(call, plan, router, bank, x, *args, **kwargs)[0]
            else:
                y = _run_sibling(call, plan, router, group, index, patch.bank, x)
            if isinstance(plan, BatchPlan) and plan.dropouts(bank) is not None:
                call.draws.count(self)
            return run_apart(self, call, patch, apart, x, y, *args, **kwargs) if apart else y
        except RowMappingError:  # per_segment can run this if all samples have one adapter, and raises otherwise
            pass
    return per_segment(self, x, *args, **kwargs)


def _plan_for(call: Call | Graph, bank: Bank) -> tuple[Any, frozenset[int]]:
    """The plan for a bank's product, and the slots of adapters whose rows PEFT's own module has to run.

    The plan is None if PEFT's module runs all adapters of the batch. For a graph, it is the graph.

    Raises:
        UnsupportedError: compiled code can't run the adapters in use.
    """
    if isinstance(call, Graph):
        if call.apart:
            raise UnsupportedError(
                f"a model was compiled, and {call.apart}, which compiled code can't run: expected adapters that run "
                "segmented (see mb.report()), without variants or dropout. Run it without torch.compile, or pass "
                "disable_compile=True to generate."
            )
        return call, NONE
    plan = call.plan
    found = plan.apart(bank)
    if found is None and not call.is_hooked:
        return plan, NONE
    slots = found.slots | found.dropping() if found is not None else NONE
    if call.is_hooked:
        slots = frozenset(plan.adapters)
    if not slots:
        return plan, NONE
    return None if plan.is_whole(slots) else plan.without(slots), slots


NONE: frozenset[int] = frozenset()


def _run_sibling(
    call: Call | Graph, plan: Any, router: Router, group: Group, index: int, bank: Bank, x: Tensor
) -> Tensor:
    """The output of one layer of a group; the first layer computes the outputs of all."""
    if index == 0:
        whole = group.base_output(x)
        if whole is None or (isinstance(plan, BatchPlan) and plan.has_dora(group.bank)):
            ys = _run(call, plan, router, group.bank, x)
        else:
            ys = list(_add_deltas(call, plan, router, group.bank, [whole], x)[0].split(group.bank.widths, dim=-1))
        call.sibling_outputs[group] = x, group.version(call, x), [None, *ys[1:]]
        return ys[0]
    source, version, waiting = call.sibling_outputs.get(group, (None, 0, []))
    y = waiting[index] if source is x and group.is_unchanged(call, x, version, index) else None
    if y is not None:
        waiting[index] = None
        if index == len(waiting) - 1:
            del call.sibling_outputs[group]
        return y
    if isinstance(call, Call) and source is not None and source is not x:
        group.split("its projections read different tensors")
    return _run(call, plan, router, bank, x)[0]


def _run(
    call: Call | Graph, plan: Any, router: Router, bank: Bank, x: Tensor, *args: Any, **kwargs: Any
) -> list[Tensor]:
    """The outputs of a bank's layers."""
    if not bank.is_split:
        if torch.is_grad_enabled() and not (args or kwargs) and isinstance(call, Call) and x.is_cpu:
            ys = _run_frozen(call, plan, router, bank, x)
            if ys is not None:
                return ys
        return _add_deltas(
            call, plan, router, bank, [base_output(layer, x, *args, **kwargs) for layer in bank.layers], x
        )
    if isinstance(call, Graph):
        raise UnsupportedError(
            "a model split by tensor parallelism was compiled and called with adapter_ids: expected eager execution. "
            "Run it without torch.compile, or pass disable_compile=True to generate."
        )
    if torch.is_grad_enabled():
        shards.check_gradients(bank.layers, x)
    splits = list(zip(bank.layers, bank.splits))
    bases = [shards.base_output(layer, split, x) if split else base_output(layer, x) for layer, split in splits]
    # partial sums stay in float32 until they are added up, so that each delta is rounded only once
    ys = [
        y.to(torch.promote_types(y.dtype, torch.float32)) if split and split.dim else y
        for split, y in zip(bank.splits, bases)
    ]
    ys = _add_deltas(call, plan, router, bank, ys, x)
    ys = [shards.sum_up(layer, split, x, y) if split else y for (layer, split), y in zip(splits, ys)]
    return [y.to(base.dtype) for y, base in zip(ys, bases)]


def _run_frozen(call: Call, plan: BatchPlan, router: Router, bank: Bank, x: Tensor) -> list[Tensor] | None:
    """As ``_run``, on a CPU, base layers included in one autograd node; None if they have to run separately."""
    if router.kernels is not None or router.is_gathered or torch.is_autocast_enabled("cpu"):
        return None
    trained, bases = plan.trained(bank), frozen_bases(bank.layers, x.dtype)
    if bases is None:
        return None
    wanted = Wanted(x.requires_grad, tuple(parameter.requires_grad for parameter in trained.parameters))
    if not trained.parameters or not (wanted.x or any(wanted.weights)):
        return None
    call.num_rows(x.shape)
    dropouts = plan.dropping(bank)
    masks = dropouts.masks(call.draws) if dropouts is not None else {}
    ys = linear_with_gradients(choose_product(plan.components, trained, wanted, x, masks), trained, bases, x)
    return _scale(call, plan, bank, ys) if plan.has_dora(bank) else ys


def _add_deltas(
    call: Call | Graph, plan: Any, router: Router, bank: Bank, ys: list[Tensor], x: Tensor
) -> list[Tensor]:
    """Add each row's delta for ``x``, ``[..., K]``, to the outputs of all slices; in place for inference.

    ``ys`` has one tensor ``[..., N]`` per slice, or a single one with all slices concatenated; so does the result.
    """
    if isinstance(call, Graph):
        return _add_in_graph(call, router, bank, ys, x)
    ys = _add(call, plan, router, bank, ys, x)
    if plan.has_dora(bank):
        ys = _scale(call, plan, bank, ys)
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
            packed, tables = router.graph.fixed(call, bank, x.device, is_capturing)
            if plan is call.plan and kernels.takes(ys, x, tables):
                call.num_rows(x.shape)
                ys = [y.contiguous() for y in ys]
                for each in packed:
                    kernels.add_(ys, x, bank.widths, each, tables)
                return ys
            check_not_capturing(x.device)  # before tensors are kept that only a replay of the graph would fill
        place = bank, streams.key(x.device)
        products = plan.products.get(place)
        if products is None or not products.fit(ys, x):
            call.num_rows(x.shape)
            ys = [y.contiguous() for y in ys]
            if not call.is_media:  # which no graph runs
                router.graph.prepare(call, x.device)
            packed, tables = plan.plans(x.device), plan.tables(bank, x.device)
            products = plan.products[place] = kernels.Products(ys, x, bank.widths, plan.components, packed, tables)
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
        if kernels.takes(ys, x, tables):
            from peft_multibatch.ops.triton_gradients import TritonProduct  # imports triton

            drops = None if dropouts is None else dropouts.table(call.draws, x.device)
            product = TritonProduct(plan.components, plan.plans(x.device), tables, trained, wanted, drops)
            return add_with_gradients(product, trained, ys, x)
    masks = {} if dropouts is None else dropouts.masks(call.draws)
    return add_with_gradients(TorchProduct(plan.components, trained, wanted, masks), trained, ys, x)


def _scale(call: Call, plan: BatchPlan, bank: Bank, ys: list[Tensor]) -> list[Tensor]:
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
        scales = bank.dora_scales(plan.adapters)
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
    graph.arm_kernels(bank.key, str(x.device))
    ys = [y.contiguous() for y in ys]
    for table in bank.graph_tables:
        if table.dtype not in kernels.DTYPES:
            raise UnsupportedError(
                f"a model was compiled whose adapters have weights of dtype {table.dtype}: expected contiguous "
                "float16, bfloat16 or float32. Convert the adapters, or run without torch.compile."
            )
        for buffer in graph.buffers[str(x.device)]:
            ops.add_(ys, x, bank.widths, buffer.packed, table.rows, table.rank, table.is_aligned, table.dtype)
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
