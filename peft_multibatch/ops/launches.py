"""Launch parameters: how a product is divided into programs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from peft_multibatch.plan.segments import Segments


SMALLEST = 16
"""The least rows or columns of a block that tensor cores can multiply."""


UNEVEN = 1.25
"""A plan is cut into pieces if its launches have this many times as many tiles of rows without them."""

LONG_PIECE = 128
"""The most rows of a piece that has several tiles."""

LONG_ENTRY = 8
"""The rows from which an entry is a piece of its own in plans at a fixed address. Without, a program would take turns
with all rows of a piece's entries; with fewer rows, most of a tile would be empty."""


class Launch(NamedTuple):
    """How a product is divided into programs.

    Attributes:
        tiles: programs of ``shrink_kernel`` that share a segment's rows.
        block_t: rows per tile.
        splits: splits of K, whose partial sums ``expand_kernel`` adds up.
        split_blocks: blocks of x per split.
        block_k: columns of x per block.
        block_n: columns of y per program of ``expand_kernel``.
        shrink_warps: warps per program of ``shrink_kernel``.
        expand_warps: warps per program of ``expand_kernel``.
        expand_tiles: programs of ``expand_kernel`` that share a segment's rows.
        expand_block_t: rows per tile of these.
        by_columns: whether ``expand_kernel`` starts the programs for a block of columns one after another, instead of
            those for a segment.
        shrink_stages: blocks of x and ``lora_A`` that are on their way at once, on NVIDIA's GPUs.
        shrink_registers: the most registers of a thread of ``shrink_kernel``, on NVIDIA's GPUs; 0 leaves that to the
            compiler.
    """

    tiles: int
    block_t: int
    splits: int
    split_blocks: int
    block_k: int
    block_n: int
    shrink_warps: int
    expand_warps: int
    expand_tiles: int
    expand_block_t: int
    by_columns: bool = False
    shrink_stages: int = 3
    shrink_registers: int = 0


class Limits(NamedTuple):
    """What launches depend on, of a GPU.

    Attributes:
        processors: the number of multiprocessors.
        shared: bytes of shared memory that a program can have.
    """

    processors: int
    shared: int


@functools.cache
def limits_of(device: torch.device) -> Limits:
    """The limits of a device; on a CPU, any that the interpreter can run with."""
    if device.type != "cuda":
        return Limits(1, 2**20)
    found = torch.cuda.get_device_properties(device)
    # torch doesn't know it on AMD's GPUs, where it is 64 kB or more
    return Limits(found.multi_processor_count, getattr(found, "shared_memory_per_block_optin", 2**16))


def piece_for(rows: int, rank: int = 16) -> int:
    """The most rows of a piece, for a plan of this many rows.

    Of the rows that a program handles at once or, in large plans, of several tall tiles, each of which reads its
    adapter's weights once. Short pieces would read the weights of large ranks too often.

    Args:
        rows: the rows of the plan.
        rank: the largest rank, if it is known.
    """
    return 16 if rows < 2048 and rank <= 64 else LONG_PIECE


def even_out(segments: Segments, num_rows: int, piece: int) -> Segments:
    """The same plan, cut into pieces if it is uneven.

    Every segment gets the programs that the longest one needs. If segments differ much in length, most of these have
    nothing to do, while those of the longest segment are too few for the whole GPU.

    Args:
        segments: the plan.
        num_rows: ``T``, a multiple of its entries.
        piece: the most rows of a piece. An entry isn't divided, even if it has more.
    """
    per_entry = max(num_rows // max(segments.num_entries, 1), 1)
    most, tile = max(piece // per_entry, 1), min(piece, 64)
    tiles = segments.num_segments * _cdiv(segments.longest * per_entry, tile)
    if segments.longest <= most or tiles < UNEVEN * _cdiv(num_rows, tile):  # no pieces could have fewer
        return segments
    pieces = segments.cut(most)
    return pieces if tiles >= UNEVEN * pieces.num_segments * _cdiv(most * per_entry, tile) else segments


def choose(
    num_segments: int,
    longest: int,
    num_inputs: int,
    widths: Sequence[int],
    rank: int,
    itemsize: int,
    limits: Limits,
) -> Launch:
    """Choose the parameters that sweeps on an H100 and an H200 found best for each kind of batch
    (benchmarks/lora_kernels.py).

    With few adapters, latency dominates, so K is split and columns are narrow, to read the weights with many programs
    at once. With many adapters, each has its own programs and bandwidth dominates, so splits are long. With many rows
    per segment, tiles are tall, so that weights are read once for many rows, and K is split until all multiprocessors
    have programs; in prefill, where y is most of the memory traffic, a program keeps its columns of ``lora_B`` for
    several short tiles, so that more of y is on its way. Large ranks have fewer splits, as ``expand_kernel`` reads
    the sums of all splits for every block of columns. Ranks above 32 have large blocks, of which a fourth is on its
    way if no program has to wait for another's memory.

    Args:
        num_segments: segments of the plan, or those for which a graph has programs.
        longest: rows of the longest segment.
        num_inputs: ``K``.
        widths: ``N`` of each slice.
        rank: largest rank, as padded for the kernels.
        itemsize: bytes of a number, the most of the weights' and the input's.
        limits: those of the GPU.
    """
    processors, shared = limits
    expand, is_single, by_columns = None, len(widths) == 1, False
    if longest <= 64:
        block_t, tiles = 16, _cdiv(longest, 32)
        programs = num_segments * tiles
        columns = programs * sum(widths)
        is_long, by_columns = num_inputs > 8192, columns >= 3072 * processors
        wanted, most = 8, num_inputs  # programs per multiprocessor, and splits
        if rank > 32:
            block_k, part, shrink_warps = 64, 256 if is_single and rank <= 128 else 512, 4
            wanted, most = (3, 16) if rank > 64 else (4 if is_single else 8, 32)
        elif programs < 32:
            block_k, part, shrink_warps = 256, 512 if is_long or len(widths) == 2 else 256, 2 if is_long else 4
        else:
            block_k, part, shrink_warps = 128, 256 if is_single else 512, 2
        splits = min(_power_of_2(wanted * processors // (programs * len(widths))), num_inputs // part, most)
        block_n, expand_warps = 256, 8 if is_single and rank > 32 and (rank > 64 or splits >= 16) else 4
        if programs >= 32 and num_segments * longest <= 512 and rank <= 32:
            if is_single:
                block_n, expand_warps = 512, 8
            elif not by_columns:
                block_n = 512
        while block_n > 64 and columns < block_n * processors // 8:
            block_n //= 2
    else:
        is_prefill = num_segments * longest > 1024
        block_t = 64 if is_prefill else 32
        tiles = _cdiv(longest, block_t)
        programs = num_segments * tiles * len(widths)
        block_n, expand_warps = 128 if rank <= 128 else 64, 4
        if is_prefill and rank <= 32:
            block_k, shrink_warps = 64 if len(widths) > 2 else 128, 2
            splits = min(_power_of_2((9 if len(widths) > 2 else 3) * processors // programs), 4)
            expand = _cdiv(longest, 64 if is_single and num_segments * longest <= 8192 else 128), 32
        elif is_prefill:
            block_k, shrink_warps = 128 if rank <= 64 and programs <= 2 * processors else 64, 8
            # with splits, expand reads as many sums per row, which the columns of several slices don't make up for
            few = processors // (2 if num_inputs > 8192 else 4)
            splits = min(4, num_inputs // 1024) if is_single and programs <= few and rank <= 128 else 1
            if rank <= 64:
                expand = _cdiv(longest, 128), 32
        else:
            block_k, shrink_warps = 64 if rank > 32 else 128, 4
            splits = min(3 * processors // programs, num_inputs // 512)
            if rank > 64:  # more splits make shrink's loops shorter, and have expand add up more sums in each block
                blocks = num_segments * longest * sum(widths) / block_n
                splits = min(splits, int(12 * math.sqrt(num_inputs / blocks)))
            splits = _power_of_2(splits)
            if 32 < rank <= 64:
                block_n, expand_warps = 256, 8
    block_k = fit_shrink(block_t, block_k, rank, itemsize, shared)
    if splits == 2 and rank > 32:  # mostly slower, and needs the most shared memory
        splits = 1 if rank > 64 else 4
    launch = with_splits(
        tiles, block_t, max(1, splits), block_k, block_n, shrink_warps, expand_warps, num_inputs, expand
    )
    sums = SUMS_OF_TWO_SPLITS if launch.splits == 2 else SUMS
    expand_block_t, block_n = fit_expand(launch.expand_block_t, block_n, rank, itemsize, shared, sums)
    stages, registers = 3, 0
    if rank > 32:
        programs = num_segments * launch.tiles * launch.splits * len(widths)
        stage = stage_memory(block_t, block_k, rank, itemsize)
        if programs <= processors * (shared // (4 * stage + 1024)):  # all of them run at once
            stages = 4
        if block_t == block_k == 64 and not is_single and rank <= 128 and 3 * (3 * stage + 1024) <= shared:
            registers = 80  # so that more programs run on a multiprocessor
    return launch._replace(
        expand_block_t=expand_block_t,
        block_n=block_n,
        by_columns=by_columns,
        shrink_stages=stages,
        shrink_registers=registers,
    )


# What kernels need is up to the compiler. These bounds hold for everything that tests/ops/shared_memory.py compiles.
SUMS, SUMS_OF_TWO_SPLITS, SUMS_IN_TRAINING = 2, 5, 4
"""The blocks of sums that an expand kernel has in shared memory. It has both of two splits, in several stages: a loop
over one further split isn't a loop to the compiler, which then pipelines its loads."""


def stage_memory(block_t: int, block_k: int, rank: int, itemsize: int) -> int:
    """Bytes of a block of x and one of lora_A."""
    return (rank + block_t) * block_k * itemsize


def shrink_memory(block_t: int, block_k: int, rank: int, itemsize: int) -> int:
    """Bytes of shared memory that a program of a shrink kernel with three stages needs at most."""
    return (3 if block_t >= 64 else 2) * stage_memory(block_t, block_k, rank, itemsize)


def expand_memory(block_t: int, block_n: int, rank: int, itemsize: int, sums: int, shared: int) -> int:
    """Bytes that a program of an expand kernel needs at most: blocks of lora_B and of sums."""
    if shared <= 2**16:  # such as a T4, where blocks in half precision are there twice
        itemsize = 4
    return rank * block_n * itemsize + rank * block_t * sums * max(itemsize, 4) + 16384


def fit_shrink(block_t: int, block_k: int, rank: int, itemsize: int, shared: int) -> int:
    """The largest ``block_k``, up to this one, with which a shrink kernel fits into this much shared memory."""
    while block_k > SMALLEST and shrink_memory(block_t, block_k, rank, itemsize) > shared:
        block_k //= 2
    return block_k


def fit_expand(block_t: int, block_n: int, rank: int, itemsize: int, shared: int, sums: int) -> tuple[int, int]:
    """The largest ``block_t`` and ``block_n``, up to these, with which an expand kernel fits."""
    while max(block_t, block_n) > SMALLEST and expand_memory(block_t, block_n, rank, itemsize, sums, shared) > shared:
        if block_t > SMALLEST and 2 * block_t > block_n:
            block_t //= 2
        else:
            block_n //= 2
    return block_t, block_n


def fits(rank: int, itemsize: int, shared: int, trains: bool = False) -> bool:
    """Whether kernels fit into this much shared memory with the smallest blocks."""
    sums = SUMS_IN_TRAINING if trains else SUMS
    shrink = shrink_memory(SMALLEST, SMALLEST, rank, itemsize)
    return max(shrink, expand_memory(SMALLEST, SMALLEST, rank, itemsize, sums, shared)) <= shared


def with_splits(
    tiles: int,
    block_t: int,
    splits: int,
    block_k: int,
    block_n: int,
    shrink_warps: int,
    expand_warps: int,
    num_inputs: int,
    expand: tuple[int, int] | None = None,
) -> Launch:
    """A launch with at most this many splits, none of them empty, and the same tiles for both kernels by default."""
    blocks = _cdiv(num_inputs, block_k)
    split_blocks = _cdiv(blocks, splits)
    splits = _cdiv(blocks, split_blocks)
    expand = expand or (tiles, block_t)
    return Launch(tiles, block_t, splits, split_blocks, block_k, block_n, shrink_warps, expand_warps, *expand)


def _power_of_2(number: int) -> int:
    """The largest one up to this number, so that few kernels are compiled for all numbers of segments."""
    return 1 << max(number, 1).bit_length() - 1


def _cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)
