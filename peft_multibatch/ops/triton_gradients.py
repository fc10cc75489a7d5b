"""Training on a GPU: one launch of each training kernel for all adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from peft_multibatch.adapters.tables import TableRows
from peft_multibatch.ops.dropout import DropTable
from peft_multibatch.ops.gradients import TrainedWeights, Wanted
from peft_multibatch.ops.launches import LONG_PIECE, SUMS_IN_TRAINING, even_out, fit_expand, fit_shrink, limits_of
from peft_multibatch.ops.triton_backend import DTYPES, padded
from peft_multibatch.ops.triton_gradient_kernels import grad_weight_kernel, grad_x_kernel
from peft_multibatch.ops.triton_training_kernels import expand_kernel, shrink_kernel
from peft_multibatch.plan.segments import BASE, Segments


class Pass(NamedTuple):
    """A set of launches for one component of the plan and the adapters of one dtype.

    Attributes:
        segments: the component's segments.
        table: the table of the weights.
        drops: the dropout masks, or None. Adapters with masks have one segment.
    """

    segments: Segments
    table: TableRows
    drops: DropTable | None

    def pieces(self, num_rows: int) -> tuple[Segments, int]:
        """The segments for kernels that compute each row by itself, and the rows of the longest one.

        Masks depend on the position of a row in its adapter's segment, which then isn't cut.
        """
        found = even_out(self.segments, num_rows, LONG_PIECE) if self.drops is None else self.segments
        return found, found.longest * (num_rows // found.num_entries)

    def where(self, segments: Segments) -> tuple[Tensor, Tensor, int]:
        """The kernels' arguments for the plan and the table."""
        rows = self.table.rows
        return segments.packed_on(rows.device), rows, rows.stride(0)

    def dropout(self, of_input: bool = True) -> tuple[Tensor, Tensor, bool]:
        """The kernels' arguments for dropout: two tensors, and whether they are used, which is only so for inputs."""
        none = self.table.rows, self.table.rows, False
        return none if self.drops is None or not of_input else (*self.drops, True)

    @property
    def weights(self) -> tuple[Any, bool, str]:
        """The kernels' arguments for weights: dtype, whether they are aligned, and the precision of float32 products.

        Float32 products use three TF32 products on tensor cores, or a single one if the user allowed TF32 for matrix
        products, a setting that PEFT's products follow too.
        """
        assert self.table.dtype is not None
        is_coarse = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return DTYPES[self.table.dtype], self.table.is_aligned, "tf32" if is_coarse else "tf32x3"


class TritonProduct:
    """Deltas of a projection group and their gradients.

    Args:
        components: the segments of each component.
        tables: the bank's tables, one per dtype.
        weights: the weights of the adapters in use.
        wanted: the gradients that ``backward`` computes.
        drops: the dropout masks, or None.
    """

    def __init__(
        self,
        components: Sequence[Segments],
        tables: Sequence[TableRows],
        weights: TrainedWeights,
        wanted: Wanted,
        drops: DropTable | None = None,
    ) -> None:
        self.wanted = wanted
        self._weights = weights
        self._passes = [Pass(component, table, drops) for component in components for table in tables if table.rank]

    def forward(self, ys: Sequence[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """As in ``gradients.Product``; one ``h`` ``[T, I, R]`` per pass."""
        self._shape, self._dtype, self._widths = x.shape, x.dtype, [y.shape[-1] for y in ys]
        if not self._passes or not x.numel():
            return [y.clone(memory_format=torch.contiguous_format) for y in ys], []
        inputs, sources = _flat(x), [y.contiguous().view(-1, y.shape[-1]) for y in ys]
        outputs = [torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in ys]
        flat = [y.view(-1, y.shape[-1]) for y in outputs]
        kept = []
        with _on(x.device):
            for number, each in enumerate(self._passes):
                h = _shrink(each, [inputs] * len(ys), is_backward=False)
                _expand(each, flat, flat if number else sources, h, is_in_place=number > 0)
                kept.append(h)
        return outputs, kept if self.wanted.any_b else []

    def backward(
        self, grad_ys: Sequence[Tensor | None], x: Tensor | None, h: Sequence[Tensor]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """As in ``gradients.Product``."""
        wanted, num_rows = self.wanted, self._shape[:-1].numel()
        some = next(grad for grad in grad_ys if grad is not None)
        is_empty = not self._passes or not num_rows
        is_in_place = len(self._passes) > 1  # each pass writes only a part, so buffers start as zeros
        layout = self._weights.layout(wanted.weights, some.device)
        buffers, grad_x = layout.buffers(is_empty or is_in_place), None
        if wanted.x:
            make = torch.zeros if is_empty or is_in_place else torch.empty
            grad_x = make(self._shape, dtype=self._dtype, device=some.device)
        if not is_empty:
            grads = [
                some.new_zeros(1, width).expand(num_rows, -1) if grad is None else _flat(grad)
                for grad, width in zip(grad_ys, self._widths)
            ]
            with _on(some.device):
                for number, each in enumerate(self._passes):
                    if wanted.x or wanted.any_a:
                        ds = _shrink(each, grads, is_backward=True)
                        if grad_x is not None:
                            _grad_x(each, grad_x.view(num_rows, -1), ds, is_in_place)
                        if x is not None:
                            inputs = [_flat(x)] * len(grads)
                            _grad_weight(each, layout.offsets, buffers, ds, inputs, False, is_in_place)
                    if wanted.any_b:
                        _grad_weight(each, layout.offsets, buffers, h[number], grads, True, is_in_place)
        return grad_x, layout.views(buffers)


def _shrink(each: Pass, inputs: Sequence[Tensor], is_backward: bool) -> Tensor:
    """``h`` or ``dS``, ``[T, I, R]``, in the dtype of the weights."""
    rank, slices, num_rows = padded(each.table.rank), len(inputs), len(inputs[0])
    out = torch.empty((num_rows, slices, rank), dtype=each.table.dtype, device=inputs[0].device)
    block_t = 32 if rank <= 64 else 16
    block_c = 128 if rank <= 32 else 64 if rank <= 128 else 32
    block_c = fit_shrink(block_t, block_c, rank, _itemsize(each, inputs[0]), limits_of(out.device).shared)
    segments, longest = each.pieces(num_rows)
    tiles = triton.cdiv(longest, block_t)
    shrink_kernel[segments.num_segments * tiles * slices,](
        out, *_three(inputs), *each.where(segments), num_rows,
        *_three([x.shape[1] for x in inputs]), *_three([x.stride(0) for x in inputs]),
        tiles, *each.dropout(), slices, rank, block_t, block_c, is_backward, *each.weights, num_warps=4,
    )  # fmt: skip
    return out


def _expand(each: Pass, to: Sequence[Tensor], sources: Sequence[Tensor], h: Tensor, is_in_place: bool) -> None:
    """Write ``sources`` plus their deltas to ``to``."""
    rank, slices, num_rows = padded(each.table.rank), len(to), len(h)
    processors, shared = limits_of(h.device)
    block_t, block_c = 32, 128 if rank <= 32 else 64 if rank <= 128 else 32
    block_t, block_c = fit_expand(block_t, block_c, rank, _itemsize(each, to[0]), shared, SUMS_IN_TRAINING)
    blocks = sum(triton.cdiv(y.shape[1], block_c) for y in to)
    segments, longest = each.pieces(num_rows)
    most = triton.cdiv(longest, block_t)
    # a program reads its weights once for several tiles of rows, if there are still enough programs for the whole GPU
    tiles = min(most, max(triton.cdiv(most, 8), triton.cdiv(8 * processors, blocks * segments.num_segments)))
    expand_kernel[segments.num_segments * tiles * blocks,](
        *_three(to), *_three(sources), h, *each.where(segments), num_rows,
        *_three([y.shape[1] for y in to]), *_three([y.stride(0) for y in to]),
        tiles, blocks, slices, rank, block_t, block_c, is_in_place, *each.weights, num_warps=4,
    )  # fmt: skip


def _grad_x(each: Pass, grad_x: Tensor, ds: Tensor, is_in_place: bool) -> None:
    """Write ``dX``, or add to it."""
    (num_rows, slices, rank), block_t = ds.shape, 32
    block_c, block_r = 128 if rank <= 32 else 64, min(rank, 64)
    segments, longest = each.pieces(num_rows)
    tiles = triton.cdiv(longest, block_t)
    grad_x_kernel[segments.num_segments * tiles * triton.cdiv(grad_x.shape[1], block_c),](
        grad_x, ds, *each.where(segments), num_rows, grad_x.shape[1], grad_x.stride(0),
        tiles, *each.dropout(), slices, rank, block_t, block_c, block_r, is_in_place, *each.weights, num_warps=4,
    )  # fmt: skip


def _grad_weight(
    each: Pass,
    offsets: Tensor,
    buffers: Mapping[torch.dtype, Tensor],
    left: Tensor,
    inputs: Sequence[Tensor],
    is_b: bool,
    is_in_place: bool,
) -> None:
    """Write the gradients of all ``lora_A``, or of all ``lora_B``, or add to them."""
    assert each.table.dtype is not None
    if each.table.dtype not in buffers:
        return
    (num_rows, slices, rank), segments = left.shape, each.segments
    block_r, block_t = min(rank, 32), 32 if each.table.dtype == torch.float32 else 64
    lens = [stop - start for slot, start, stop in segments.spans if slot != BASE] or [1]
    equal = triton.cdiv(sum(lens), max(lens))  # the longest segment takes the most time: count those of its length
    widths = [x.shape[1] for x in inputs]
    most = 2 * limits_of(left.device).processors
    for block_c in (128, 64, 32):
        blocks = sum(triton.cdiv(width, block_c) for width in widths)
        if blocks * equal * (rank // block_r) >= most:
            break
    grad_weight_kernel[blocks, segments.num_segments, rank // block_r](
        buffers[each.table.dtype], offsets, left, *_three(inputs), *each.where(segments), num_rows,
        *_three(widths), *_three([x.stride(0) for x in inputs]),
        *each.dropout(not is_b), slices, rank, block_t, block_c, block_r,
        is_b, segments.weights is not None, is_in_place, *each.weights, num_warps=4,
    )  # fmt: skip


def _itemsize(each: Pass, x: Tensor) -> int:
    assert each.table.dtype is not None
    return max(each.table.dtype.itemsize, x.itemsize)


def _three(found: Sequence[Any]) -> list[Any]:
    """Three values, one per slice, as kernels expect; the first is repeated if there are fewer slices."""
    return [*found, *[found[0]] * (3 - len(found))]


def _flat(x: Tensor) -> Tensor:
    """A tensor ``[T, C]`` that kernels can read row by row, copied only if necessary."""
    x = x.detach().reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _on(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
