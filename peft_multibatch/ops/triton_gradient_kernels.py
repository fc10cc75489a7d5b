"""Triton kernels for the gradients of the input and of the weights; see ``triton_training_kernels``."""

from __future__ import annotations

import triton
import triton.language as tl

from peft_multibatch.ops.triton_dropout import drop_row, keep_tile
from peft_multibatch.ops.triton_kernels import _rows, _segment
from peft_multibatch.ops.triton_training_kernels import _pick, _slice_of


@triton.jit(do_not_specialize=["stride_table", "num_rows", "tiles"])
def grad_x_kernel(
    dx,  # [T, K]
    ds,  # [T, SLICES, R]
    plan,
    table,
    stride_table,
    num_rows,
    num_inputs,
    stride,
    tiles,
    drops,
    steps,
    DROPS: tl.constexpr,
    SLICES: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    IN_PLACE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: segments × tiles of rows × blocks of columns, of which the last vary fastest. Rows without an adapter get
    zeros, unless ``IN_PLACE``.
    """
    blocks = tl.cdiv(num_inputs, BLOCK_C)
    rest, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    index, tile = rest // tiles, rest % tiles
    num_entries, _, is_permuted, permutation, slot, start, stop, _ = _segment(plan, index)
    per_entry = num_rows // num_entries
    first = start * per_entry + tile * BLOCK_T
    if first >= stop * per_entry:
        return
    if IN_PLACE:  # noqa: SIM102
        if slot < 0:
            return
    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    position = first + tl.arange(0, BLOCK_T)
    live = position < stop * per_entry
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for i in tl.static_range(SLICES):
        row = table + slot.to(tl.int64) * stride_table + i * 4
        lora_a = tl.load(row, mask=slot >= 0, other=0).to(tl.pointer_type(WEIGHTS))
        rank = tl.load(row + 2, mask=slot >= 0, other=0).to(tl.int32)
        if ALIGNED:
            lora_a = tl.multiple_of(lora_a, 16)
        if rank > 0:
            before = total
            for r in tl.static_range(0, R, BLOCK_R):
                ranks = r + tl.arange(0, BLOCK_R)
                ds_tile = tl.load(
                    ds + (position.to(tl.int64)[:, None] * SLICES + i) * R + ranks[None, :],
                    mask=live[:, None] & (ranks < rank)[None, :],
                    other=0.0,
                )
                a_tile = tl.load(
                    lora_a + ranks.to(tl.int64)[:, None] * num_inputs + columns[None, :],
                    mask=(ranks < rank)[:, None] & (columns < num_inputs)[None, :],
                    other=0.0,
                )
                total = tl.dot(ds_tile, a_tile, total, input_precision=PRECISION)
            if DROPS:
                key, step, threshold = drop_row(drops, steps, slot, i, SLICES)
                if threshold > 0:
                    keep = keep_tile(key, step, threshold, position, start, per_entry, block, BLOCK_T, BLOCK_C)
                    total = tl.where(keep, total, before)
    rows = _rows(position, live, is_permuted, permutation, per_entry)
    place = dx + rows[:, None] * stride + columns[None, :]
    mask = live[:, None] & (columns < num_inputs)[None, :]
    if IN_PLACE:
        total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, total.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride_table", "num_rows"])
def grad_weight_kernel(
    grads,  # flat, of the dtype of the weights
    offsets,  # int64 [S, SLICES, 2]: offsets of the gradients of lora_A and lora_B; -1 if not wanted
    left,  # [T, SLICES, R]: dS or h
    in0,
    in1,
    in2,  # [T, C] of each slice: x or dY
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
    drops,
    steps,
    DROPS: tl.constexpr,
    SLICES: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    IS_B: tl.constexpr,
    REPEATS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (blocks of columns of all slices together, segments, blocks of ranks).

    With ``REPEATS``, an adapter may have several segments, from mixtures; the program of the first one sums up all.
    """
    index = tl.program_id(1)
    i, block = _slice_of(tl.program_id(0), tl.cdiv(width0, BLOCK_C), tl.cdiv(width1, BLOCK_C), SLICES)
    num_entries, num_segments, is_permuted, permutation, slot, start, stop, weight = _segment(plan, index)
    if slot < 0:
        return
    row = table + slot.to(tl.int64) * stride_table + i * 4
    rank = tl.load(row + 2).to(tl.int32)
    offset = tl.load(offsets + (slot.to(tl.int64) * SLICES + i) * 2 + (1 if IS_B else 0))
    if rank <= tl.program_id(2) * BLOCK_R or offset < 0:
        return
    end = index + 1
    if REPEATS:
        end = num_segments
        earlier = 0
        for j in range(0, index):
            earlier += tl.where(tl.load(plan + 4 + 3 * j) == slot, 1, 0)
        if earlier > 0:
            return
    source = _pick(i, in0, in1, in2, SLICES)
    width = _pick(i, width0, width1, width2, SLICES)
    stride = _pick(i, stride0, stride1, stride2, SLICES)
    scaling = tl.load(row + 3).to(tl.int32).to(tl.float32, bitcast=True)
    per_entry = num_rows // num_entries
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    if DROPS:
        key, step, threshold = drop_row(drops, steps, slot, i, SLICES)
    for j in range(index, end):
        _, _, _, _, other, start, stop, weight = _segment(plan, j)
        if other == slot:
            part = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
            for first in range(start * per_entry, stop * per_entry, BLOCK_T):
                position = first + tl.arange(0, BLOCK_T)
                live = position < stop * per_entry
                rows = _rows(position, live, is_permuted, permutation, per_entry)
                left_tile = tl.load(
                    left + (position.to(tl.int64)[:, None] * SLICES + i) * R + ranks[None, :],
                    mask=live[:, None] & (ranks < rank)[None, :],
                    other=0.0,
                )
                tile_in = tl.load(
                    source + rows[:, None] * stride + columns[None, :],
                    mask=live[:, None] & (columns < width)[None, :],
                    other=0.0,
                )
                if DROPS:  # noqa: SIM102
                    if threshold > 0:
                        keep = keep_tile(key, step, threshold, position, start, per_entry, block, BLOCK_T, BLOCK_C)
                        tile_in = tl.where(keep, tile_in, 0.0)
                part = tl.dot(tl.trans(left_tile), tile_in.to(WEIGHTS), part, input_precision=PRECISION)
            total += part * (scaling * weight) if IS_B else part
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    if IS_B:
        total = tl.trans(total)
        place = grads + offset + columns.to(tl.int64)[:, None] * rank + ranks[None, :]
        mask = (columns < width)[:, None] & (ranks < rank)[None, :]
    else:
        place = grads + offset + ranks.to(tl.int64)[:, None] * width + columns[None, :]
        mask = (ranks < rank)[:, None] & (columns < width)[None, :]
    if IN_PLACE:
        total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, total.to(grads.dtype.element_ty), mask=mask)
