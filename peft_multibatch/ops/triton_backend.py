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
    """Cut a product by what a sweep on an H100 found best for each kind of batch (benchmarks/lora_kernels.py).

    Few adapters: latency rules, so K is split and columns are narrow, to read the weights from everywhere at once.
    Many adapters: each has programs of its own and bytes rule, so parts are long. Many rows per segment: tiles are
    tall, so that weights are read once for many rows.

    Args:
        num_segments: segments of the plan, or the capacity of a graph's plan.
        longest: rows of the longest segment.
        num_inputs: ``K``.
        widths: ``N`` of each slice.
        rank: largest rank, as padded for the kernels.
        processors: multiprocessors of the GPU.
    """
    if longest <= 64:
        block_t, tiles = 16, triton.cdiv(longest, 32)
        programs = num_segments * tiles
        few = programs < 32
        block_k = 64 if rank > 32 else 256 if few else 128
        shortest = 512 if few else 256  # columns of x in a part
        splits = min(8 * processors // (programs * len(widths)), num_inputs // shortest)
        shrink_warps, expand_warps = 2 if programs > 32 else 4, 8 if rank > 32 else 4
        block_n = 256
        while block_n > 64 and programs * sum(triton.cdiv(width, block_n) for width in widths) < processors:
            block_n //= 2
    else:
        block_t = 32 if num_segments * longest <= 1024 else 64
        tiles = triton.cdiv(longest, block_t)
        programs = num_segments * tiles * len(widths)
        block_k = 128 if rank <= 64 else 64
        splits = min(3 * processors // programs, 4) if rank <= 32 else 1
        shrink_warps, expand_warps = 8 if rank > 32 else 2 if block_t == 64 else 4, 4
        block_n = 256 if len(widths) > 1 and rank <= 32 and block_t == 64 else 128 if rank <= 128 else 64
    return cut(tiles, block_t, max(1, splits), block_k, block_n, shrink_warps, expand_warps, num_inputs)


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


class Product:
    """A product of fixed shapes, cut and compiled, so that running it again costs two bare launches.

    Triton's own launcher looks at every argument's dtype, value and alignment to find the compiled kernel. All that is
    part of the key under which a product is kept.
    """

    def __init__(self, launch: Launch, table: TableRows, x: Tensor, ys: Sequence[Tensor]) -> None:
        assert table.dtype is not None
        num_rows, num_inputs = x.shape
        rank = padded(table.rank)
        dependent = not INTERPRETED and torch.cuda.get_device_capability(x.device) >= (9, 0)
        # where there are no partial sums, h is rounded to the dtype in which it will be multiplied, as PEFT's is
        self.h_dtype = torch.float32 if launch.splits > 1 else table.dtype
        self.h_shape = launch.splits, num_rows, len(ys), rank
        self.missing = 3 - len(ys)
        widths = [y.shape[1] for y in ys]
        y3 = [*ys, *[ys[0]] * self.missing]
        shared = DTYPES[table.dtype], table.is_aligned, dependent
        self.shrink_grid = launch.tiles, launch.splits, len(ys)
        self.shrink_args = (
            num_rows, num_inputs, x.stride(0), launch.split_blocks, launch.tiles,
            len(ys), rank, launch.block_t, launch.block_k, *shared,
        )  # fmt: skip
        self.shrink_options = {"num_warps": launch.shrink_warps}
        self.expand_grid = launch.tiles, sum(triton.cdiv(width, launch.block_n) for width in widths), 1
        self.expand_args = (
            num_rows, *[y.shape[1] for y in y3], *[y.stride(0) for y in y3], launch.tiles,
            len(ys), rank, launch.block_t, launch.block_n, launch.splits, *shared,
        )  # fmt: skip
        self.expand_options = {"num_warps": launch.expand_warps, **({"launch_pdl": True} if dependent else {})}
        self.compiled: tuple | None = None

    def __call__(self, ys: Sequence[Tensor], x: Tensor, plan: Tensor, num_segments: int, rows: Tensor) -> None:
        h = torch.empty(self.h_shape, dtype=self.h_dtype, device=x.device)
        y3 = ys if not self.missing else [*ys, *[ys[0]] * self.missing]
        first, *others = self.shrink_grid
        shrink_grid = (num_segments * first, *others)
        first, *others = self.expand_grid
        expand_grid = (num_segments * first, *others)
        if self.compiled is not None:
            shrink, expand = self.compiled
            shrink[shrink_grid](h, x, plan, rows, *self.shrink_args)
            expand[expand_grid](*y3, h, plan, rows, *self.expand_args)
            return
        shrink = shrink_kernel[shrink_grid](h, x, plan, rows, *self.shrink_args, **self.shrink_options)
        expand = expand_kernel[expand_grid](*y3, h, plan, rows, *self.expand_args, **self.expand_options)
        if not INTERPRETED:
            self.compiled = shrink, expand


_products: dict[tuple, Product] = {}
_MOST_PRODUCTS = 4096  # shapes that are kept; prompts of ever new lengths must not fill the memory


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
    if len(x) == 0 or num_segments == 0 or table.rank == 0:
        return
    described = [(y.shape[1], y.stride(0), y.data_ptr() % 16) for y in ys]
    key = (
        x.shape, x.stride(0), x.dtype, x.device, x.data_ptr() % 16, *described, ys[0].dtype,
        num_segments, longest, padded(table.rank), table.dtype, table.is_aligned, launch,
    )  # fmt: skip
    product = _products.get(key)
    if product is None:
        if launch is None:
            widths = [y.shape[1] for y in ys]
            launch = choose(num_segments, longest, x.shape[1], widths, padded(table.rank), _processors(x.device))
        if len(_products) >= _MOST_PRODUCTS:
            _products.clear()
        product = _products[key] = Product(launch, table, x, ys)
    product(ys, x, plan, num_segments, table.rows)


def padded(rank: int) -> int:
    """The rank of a tile: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(rank))


def takes(ys: Sequence[Tensor], x: Tensor, table: TableRows) -> bool:
    """Whether the kernels have all these dtypes: float64 and adapters of different dtypes are left to torch."""
    return table.dtype in DTYPES and x.dtype in DTYPES and len({y.dtype for y in ys}) == 1 and ys[0].dtype in DTYPES


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
