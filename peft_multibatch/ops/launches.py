"""How products are cut into the programs of a launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


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
        num_segments: segments of the plan, or those that a graph has programs for.
        longest: rows of the longest segment.
        num_inputs: ``K``.
        widths: ``N`` of each slice.
        rank: largest rank, as padded for the kernels.
        processors: multiprocessors of the GPU.
    """
    if longest <= 64:
        block_t, tiles = 16, _cdiv(longest, 32)
        programs = num_segments * tiles
        columns = programs * sum(widths)
        if programs < 32:
            block_k, part, shrink_warps = 256, 512, 4
        else:
            block_k, part, shrink_warps = 128, 512 if len(widths) > 1 else 256, 2
        if rank > 32:
            block_k, shrink_warps = 64, 4
        room = max(1, 8 * processors // (programs * len(widths)))
        # a power of two where room is short, so that few kernels are compiled for all numbers of segments
        splits = min(1 << room.bit_length() - 1, num_inputs // part)
        is_wide = programs >= 32 and num_segments * longest <= 512 and rank <= 32
        block_n, expand_warps = (512, 8) if is_wide else (256, 8 if rank > 32 else 4)
        while block_n > 64 and columns < block_n * processors:
            block_n //= 2
    else:
        block_t = 32 if num_segments * longest <= 1024 else 64
        tiles = _cdiv(longest, block_t)
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
    blocks = _cdiv(num_inputs, block_k)
    split_blocks = _cdiv(blocks, splits)
    splits = _cdiv(blocks, split_blocks)
    return Launch(tiles, block_t, splits, split_blocks, block_k, block_n, shrink_warps, expand_warps)


def _cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)
