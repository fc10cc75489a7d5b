"""The two halves of a mixed-adapter LoRA product, as ``torch.library`` ops.

    h     = shrink(x, A, plan, ranks)                            # x @ A.T with each row's own adapter
    delta = expand(h, B, plan, ranks, scalings, slice_offsets)   # scaling * h @ B.T, each slice in its own columns

Dimension letters, here and in the other files of this folder:

    T  rows of x (samples × tokens × beams)     K  input features        N  output features of one slice
    S  slots                                    R  largest rank          I  slices: 1; 2 for gate/up; 3 for q/k/v

Both ops have shape functions and autograd formulas, read plans from buffers, and keep their host code out of graphs,
so one compiled graph serves any combination of adapters. Inference does both at once, in place: eager code calls
``torch_backend.apply_`` or the products of ``triton_backend``, and compiled code on a GPU the op ``add_``. Eager
training uses a single autograd node per projection group (see ``gradients``); the ops' own formulas are for compiled
training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_multibatch.ops import reference, torch_backend
from peft_multibatch.ops.again import check_not_run_again
from peft_multibatch.ops.launches import LONG_ENTRY


__all__ = ["add_", "expand", "reference", "shrink", "torch_backend"]


@torch.library.custom_op("peft_multibatch::shrink", mutates_args=())
def shrink(x: Tensor, weights: Sequence[Tensor], plan: Tensor, ranks: Tensor) -> Tensor:
    """Multiply each row by the ``lora_A`` of its own adapter: ``h = x @ A.T``.

    Args:
        x: ``[T, K]``, any float dtype and device; ``T`` is a multiple of the plan's entries.
        weights: ``S * I`` tensors ``[rank or more, K]``, ordered by slot, then slice; ``[0, K]`` for a missing one.
        plan: int32, the result of [`Segments.pack`][peft_multibatch.Segments.pack], or the contents of a
            [`SegmentBuffer`][peft_multibatch.SegmentBuffer].
        ranks: int32 ``[S, I]``, true rank of each slot and slice; 0 if the slot has no adapter there.

    Returns:
        ``[T, I, R]``, float32 (float64 for float64 input), zero where a row has no adapter or a smaller rank.

    Source:
        The LoRA paper (https://arxiv.org/abs/2106.09685); PEFT's ``lora.Linear.forward``.
    """
    return torch_backend.shrink(x, weights, plan, ranks)


@torch.library.custom_op("peft_multibatch::expand", mutates_args=())
def expand(
    h: Tensor,
    weights: Sequence[Tensor],
    plan: Tensor,
    ranks: Tensor,
    scalings: Tensor,
    slice_offsets: Sequence[int],
) -> Tensor:
    """Multiply each row by the scaled ``lora_B`` of its own adapter. Each slice has its own columns in the result.

    Args:
        h: ``[T, I, R]``, the result of ``shrink``.
        weights: ``S * I`` tensors ``[N, rank or more]``, in the same order as for ``shrink``; ``N`` depends on the
            slice.
        plan: int32, the same plan.
        ranks: int32 ``[S, I]``, the same ranks.
        scalings: float ``[S, I]``, PEFT's ``scaling`` of each slot and slice.
        slice_offsets: ``I + 1`` column offsets, such as ``[0, q, q + k, q + k + v]``.

    Returns:
        ``[T, slice_offsets[-1]]`` in the dtype of ``h``, zero where a row has no adapter.
    """
    return torch_backend.expand(h, weights, plan, ranks, scalings, slice_offsets)


@shrink.register_fake
def _(x, weights, plan, ranks):
    rank: Any = 0
    for weight in weights:  # symbolic, so that graphs don't specialize on which weight has the largest rank
        rank = torch.sym_max(rank, weight.shape[0])
    shape = (x.shape[0], ranks.shape[1], rank)
    return x.new_empty(shape, dtype=torch_backend.accumulator(x, *weights))


@expand.register_fake
def _(h, weights, plan, ranks, scalings, slice_offsets):
    return h.new_empty(h.shape[0], slice_offsets[-1])


@torch.library.custom_op("peft_multibatch::add_", mutates_args=("ys",))
def add_(
    ys: Sequence[Tensor],
    x: Tensor,
    widths: Sequence[int],
    plan: Tensor,
    long_plan: Tensor,
    table: Tensor,
    rank: int,
    is_aligned: bool,
    dtype: torch.dtype,
) -> None:
    """Add each row's delta to the outputs of a projection group with Triton kernels, for the plan in a buffer.

    Nothing that depends on the plan is read on the host, so a captured graph serves every plan that fits.

    Args:
        ys: the base layer's output ``[..., N]`` of each slice, one to three, or one tensor with all slices
            concatenated; contiguous.
        x: the input of all slices, ``[..., K]``.
        widths: ``N`` of each slice.
        plan: int32, the contents of a [`SegmentBuffer`][peft_multibatch.SegmentBuffer] on the device. Segments of more
            than 16 entries are slow; [`Segments.cut`][peft_multibatch.Segments.cut] splits them.
        long_plan: int32, the same plan, which is read instead if ``x`` has eight or more rows for each index of
            dimension 0. If these are samples, it should be cut into single entries, because segments of more than 16
            rows are slow as well.
        table: int64 ``[slots, I, 4]``: addresses of ``lora_A`` and ``lora_B``, rank, bits of the float32 scaling;
            slots may be any distance apart in memory.
        rank: largest rank in the table.
        is_aligned: whether all weights can be read 16 bytes at a time.
        dtype: dtype of the weights.

    Raises:
        UnsupportedError: a reentrant checkpoint runs it, and the second run wouldn't look up its ids.
    """
    check_not_run_again()
    from peft_multibatch.adapters.tables import TableRows
    from peft_multibatch.ops import triton_backend  # imports triton

    is_long = x.shape[1:-1].numel() >= LONG_ENTRY
    triton_backend.add_(ys, x, widths, long_plan if is_long else plan, [TableRows(table, dtype, rank, is_aligned)])


@add_.register_fake
def _(ys, x, widths, plan, long_plan, table, rank, is_aligned, dtype):
    return None


# The backward formulas are ops too, because they read the plan, which isn't known while a graph is traced.


@torch.library.custom_op("peft_multibatch::shrink_backward", mutates_args=())
def _shrink_backward_op(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], plan: Tensor, ranks: Tensor
) -> tuple[Tensor, list[Tensor]]:
    return torch_backend.shrink_backward(grad, x, weights, plan, ranks)


@torch.library.custom_op("peft_multibatch::expand_backward", mutates_args=())
def _expand_backward_op(
    grad: Tensor,
    h: Tensor,
    weights: Sequence[Tensor],
    plan: Tensor,
    ranks: Tensor,
    scalings: Tensor,
    slice_offsets: Sequence[int],
) -> tuple[Tensor, list[Tensor]]:
    return torch_backend.expand_backward(grad, h, weights, plan, ranks, scalings, slice_offsets)


@_shrink_backward_op.register_fake
@_expand_backward_op.register_fake
def _(grad, inputs, weights, *args):
    return torch.empty_like(inputs), [torch.empty_like(weight) for weight in weights]


def _shrink_setup(ctx, inputs, output):
    x, weights, plan, ranks = inputs
    ctx.save_for_backward(x, plan, ranks, *weights)


def _shrink_backward(ctx, grad):
    x, plan, ranks, *weights = ctx.saved_tensors
    return *_shrink_backward_op(grad, x, weights, plan, ranks), None, None


def _expand_setup(ctx, inputs, output):
    h, weights, plan, ranks, scalings, ctx.slice_offsets = inputs
    ctx.save_for_backward(h, plan, ranks, scalings, *weights)


def _expand_backward(ctx, grad):
    h, plan, ranks, scalings, *weights = ctx.saved_tensors
    grads = _expand_backward_op(grad, h, weights, plan, ranks, scalings, ctx.slice_offsets)
    return *grads, None, None, None, None


shrink.register_autograd(_shrink_backward, setup_context=_shrink_setup)
expand.register_autograd(_expand_backward, setup_context=_expand_setup)
