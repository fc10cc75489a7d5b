"""The Triton kernels of training: forward that keeps ``h``, and backward, a launch each for any mix of adapters.

    shrink       h_i = x @ A_i.T              dS_i = s_i · dY_i @ B_i
    expand       y_i + s_i · h_i @ B_i.T
    grad_x       dX = Σ_i dS_i @ A_i
    grad_weight  dA_i = dS_i.T @ x            dB_i = s_i · dY_i.T @ h_i

``h`` and ``dS`` stand in adapter order, so that a tile of them is one piece of memory; ``x``, ``y`` and their
gradients stand as they came, and no copy of them is made in another order. Every sum is one program's, from the first
row or column to the last: the same input gives the same bits.

Tiles have at most 32 rows where operands are converted in registers: ptxas 12.8, which Triton 3.6 brings along,
miscompiles such products from 64 rows on (triton #9433).
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_multibatch.ops.triton_kernels import _rows, _segment


@triton.jit
def _slice_of(block, blocks0, blocks1, SLICES: tl.constexpr):
    """The slice to which a block of columns belongs, and which of the slice's blocks it is."""
    i = 0
    if SLICES > 1:
        i += tl.where(block >= blocks0, 1, 0)
    if SLICES > 2:
        i += tl.where(block >= blocks0 + blocks1, 1, 0)
    return i, block - tl.where(i > 0, blocks0, 0) - tl.where(i > 1, blocks1, 0)


@triton.jit
def _pick(i, value0, value1, value2, SLICES: tl.constexpr):
    """What belongs to a slice."""
    value = value0
    if SLICES > 1:  # noqa: SIM102, a constant, which decides at compile time
        if i == 1:
            value = value1
    if SLICES > 2:  # noqa: SIM102
        if i == 2:
            value = value2
    return value


@triton.jit(do_not_specialize=["num_rows", "tiles"])
def shrink_kernel(
    out,  # [T, SLICES, R]: h, or dS
    in0,
    in1,
    in2,  # [T, C] of each slice: x, or dY; repeated where there are fewer
    plan,
    table,  # int64 [S, SLICES, 4]
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
    BLOCK_C: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (segments × tiles of rows × slices). Slices come first, so that what they share is read once."""
    i = tl.program_id(0) % SLICES
    tile = tl.program_id(0) // SLICES % tiles
    index = tl.program_id(0) // (SLICES * tiles)
    num_entries, _, is_permuted, permutation, slot, start, stop, weight = _segment(plan, index)
    per_entry = num_rows // num_entries
    first = start * per_entry + tile * BLOCK_T
    if slot < 0 or first >= stop * per_entry:
        return
    row = table + (slot.to(tl.int64) * SLICES + i) * 4
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
        total = tl.dot(tile_in.to(WEIGHTS), tile_w, total, input_precision=PRECISION)
    if IS_BACKWARD:
        total *= tl.load(row + 3).to(tl.int32).to(tl.float32, bitcast=True) * weight
    place = out + (position.to(tl.int64)[:, None] * SLICES + i) * R + ranks[None, :]
    tl.store(place, total.to(WEIGHTS), mask=live[:, None])


@triton.jit(do_not_specialize=["num_rows", "tiles"])
def expand_kernel(
    to0,
    to1,
    to2,  # [T, N] of each slice: what is written
    from0,
    from1,
    from2,  # what it is added to; the same tensors where that happens in place
    h,  # [T, SLICES, R]
    plan,
    table,
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
    BLOCK_C: tl.constexpr,
    IN_PLACE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (segments × programs that share a segment's rows, blocks of columns of all slices together)."""
    index, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i, block = _slice_of(tl.program_id(1), tl.cdiv(width0, BLOCK_C), tl.cdiv(width1, BLOCK_C), SLICES)
    num_entries, _, is_permuted, permutation, slot, start, stop, weight = _segment(plan, index)
    row = table + (slot.to(tl.int64) * SLICES + i) * 4
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


@triton.jit(do_not_specialize=["num_rows", "tiles"])
def grad_x_kernel(
    dx,  # [T, K]
    ds,  # [T, SLICES, R]
    plan,
    table,
    num_rows,
    num_inputs,
    stride,
    tiles,
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
    """Grid: (segments × tiles of rows, blocks of columns). Rows without adapter get zeros, unless ``IN_PLACE``."""
    index, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    num_entries, _, is_permuted, permutation, slot, start, stop, _ = _segment(plan, index)
    per_entry = num_rows // num_entries
    first = start * per_entry + tile * BLOCK_T
    if first >= stop * per_entry:
        return
    if IN_PLACE:  # noqa: SIM102
        if slot < 0:
            return
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    position = first + tl.arange(0, BLOCK_T)
    live = position < stop * per_entry
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for i in tl.static_range(SLICES):
        row = table + (slot.to(tl.int64) * SLICES + i) * 4
        lora_a = tl.load(row, mask=slot >= 0, other=0).to(tl.pointer_type(WEIGHTS))
        rank = tl.load(row + 2, mask=slot >= 0, other=0).to(tl.int32)
        if ALIGNED:
            lora_a = tl.multiple_of(lora_a, 16)
        if rank > 0:
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
    rows = _rows(position, live, is_permuted, permutation, per_entry)
    place = dx + rows[:, None] * stride + columns[None, :]
    mask = live[:, None] & (columns < num_inputs)[None, :]
    if IN_PLACE:
        total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, total.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def grad_weight_kernel(
    grads,  # flat, of the dtype of the weights
    offsets,  # int64 [S, SLICES, 2]: where the gradients of lora_A and lora_B begin; -1: not wanted
    left,  # [T, SLICES, R]: dS, or h
    in0,
    in1,
    in2,  # [T, C] of each slice: x, or dY
    plan,
    table,
    num_rows,
    width0,
    width1,
    width2,
    stride0,
    stride1,
    stride2,
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

    With ``REPEATS`` an adapter may have several segments, of mixtures: the first one's program sums up all of them.
    """
    index = tl.program_id(1)
    i, block = _slice_of(tl.program_id(0), tl.cdiv(width0, BLOCK_C), tl.cdiv(width1, BLOCK_C), SLICES)
    num_entries, num_segments, is_permuted, permutation, slot, start, stop, weight = _segment(plan, index)
    if slot < 0:
        return
    row = table + (slot.to(tl.int64) * SLICES + i) * 4
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
