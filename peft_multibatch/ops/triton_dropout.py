"""Dropout inside kernels: the masks that ``dropout`` describes, computed for each tile of the input."""

from __future__ import annotations

import triton
import triton.language as tl

from peft_multibatch.ops import dropout


ROUNDS = tl.constexpr(dropout.ROUNDS)


@triton.jit
def drop_row(drops, steps, slot, i, SLICES: tl.constexpr):
    """The key, step and threshold of a slot's mask in a slice. Slot -1 drops nothing."""
    row = drops + (slot.to(tl.int64) * SLICES + i) * 3
    key = tl.load(row, mask=slot >= 0, other=0)
    threshold = tl.load(row + 1, mask=slot >= 0, other=0).to(tl.int32)
    step = tl.load(steps + slot, mask=slot >= 0, other=0)
    return key, step, threshold


@triton.jit
def drop_scale(drops, slot, i, SLICES: tl.constexpr):
    """The factor for the elements that a slot keeps in a slice."""
    bits = tl.load(drops + (slot.to(tl.int64) * SLICES + i) * 3 + 2)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def keep_tile(key, step, threshold, position, start, per_entry, block, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which elements of a tile of ``x`` are kept.

    Its rows are at ``position`` in adapter order, in a segment that starts at the entry ``start``; its columns are a
    block of ``BLOCK_C``.
    """
    entry = position // per_entry
    row, sample = position - entry * per_entry, entry - start
    octets = block * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    word0, word1, word2, word3 = tl.philox(key, octets[None, :], row[:, None], sample[:, None], step, ROUNDS)
    words = tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), (BLOCK_T, BLOCK_C // 2))
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK_T, BLOCK_C))
    return halves.to(tl.int32) >= threshold
