"""The fast handler: the base layer's output plus each row's delta, with sibling projections as one product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_multibatch.adapters import shards
from peft_multibatch.calls.batch_plan import BatchPlan
from peft_multibatch.calls.call import Call
from peft_multibatch.calls.graphs import Graph
from peft_multibatch.compat import ALORA_OFFSETS, LoraLayer
from peft_multibatch.errors import RowMappingError, UnsupportedError
from peft_multibatch.layers.base import bare_weights, base_output, frozen_bases
from peft_multibatch.layers.deltas import add_deltas, products_of, scale
from peft_multibatch.layers.patch import check_merged, handles
from peft_multibatch.layers.per_segment import no_input, per_segment, run_apart, run_base
from peft_multibatch.ops.gradients import Wanted
from peft_multibatch.ops.torch_frozen import choose_product, linear_with_gradients


if TYPE_CHECKING:
    from peft_multibatch.adapters.bank import Bank
    from peft_multibatch.calls.router import Router
    from peft_multibatch.layers.fusion import Group


BASE_LAST = 2048
"""Rows from which base products are added to deltas instead of the other way around, so that y is read once less."""


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
    if self._disable_adapters and isinstance(call, Graph) and patch.is_disabled_on(call.here.thread):
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
        ys = _run_base_last(call, plan, router, group.bank, x)
        if ys is None:
            whole = group.base_output(x)
            if whole is None or (isinstance(plan, BatchPlan) and plan.has_dora(group.bank)):
                ys = _run_base_first(call, plan, router, group.bank, x)
            else:
                ys = list(add_deltas(call, plan, router, group.bank, [whole], x)[0].split(group.bank.widths, dim=-1))
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
    ys = None if args or kwargs else _run_base_last(call, plan, router, bank, x)
    return _run_base_first(call, plan, router, bank, x, *args, **kwargs) if ys is None else ys


def _run_base_first(
    call: Call | Graph, plan: Any, router: Router, bank: Bank, x: Tensor, *args: Any, **kwargs: Any
) -> list[Tensor]:
    """As ``_run``, with deltas added to base products."""
    if not bank.is_split:
        if torch.is_grad_enabled() and not (args or kwargs) and isinstance(call, Call) and x.is_cpu:
            ys = _run_frozen(call, plan, router, bank, x)
            if ys is not None:
                return ys
        return add_deltas(
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
    ys = add_deltas(call, plan, router, bank, ys, x)
    ys = [shards.sum_up(layer, split, x, y) if split else y for (layer, split), y in zip(splits, ys)]
    return [y.to(base.dtype) for y, base in zip(ys, bases)]


def _run_base_last(call: Call | Graph, plan: Any, router: Router, bank: Bank, x: Tensor) -> list[Tensor] | None:
    """As ``_run``, for many rows in inference on a GPU, with base products added to deltas; otherwise None."""
    kernels = router.kernels
    if (
        kernels is None
        or isinstance(call, Graph)
        or x.numel() < BASE_LAST * x.shape[-1]
        or bank.is_split
        or torch.is_grad_enabled()
        or not kernels.runs_on(x)
        or torch.is_autocast_enabled(x.device.type)
        or call.for_graphs
        or kernels.is_capturing()
        or plan.dropping(bank) is not None
        or plan.has_dora(bank)
    ):
        return None
    weights = bare_weights(bank.layers, x)
    if weights is None:
        return None
    ys = [x.new_empty(*x.shape[:-1], len(weight)) for weight in weights]
    ys, products = products_of(call, plan, router, bank, ys, x, adds=False)
    if not products.can_run:
        return None
    products(ys, x, call.workspaces)
    rows = x.reshape(-1, x.shape[-1])
    for y, weight in zip(ys, weights):
        y.view(-1, y.shape[-1]).addmm_(rows, weight.t())
    return ys


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
    return scale(call, plan, bank, ys) if plan.has_dora(bank) else ys
