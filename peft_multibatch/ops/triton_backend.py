"""``shrink`` and ``expand`` on a GPU: a launch each, through the kernels in ``triton_kernels``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_multibatch.bank import TableRows
from peft_multibatch.ops.triton_kernels import expand_kernel, shrink_kernel


DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
INTERPRETED = triton.knobs.runtime.interpret


class Launch(NamedTuple):
    """How a product is cut into programs.

    Attributes:
        tiles: programs that share a segment's rows.
        block_t: rows of a tile.
        splits: parts of K whose sums ``expand_kernel`` adds up.
        split_blocks: blocks of x in one part.
        block_k: columns of x in a block.
        block_n: columns of y of one program of ``expand_kernel``.
        shrink_warps: warps of a program of ``shrink_kernel``.
        expand_warps: warps of a program of ``expand_kernel``.
    """

    tiles: int
    block_t: int
    splits: int
    split_blocks: int
    block_k: int
    block_n: int
    shrink_warps: int
    expand_warps: int


def choose(
    num_segments: int, longest: int, num_inputs: int, widths: Sequence[int], rank: int, processors: int
) -> Launch:
    """Cut a product so that there are about two programs per multiprocessor, and none much smaller than it must be.

    Few adapters: latency rules, so K is split and columns are narrow, to read the weights from everywhere at once.
    Many
    adapters: each has programs of its own and bytes rule, so parts are long. Many rows per segment: tiles are tall, so
        that
    weights are read once for many rows.

    Args:
        num_segments: segments of the plan, or the capacity of a graph's plan.
        longest: rows of the longest segment.
        num_inputs: ``K``.
        widths: ``N`` of each slice.
        rank: largest rank, as padded for the kernels.
        processors: multiprocessors of the GPU.
    """
    if longest <= 64:
        block_t = 16
        tiles = triton.cdiv(longest, 32)
    else:
        block_t = 64 if rank <= 64 else 32
        tiles = triton.cdiv(longest, block_t)
    programs = num_segments * tiles
    block_k = 256 if rank <= 16 else 128 if rank <= 32 else 64
    splits = max(1, min(8 * processors // (programs * len(widths)), 32))
    block_n = 256 if rank <= 32 else 128 if rank <= 128 else 64
    while block_n > 32 and programs * sum(triton.cdiv(width, block_n) for width in widths) < 2 * processors:
        block_n //= 2
    return cut(tiles, block_t, splits, block_k, block_n, 4, 4, num_inputs)


def cut(
    tiles: int,
    block_t: int,
    splits: int,
    block_k: int,
    block_n: int,
    shrink_warps: int,
    expand_warps: int,
    num_inputs: int,
) -> Launch:
    """A launch with at most this number of splits, none of them empty."""
    blocks = triton.cdiv(num_inputs, block_k)
    split_blocks = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, split_blocks)
    return Launch(tiles, block_t, splits, split_blocks, block_k, block_n, shrink_warps, expand_warps)


def apply_(
    ys: Sequence[Tensor],
    x: Tensor,
    plan: Tensor,
    num_segments: int,
    longest: int,
    table: TableRows,
    launch: Launch | None = None,
) -> None:
    """Add every row's delta to the outputs of a projection group, in place. Without gradients and without a host sync.

    Args:
        ys: the base layer's output ``[T, N]`` of each slice, one to three; columns have stride 1.
        x: what all slices read, ``[T, K]``; columns have stride 1.
        plan: the packed plan, on the device.
        num_segments: segments of the plan, or more.
        longest: rows of the longest segment, or more.
        table: the bank's rows for kernels.
        launch: how to cut the product; chosen where it isn't given.
    """
    num_rows, num_inputs = x.shape
    if num_rows == 0 or num_segments == 0 or table.rank == 0:
        return
    rank = max(16, triton.next_power_of_2(table.rank))
    widths = [y.shape[1] for y in ys]
    if launch is None:
        launch = choose(num_segments, longest, num_inputs, widths, rank, _processors(x.device))
    assert table.dtype is not None
    weights = DTYPES[table.dtype]
    # where there are no partial sums, h is rounded to the dtype in which it will be multiplied, as PEFT's is
    h_dtype = torch.float32 if launch.splits > 1 else table.dtype
    h = torch.empty((launch.splits, num_rows, len(ys), rank), dtype=h_dtype, device=x.device)
    dependent = not INTERPRETED and torch.cuda.get_device_capability(x.device) >= (9, 0)
    first = num_segments * launch.tiles
    shrink_kernel[(first, launch.splits, len(ys))](
        h, x, plan, table.rows, num_rows, num_inputs, x.stride(0), launch.split_blocks, launch.tiles,
        SLICES=len(ys), R=rank, BLOCK_T=launch.block_t, BLOCK_K=launch.block_k, WEIGHTS=weights,
        ALIGNED=table.is_aligned, PDL=dependent, num_warps=launch.shrink_warps,
    )  # fmt: skip
    y = [*ys, *[ys[0]] * (3 - len(ys))]
    expand_kernel[(first, sum(triton.cdiv(width, launch.block_n) for width in widths))](
        *y, h, plan, table.rows, num_rows, *[each.shape[1] for each in y], *[each.stride(0) for each in y],
        launch.tiles, SLICES=len(ys), R=rank, BLOCK_T=launch.block_t, BLOCK_N=launch.block_n, SPLITS=launch.splits,
        WEIGHTS=weights, ALIGNED=table.is_aligned, PDL=dependent, num_warps=launch.expand_warps,
        **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip


def takes(ys: Sequence[Tensor], x: Tensor, table: TableRows) -> bool:
    """Whether the kernels have all these dtypes: float64 and adapters of different dtypes are left to torch."""
    return table.dtype in DTYPES and x.dtype in DTYPES and len({y.dtype for y in ys}) == 1 and ys[0].dtype in DTYPES


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
