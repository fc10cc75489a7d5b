"""Dropout masks that are computed instead of stored, from numbers that belong to the adapter.

Philox4x32-7, a function of a key and a counter, determines whether an element of ``x`` is dropped:

    key      64 bits, from the adapter's seed, its name and the layer's name
    counter  column // 8, row within the sample, index of the sample among the adapter's own, the adapter's step

None of these depends on the rest of a batch, or on the order of its samples, so an adapter has the same masks as in a
run of its own. Forward, backward and recomputation in checkpoints compute the same masks. A counter gives four words,
and each serves two columns with 16 bits each; probabilities are rounded to multiples of 2 ** -16.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011); seven rounds are the fewest that pass all
tests of BigCrush.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


ROUNDS = 7
LOW = 0xFFFFFFFF
LARGEST_KEY = (1 << 64) - 1
CHUNK = 1 << 16  # counters computed at once, so that they stay in a CPU's cache


class Mask(NamedTuple):
    """The dropout mask of one adapter in one layer and one call.

    Attributes:
        key: Philox's key, 64 bits.
        step: the adapter's step.
        p: the probability that an element is dropped.
    """

    key: int
    step: int
    p: float

    @property
    def threshold(self) -> int:
        """An element is dropped if its 16 bits are less than this."""
        return round(self.p * (1 << 16))

    @property
    def scale(self) -> float:
        """The factor for elements that are kept."""
        return 0.0 if self.p == 1 else 1 / (1 - self.p)


Masks = Mapping[tuple[int, int], Mask]
"""The masks of one product, by slot and slice."""


class DropTable(NamedTuple):
    """The masks of one product as kernels read them.

    Attributes:
        rows: int64 ``[S, I, 3]``: key, threshold, bits of the float32 scale.
        steps: int32 ``[S]``, the step of each slot.
    """

    rows: Tensor
    steps: Tensor


def dropped(
    parts: Sequence[tuple[int, Sequence[Mask | None]]], per_entry: int, num_columns: int, device: torch.device
) -> Tensor:
    """Which elements are dropped, computed for all adapters at once.

    Args:
        parts: the number of rows of each adapter in the call, and its mask in each slice, or None.
        per_entry: rows per sample.
        num_columns: ``K``.
        device: the device of the result.

    Returns:
        bool ``[T, I, K]``, with the rows of one adapter after those of the previous one.
    """
    numbers, samples = [], []
    for number, masks in parts:
        numbers.append([_numbers(mask) for mask in masks])
        samples.append(torch.arange(number, dtype=torch.int64, device="cpu"))
    counts = torch.tensor([number for number, _ in parts], dtype=torch.int64, device="cpu")
    of_rows = torch.tensor(numbers, dtype=torch.int64, device="cpu").repeat_interleave(counts, 0).to(device)
    rows = torch.cat(samples).to(device)[:, None, None]
    samples_of_rows = rows.div(max(per_entry, 1), rounding_mode="floor")
    positions = rows - samples_of_rows * per_entry
    octets = torch.arange(-(-num_columns // 8), dtype=torch.int64, device=device)
    num_rows, slices = of_rows.shape[:2]
    found = torch.empty(num_rows, slices, len(octets), 8, dtype=torch.bool, device=device)
    chunk = CHUNK if device.type == "cpu" else 256 * CHUNK
    size = max(1, chunk // max(slices * len(octets), 1))
    for first in range(0, num_rows, size):
        own = slice(first, first + size)
        low, high, step, threshold = of_rows[own].unsqueeze(2).unbind(-1)
        words = philox(low, high, octets, positions[own], samples_of_rows[own], step)
        upper = threshold << 16
        for index, word in enumerate(words):
            torch.lt(word & 0xFFFF, threshold, out=found[own, ..., 2 * index])
            torch.lt(word, upper, out=found[own, ..., 2 * index + 1])
    return found.view(num_rows, slices, 8 * len(octets))[..., :num_columns]


def philox(
    low: Tensor, high: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32, as ``triton.language.philox`` computes it.

    Args:
        low: lower half of the keys; int64 and less than 2 ** 32, like all other arguments.
        high: upper half of the keys.
        c0: first word of the counters.
        c1: second word.
        c2: third word.
        c3: fourth word.
        rounds: the number of rounds; at least 3.

    Returns:
        The four words, int64 and less than 2 ** 32, of the shape to which the arguments broadcast.
    """
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2 ** 64; higher bits aren't used
        c0, c1 = ((b >> 32) ^ c1 ^ low).bitwise_and_(LOW), b
        c2, c3 = ((a >> 32) ^ c3 ^ high).bitwise_and_(LOW), a
        low, high = (low + 0x9E3779B9) & LOW, (high + 0xBB67AE85) & LOW
    return c0, c1 & LOW, c2, c3 & LOW


def _numbers(mask: Mask | None) -> tuple[int, int, int, int]:
    """Lower and upper half of the key, step and threshold."""
    return (0, 0, 0, 0) if mask is None else (mask.key & LOW, mask.key >> 32, mask.step & LOW, mask.threshold)


def table_rows(masks: Masks, slots: int, slices: int, device: torch.device) -> Tensor:
    """``DropTable.rows``; slots without a mask keep everything, with a factor of 1."""
    rows = torch.zeros(slots, slices, 3, dtype=torch.int64, device="cpu")
    rows[..., 2] = _bits(1.0)
    for place, mask in masks.items():
        signed = mask.key - (1 << 64) if mask.key >> 63 else mask.key
        rows[place] = torch.tensor([signed, mask.threshold, _bits(mask.scale)], dtype=torch.int64, device="cpu")
    return rows.to(device, non_blocking=True)


def _bits(number: float) -> int:
    return int(torch.tensor(number, dtype=torch.float32, device="cpu").view(torch.int32))
