"""Triton kernels for training: forward, which saves ``h``, and backward, one launch each for any adapters.

    shrink       h_i = x @ A_i.T              dS_i = s_i · dY_i @ B_i
    expand       y_i + s_i · h_i @ B_i.T
    grad_x       dX = Σ_i dS_i @ A_i
    grad_weight  dA_i = dS_i.T @ x            dB_i = s_i · dY_i.T @ h_i

``h`` and ``dS`` are in adapter order, so that a tile of them is contiguous; ``x``, ``y`` and their gradients stay in
their own order, and aren't copied. Every sum is computed by one program in a fixed order, so the same input gives the
same bits.

Tiles have at most 32 rows if operands are converted in registers: ptxas 12.8, which Triton 3.6 includes, miscompiles
such products with 64 or more rows (triton #9433).
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_multibatch.ops.triton_dropout import drop_row, drop_scale, keep_tile
from peft_multibatch.ops.triton_kernels import _rows, _segment


@triton.jit
def _slice_of(block, blocks0, blocks1, SLICES: tl.constexpr):
    """The slice of a block of columns, and the block's index within the slice."""
    i = 0
    if SLICES > 1:
        i += tl.where(block >= blocks0, 1, 0)
    if SLICES > 2:
        i += tl.where(block >= blocks0 + blocks1, 1, 0)
    return i, block - tl.where(i > 0, blocks0, 0) - tl.where(i > 1, blocks1, 0)


@triton.jit
def _pick(i, value0, value1, value2, SLICES: tl.constexpr):
    """The value of a slice."""
    value = value0
    if SLICES > 1:  # noqa: SIM102, a constant that is evaluated at compile time
        if i == 1:
            value = value1
    if SLICES > 2:  # noqa: SIM102
        if i == 2:
            value = value2
    return value


@triton.jit(do_not_specialize=["stride_table", "num_rows", "tiles"])
def shrink_kernel(
    out,  # [T, SLICES, R]: h or dS
    in0,
    in1,
    in2,  # [T, C] of each slice: x or dY; repeated if there are fewer slices
    plan,
    table,  # int64 [S, SLICES, 4]; slots are stride_table numbers apart
    stride_table,
    num_rows,
    width0,
    width1,
    width2,
    stride0,
    stride1,
    stride2,
    tiles,
    drops,  # int64 [S, SLICES, 3]: DropTable.rows
    steps,  # int32 [S]
    DROPS: tl.constexpr,
    SLICES: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: segments × tiles of rows × slices, of which the last vary fastest."""
    i, rest = tl.program_id(0) % SLICES, tl.program_id(0) // SLICES
    index, tile = rest // tiles, rest % tiles
    num_entries, _, is_permuted, permutation, slot, start, stop, weight = _segment(plan, index)
    per_entry = num_rows // num_entries
    first = start * per_entry + tile * BLOCK_T
    if slot < 0 or first >= stop * per_entry:
        return
    row = table + slot.to(tl.int64) * stride_table + i * 4
    rank = tl.load(row + 2).to(tl.int32)
    if rank == 0:
        return
    source = _pick(i, in0, in1, in2, SLICES)
    width = _pick(i, width0, width1, width2, SLICES)
    stride = _pick(i, stride0, stride1, stride2, SLICES)
    weights = tl.load(row + (1 if IS_BACKWARD else 0)).to(tl.pointer_type(WEIGHTS))
    if ALIGNED:
        weights = tl.multiple_of(weights, 16)
        rank = tl.multiple_of(rank, 8)
    ranks, columns = tl.arange(0, R), tl.arange(0, BLOCK_C)
    position = first + tl.arange(0, BLOCK_T)
    live = position < stop * per_entry
    source_rows = source + _rows(position, live, is_permuted, permutation, per_entry)[:, None] * stride
    total = tl.zeros((BLOCK_T, R), dtype=tl.float32)
    if DROPS:
        key, step, threshold = drop_row(drops, steps, slot, i, SLICES)
    for block in range(0, tl.cdiv(width, BLOCK_C)):
        c = block * BLOCK_C + columns
        tile_in = tl.load(source_rows + c[None, :], mask=live[:, None] & (c < width)[None, :], other=0.0)
        if IS_BACKWARD:  # lora_B, [C, rank]
            tile_w = tl.load(
                weights + c.to(tl.int64)[:, None] * rank + ranks[None, :],
                mask=(c < width)[:, None] & (ranks < rank)[None, :],
                other=0.0,
            )
        else:  # lora_A, [rank, C]
            tile_w = tl.trans(
                tl.load(
                    weights + ranks.to(tl.int64)[:, None] * width + c[None, :],
                    mask=(ranks < rank)[:, None] & (c < width)[None, :],
                    other=0.0,
                )
            )
            if DROPS:  # noqa: SIM102
                if threshold > 0:
                    keep = keep_tile(key, step, threshold, position, start, per_entry, block, BLOCK_T, BLOCK_C)
                    tile_in = tl.where(keep, tile_in, 0.0)
        total = tl.dot(tile_in.to(WEIGHTS), tile_w, total, input_precision=PRECISION)
    if IS_BACKWARD:
        total *= tl.load(row + 3).to(tl.int32).to(tl.float32, bitcast=True) * weight
    if DROPS:
        total *= drop_scale(drops, slot, i, SLICES)
    place = out + (position.to(tl.int64)[:, None] * SLICES + i) * R + ranks[None, :]
    tl.store(place, total.to(WEIGHTS), mask=live[:, None])


@triton.jit(do_not_specialize=["stride_table", "num_rows", "tiles", "blocks"])
def expand_kernel(
    to0,
    to1,
    to2,  # [T, N] of each slice: the result
    from0,
    from1,
    from2,  # the tensors to which deltas are added; the same as the result if IN_PLACE
    h,  # [T, SLICES, R]
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
    blocks,
    SLICES: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IN_PLACE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: segments × programs that share a segment's rows × blocks of columns of all slices together, of which the
    last vary fastest.
    """
    rest, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    index, tile = rest // tiles, rest % tiles
    i, block = _slice_of(block, tl.cdiv(width0, BLOCK_C), tl.cdiv(width1, BLOCK_C), SLICES)
    num_entries, _, is_permuted, permutation, slot, start, stop, weight = _segment(plan, index)
    row = table + slot.to(tl.int64) * stride_table + i * 4
    rank = tl.load(row + 2, mask=slot >= 0, other=0).to(tl.int32)
    if IN_PLACE:  # noqa: SIM102
        if rank == 0:
            return
    to = _pick(i, to0, to1, to2, SLICES)
    before = _pick(i, from0, from1, from2, SLICES)
    width = _pick(i, width0, width1, width2, SLICES)
    stride = _pick(i, stride0, stride1, stride2, SLICES)
    lora_b = tl.load(row + 1, mask=slot >= 0, other=0).to(tl.pointer_type(WEIGHTS))
    scaling = tl.load(row + 3, mask=slot >= 0, other=0).to(tl.int32).to(tl.float32, bitcast=True) * weight
    if ALIGNED:
        lora_b = tl.multiple_of(lora_b, 16)
        rank = tl.multiple_of(rank, 8)
    per_entry = num_rows // num_entries
    ranks = tl.arange(0, R)
    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    b_tile = tl.load(
        lora_b + columns.to(tl.int64)[:, None] * rank + ranks[None, :],
        mask=(columns < width)[:, None] & (ranks < rank)[None, :],
        other=0.0,
    )
    for first in range(start * per_entry + tile * BLOCK_T, stop * per_entry, tiles * BLOCK_T):
        position = first + tl.arange(0, BLOCK_T)
        live = position < stop * per_entry
        rows = _rows(position, live, is_permuted, permutation, per_entry)
        place = rows[:, None] * stride + columns[None, :]
        mask = live[:, None] & (columns < width)[None, :]
        y = tl.load(before + place, mask=mask, other=0.0)
        h_tile = tl.load(
            h + (position.to(tl.int64)[:, None] * SLICES + i) * R + ranks[None, :],
            mask=live[:, None] & (ranks < rank)[None, :],
            other=0.0,
        )
        delta = tl.dot(h_tile, tl.trans(b_tile), input_precision=PRECISION)
        tl.store(to + place, (y.to(tl.float32) + delta * scaling).to(to.dtype.element_ty), mask=mask)
