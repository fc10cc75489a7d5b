"""Triton kernels for inference: ``shrink_kernel`` and ``expand_kernel``, one launch each for any adapters.

A program computes a segment: it reads the segment's slot and bounds from the packed plan, then the slot's row of the
bank's table (the addresses of ``lora_A`` and ``lora_B``, rank, scaling), then weights. These are three dependent
loads, none of which waits for the host, or for the kernel launched right before. So plans and tables must not be
written by kernels, and are copied from the host. Segments without an adapter and slots of rank 0 are skipped. Graphs
don't know the number of segments at launch and use ``LOOP``: their programs loop until all segments are done.

A GPU starts programs in the order of their numbers, of which those in dimension 0 vary fastest. Programs of a segment
come one after another, so that slices and blocks of columns share rows in the cache, and that those for which there is
no segment come last. In a grid of one dimension, programs would have to compute their segment, which is slower.

Partial sums over K are written as planes in float32 and added up by ``expand_kernel`` in a fixed order, so the same
input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _segment(plan, index):
    """The plan's entries, segments and permutation, and the slot, bounds and weight of this segment."""
    num_entries = tl.load(plan)
    num_segments = tl.load(plan + 1)
    is_permuted = tl.load(plan + 2)
    triple = plan + 4 + 3 * index
    slot = tl.load(triple)
    start = tl.load(triple + 1)
    weight = tl.load(triple + 2).to(tl.float32, bitcast=True)
    stop = tl.load(triple + 4)
    return num_entries, num_segments, is_permuted, plan + 7 + 3 * num_segments, slot, start, stop, weight


@triton.jit
def _rows(position, mask, is_permuted, permutation, per_entry):
    """The rows of x and y at these positions in adapter order."""
    rows = position.to(tl.int64)
    if is_permuted != 0:
        entry = tl.load(permutation + position // per_entry, mask=mask, other=0)
        rows = entry.to(tl.int64) * per_entry + position % per_entry
    return rows


@triton.jit
def _end(PDL: tl.constexpr):
    """Called by programs that have nothing (left) to do. They must not end before the preceding kernel has, because
    otherwise a following kernel could start too early.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _a_tile(lora_a, rank, ranks, k, num_inputs):
    # the mask compares with num_inputs, whose divisors the compiler knows, so that loads can be wide
    return tl.load(
        lora_a + ranks.to(tl.int64)[:, None] * num_inputs + k[None, :],
        mask=(ranks < rank)[:, None] & (k < num_inputs)[None, :],
        other=0.0,
    )


@triton.jit
def _shrink_segment(
    h, x, lora_a, rank, start, stop, tile, split, i, is_permuted, permutation, per_entry,
    num_rows, num_inputs, stride_x, split_blocks, tiles,
    SLICES: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, ONE_BLOCK: tl.constexpr,
    WEIGHTS: tl.constexpr, ALIGNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute this program's tiles of a segment's rows."""
    ranks = tl.arange(0, R)
    ks = tl.arange(0, BLOCK_K)
    if ONE_BLOCK:
        k = split * BLOCK_K + ks
        a_tile = _a_tile(lora_a, rank, ranks, k, num_inputs)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for first in range(start * per_entry + tile * BLOCK_T, stop * per_entry, tiles * BLOCK_T):
        position = first + tl.arange(0, BLOCK_T)
        live = position < stop * per_entry
        rows = _rows(position, live, is_permuted, permutation, per_entry)
        x_rows = x + rows[:, None] * stride_x
        total = tl.zeros((BLOCK_T, R), dtype=tl.float32)
        if ONE_BLOCK:
            x_tile = tl.load(x_rows + k[None, :], mask=live[:, None] & (k < num_inputs)[None, :], other=0.0)
            total = tl.dot(x_tile.to(WEIGHTS), tl.trans(a_tile), total, input_precision="ieee")
        else:
            for block in range(split * split_blocks, (split + 1) * split_blocks):
                k = block * BLOCK_K + ks
                x_tile = tl.load(x_rows + k[None, :], mask=live[:, None] & (k < num_inputs)[None, :], other=0.0)
                a_tile = _a_tile(lora_a, rank, ranks, k, num_inputs)
                total = tl.dot(x_tile.to(WEIGHTS), tl.trans(a_tile), total, input_precision="ieee")
        place = ((split.to(tl.int64) * num_rows + position) * SLICES + i) * R
        tl.store(h + place[:, None] + ranks[None, :], total.to(h.dtype.element_ty), mask=live[:, None])


# These numbers change between calls; specializing on them would compile kernels in the middle of a user's batch.
@triton.jit(do_not_specialize=["stride_table", "num_rows", "split_blocks", "tiles"])
def shrink_kernel(
    h,  # [SPLITS, T, SLICES, R]
    x,  # [T, K]
    plan,
    table,  # int64 [S, SLICES, 4]; slots are stride_table numbers apart
    stride_table,
    num_rows,
    num_inputs,
    stride_x,
    split_blocks,
    tiles,
    SLICES: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
    LOOP: tl.constexpr,
):
    """Grid: (slices, splits of K, segments (fewer with ``LOOP``) × tiles).

    With ``ONE_BLOCK``, a split is a single block, whose weights are loaded before the preceding kernel has ended.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    index, tile = tl.program_id(2) // tiles, tl.program_id(2) % tiles
    split, i = tl.program_id(1), tl.program_id(0)
    num_entries, num_segments, is_permuted, permutation, slot, start, stop, _ = _segment(plan, index)
    if LOOP:
        while index < num_segments:
            row = table + slot.to(tl.int64) * stride_table + i * 4
            lora_a = tl.load(row, mask=slot >= 0, other=0).to(tl.pointer_type(WEIGHTS))
            rank = tl.load(row + 2, mask=slot >= 0, other=0).to(tl.int32)
            if ALIGNED:  # not inside _shrink_segment, because hints on arguments of functions get lost
                lora_a = tl.multiple_of(lora_a, 16)
            if rank > 0:
                _shrink_segment(
                    h, x, lora_a, rank, start, stop, tile, split, i, is_permuted, permutation, num_rows // num_entries,
                    num_rows, num_inputs, stride_x, split_blocks, tiles,
                    SLICES, R, BLOCK_T, BLOCK_K, ONE_BLOCK, WEIGHTS, ALIGNED, PDL,
                )  # fmt: skip
            index += tl.num_programs(2) // tiles
            _, _, _, _, slot, start, stop, _ = _segment(plan, tl.minimum(index, num_segments - 1))
        _end(PDL)
    else:
        slot = tl.where(index < num_segments, slot, -1)
        if slot < 0:
            _end(PDL)
            return
        row = table + slot.to(tl.int64) * stride_table + i * 4
        lora_a = tl.load(row).to(tl.pointer_type(WEIGHTS))
        rank = tl.load(row + 2).to(tl.int32)
        if rank == 0:
            _end(PDL)
            return
        if ALIGNED:
            lora_a = tl.multiple_of(lora_a, 16)
        _shrink_segment(
            h, x, lora_a, rank, start, stop, tile, split, i, is_permuted, permutation, num_rows // num_entries,
            num_rows, num_inputs, stride_x, split_blocks, tiles,
            SLICES, R, BLOCK_T, BLOCK_K, ONE_BLOCK, WEIGHTS, ALIGNED, PDL,
        )  # fmt: skip


@triton.jit
def _expand_segment(
    y, h, lora_b, rank, scaling, start, stop, tile, i, block, is_permuted, permutation, per_entry,
    num_rows, width, stride, tiles,
    SLICES: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    ADDS: tl.constexpr, WEIGHTS: tl.constexpr, ALIGNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute this program's tiles of a segment's rows."""
    ranks = tl.arange(0, R)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    b_tile = tl.load(
        lora_b + columns.to(tl.int64)[:, None] * rank + ranks[None, :],
        mask=(columns < width)[:, None] & (ranks < rank)[None, :],
        other=0.0,
    )
    if PDL:
        tl.extra.cuda.gdc_wait()
    for first in range(start * per_entry + tile * BLOCK_T, stop * per_entry, tiles * BLOCK_T):
        position = first + tl.arange(0, BLOCK_T)
        live = position < stop * per_entry
        rows = _rows(position, live, is_permuted, permutation, per_entry)
        y_tile = y + rows[:, None] * stride + columns[None, :]
        mask = live[:, None] & (columns < width)[None, :]
        if ADDS:
            before = tl.load(y_tile, mask=mask, other=0.0)
        place = h + (position.to(tl.int64)[:, None] * SLICES + i) * R + ranks[None, :]
        has_sums = live[:, None]
        if not ADDS:  # `shrink_kernel` wrote nothing for segments without an adapter
            has_sums = has_sums & (ranks < rank)[None, :]
        sums = tl.load(place, mask=has_sums, other=0.0)
        for split in range(1, SPLITS):  # unrolling this loop makes it slower by a third
            plane = split * num_rows.to(tl.int64) * (SLICES * R)
            sums += tl.load(place + plane, mask=has_sums, other=0.0)
        delta = tl.dot(sums.to(WEIGHTS), tl.trans(b_tile), input_precision="ieee") * scaling
        if ADDS:
            delta += before.to(tl.float32)
        tl.store(y_tile, delta.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride_table", "num_rows", "tiles"])
def expand_kernel(
    y0,
    y1,
    y2,  # [T, N] of each slice; repeated if there are fewer slices
    h,  # [SPLITS, T, SLICES, R]
    plan,
    table,
    stride_table,
    num_rows,
    width0,
    width1,
    width2,
    stride0,
    stride1,
    stride2,
    tiles,
    SLICES: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    ADDS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
    LOOP: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
):
    """Grid: (blocks of columns of all slices together, segments (fewer with ``LOOP``) × tiles), or with ``BY_COLUMNS``
    the other way round.

    Without ``ADDS``, deltas are written instead of added, zeros for rows without an adapter.
    """
    axis: tl.constexpr = 0 if BY_COLUMNS else 1  # of segments and tiles
    index, tile = tl.program_id(axis) // tiles, tl.program_id(axis) % tiles
    block = tl.program_id(1 - axis)
    num_entries, num_segments, is_permuted, permutation, slot, start, stop, weight = _segment(plan, index)
    if not LOOP:
        is_done = index >= num_segments
        if ADDS:
            is_done = is_done | (slot < 0)
        if is_done:
            _end(PDL)
            return
    i, y, width, stride = 0, y0, width0, stride0
    if SLICES > 1:
        blocks0 = tl.cdiv(width0, BLOCK_N)
        if block >= blocks0:
            block -= blocks0
            i, y, width, stride = 1, y1, width1, stride1
            if SLICES > 2:
                blocks1 = tl.cdiv(width1, BLOCK_N)
                if block >= blocks1:
                    block -= blocks1
                    i, y, width, stride = 2, y2, width2, stride2
    if LOOP:
        while index < num_segments:
            row = table + slot.to(tl.int64) * stride_table + i * 4
            lora_b = tl.load(row + 1, mask=slot >= 0, other=0).to(tl.pointer_type(WEIGHTS))
            rank = tl.load(row + 2, mask=slot >= 0, other=0).to(tl.int32)
            scaling = tl.load(row + 3, mask=slot >= 0, other=0).to(tl.int32).to(tl.float32, bitcast=True) * weight
            if ALIGNED:
                lora_b = tl.multiple_of(lora_b, 16)
                rank = tl.multiple_of(rank, 8)
            if not ADDS or rank > 0:
                _expand_segment(
                    y, h, lora_b, rank, scaling, start, stop, tile, i, block, is_permuted, permutation,
                    num_rows // num_entries, num_rows, width, stride, tiles,
                    SLICES, R, BLOCK_T, BLOCK_N, SPLITS, ADDS, WEIGHTS, ALIGNED, PDL,
                )  # fmt: skip
            index += tl.num_programs(axis) // tiles
            _, _, _, _, slot, start, stop, weight = _segment(plan, tl.minimum(index, num_segments - 1))
        _end(PDL)
    else:
        row = table + slot.to(tl.int64) * stride_table + i * 4
        lora_b = tl.load(row + 1, mask=slot >= 0, other=0).to(tl.pointer_type(WEIGHTS))
        rank = tl.load(row + 2, mask=slot >= 0, other=0).to(tl.int32)
        scaling = tl.load(row + 3, mask=slot >= 0, other=0).to(tl.int32).to(tl.float32, bitcast=True) * weight
        if ADDS and rank == 0:
            _end(PDL)
            return
        if ALIGNED:
            lora_b = tl.multiple_of(lora_b, 16)
            rank = tl.multiple_of(rank, 8)
        _expand_segment(
            y, h, lora_b, rank, scaling, start, stop, tile, i, block, is_permuted, permutation,
            num_rows // num_entries, num_rows, width, stride, tiles,
            SLICES, R, BLOCK_T, BLOCK_N, SPLITS, ADDS, WEIGHTS, ALIGNED, PDL,
        )  # fmt: skip
