"""Adapter ids, compressed: one entry per sample in, one segment per run of equal ids out.

The plan of a call. It knows neither layers nor weights, is made once per call from the ids of the samples, and every
layer scales it by its own number of rows per sample.

Dimension letters: ``E`` entries (samples; tokens of a packed input), ``G`` segments, ``T`` rows of a layer's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from peft_multibatch import streams
from peft_multibatch.errors import RowMappingError


BASE = -1
"""Slot of a row without adapter: the base model alone."""

HEADER = 4
"""Length of a packed plan's header: num_entries, num_segments, is_permuted and a zero."""

MOST_SHAPES = 16
"""Numbers of rows for which a plan remembers whose they are."""

CUT = 16
"""Most entries of a segment at a fixed place, as many as a kernel's program has rows at once. In a packed batch all
tokens of an adapter are one segment, and launches that read there can't know it: every piece has a program."""


RUN = 16
"""Rows of an entry from which on, on a CPU, a product for each run of equal entries costs less than putting rows in
adapter order."""


class Blocks(NamedTuple):
    """Rows as products take them that know of no permutation.

    Attributes:
        blocks: (slot, rows, weight) of rows side by side that have one adapter.
        order: int64 ``[T]``. The row at each position of the blocks; None where they stand in the order of the rows.
        inverse: int64 ``[T]``. The position of each row, likewise.
    """

    blocks: list[tuple[int, slice, float]]
    order: Tensor | None = None
    inverse: Tensor | None = None


@dataclass(frozen=True)
class Segments:
    """Which adapter serves which entries, in the compressed form that ops work on.

    ``num_segments`` is the number after compression: ids ``[0, 0, 1]`` are three entries and two segments. Whatever is
    sized, copied or launched per adapter in use is sized by it, never by the number of entries.

    Attributes:
        weight_indices: int32 ``[G]`` on the CPU. Slot of each segment's adapter, ``-1`` for the base model alone.
        seg_indptr: int32 ``[G + 1]`` on the CPU. Segment ``g`` has the positions ``seg_indptr[g]:seg_indptr[g + 1]``.
        permutation: int32 ``[E]`` on the CPU, or None where entries stand in adapter order as they came. The entry at
            each position: ids ``[0, 1, 0, 1]`` are two segments over the positions of ``[0, 2, 1, 3]``.
        weights: float32 ``[G]`` on the CPU. What each segment's adapter counts, beside its own scaling; None where all
            count in full.
    """

    weight_indices: Tensor
    seg_indptr: Tensor
    permutation: Tensor | None = None
    weights: Tensor | None = None

    @classmethod
    def from_ids(
        cls,
        slots: Sequence[int] | Tensor,
        lens: Sequence[int] | Tensor | None = None,
        weights: Sequence[float] | None = None,
    ) -> Segments:
        """Compress the slots of a call's entries.

        Args:
            slots: one slot per entry, ``-1`` for the base model alone; a sequence or an integer tensor ``[E]``.
            lens: for packed inputs, the number of tokens of each entry; the plan then has an entry per token.
            weights: what each entry's adapter counts; 1 for all where it isn't given.

        Returns:
            Segments whose slots, or pairs of slot and weight, are all different: interleaved ids are put in adapter
            order first.

        Example:
            >>> plan = Segments.from_ids([0, 0, 1])
            >>> plan.num_entries, plan.num_segments, plan.seg_lens.tolist()
            (3, 2, [2, 1])
        """
        keys = torch.as_tensor(slots, dtype=torch.int32, device="cpu")
        if weights is not None:  # a slot and a weight are one number, whose upper half is the slot
            bits = torch.as_tensor(weights, dtype=torch.float32, device="cpu").view(torch.int32)
            keys = torch.stack([bits, keys], dim=1).view(torch.int64).flatten()
        if lens is not None:
            keys = keys.repeat_interleave(torch.as_tensor(lens, dtype=torch.int64, device="cpu"))
        distinct, seg_lens = torch.unique_consecutive(keys, return_counts=True)
        permutation = None
        if distinct.unique().numel() < distinct.numel():
            ordered, order = torch.sort(keys, stable=True)
            distinct, seg_lens = torch.unique_consecutive(ordered, return_counts=True)
            permutation = order.to(torch.int32)
        seg_indptr = torch.zeros(seg_lens.numel() + 1, dtype=torch.int32, device="cpu")
        torch.cumsum(seg_lens, 0, out=seg_indptr[1:])
        if weights is None:
            return cls(distinct, seg_indptr, permutation)
        bits, weight_indices = distinct.view(-1, 1).view(torch.int32).t().contiguous()
        return cls(weight_indices, seg_indptr, permutation, bits.view(torch.float32))

    @property
    def num_segments(self) -> int:
        """Number of segments after compression, ``G``; at most ``E``."""
        return self.weight_indices.numel()

    @cached_property
    def num_entries(self) -> int:
        """Number of entries that were compressed, ``E``."""
        return int(self.seg_indptr[-1])

    @property
    def seg_lens(self) -> Tensor:
        """int32 ``[G]``: number of entries of each segment."""
        return self.seg_indptr.diff()

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(slot, first position, position after the last) of each segment, as plain numbers."""
        bounds = self.seg_indptr.tolist()
        return list(zip(self.weight_indices.tolist(), bounds, bounds[1:]))

    @cached_property
    def scales(self) -> list[float]:
        """What each segment's adapter counts, as plain numbers."""
        return [1.0] * self.num_segments if self.weights is None else self.weights.tolist()

    @cached_property
    def longest(self) -> int:
        """Number of entries of the longest segment."""
        return max((stop - start for _, start, stop in self.spans), default=0)

    @cached_property
    def slots(self) -> list[int]:
        """The slot of every entry, in the order in which the ids came: the inverse of the compression."""
        ordered = self.weight_indices.repeat_interleave(self.seg_lens)
        if self.permutation is not None:
            ordered = torch.empty_like(ordered).scatter_(0, self.permutation.long(), ordered)
        return ordered.tolist()

    def cut(self, most: int) -> Segments:
        """The same plan with segments of at most this many entries, several of which may have one slot.

        For launches that are as large as any plan needs: each segment has few programs there, however long it is.
        """
        if self.longest <= most:
            return self
        parts = (self.seg_lens + most - 1) // most
        begins = self.seg_indptr[:-1] - most * (parts.cumsum(0) - parts)  # so that the n-th part begins n * most later
        steps = torch.arange(0, most * int(parts.sum()), most, dtype=torch.int32, device="cpu")
        seg_indptr = torch.cat([begins.repeat_interleave(parts) + steps, self.seg_indptr[-1:]]).to(torch.int32)
        weights = None if self.weights is None else self.weights.repeat_interleave(parts)
        return Segments(self.weight_indices.repeat_interleave(parts), seg_indptr, self.permutation, weights)

    def rows(self, num_rows: int, device: torch.device, layer: object = "a layer") -> list[tuple[int, slice | Tensor]]:
        """The rows of each segment in a tensor whose dimension 0 holds the entries' rows, ``T // E`` for every entry.

        Beams, returned sequences and tokens all multiply a sample's rows and keep them together, so that one plan
        serves every layer. The result is kept: a decode step asks for the same one at every layer.

        Args:
            num_rows: ``T``, the size of dimension 0.
            device: where index tensors are wanted.
            layer: how messages name what has the rows.

        Returns:
            (slot, rows) of every segment. Rows are a slice, which costs nothing, or an int64 tensor where a
            permutation is in force.

        Raises:
            RowMappingError: the number of rows is no multiple of the number of entries, of which there are several
                kinds.
        """
        stream = streams.note(device)  # which will read the weights of these segments
        if self.num_segments == 1:
            return [(slot, slice(0, num_rows)) for slot, _, _ in self.spans]
        key = num_rows, device, stream
        found = self._rows.get(key)
        if found is None:
            if len(self._rows) >= MOST_SHAPES:  # prompts of ever new lengths must not fill the memory
                self._rows.clear()
            per_entry = self.rows_per_entry(num_rows, layer)
            with torch.inference_mode(False):  # kept for other calls, which may want gradients
                found = [(slot, self._rows_at(start, stop, per_entry, device)) for slot, start, stop in self.spans]
            self._rows[key] = found
        return found

    def blocks(self, num_rows: int, device: torch.device) -> Blocks:
        """The same for products that read rows side by side only. The result is kept as well.

        Interleaved entries of many rows are not reordered: every run of equal ones is a block of its own, so that an
        adapter has several.

        Args:
            num_rows: as in ``rows``.
            device: as in ``rows``.

        Raises:
            RowMappingError: as in ``rows``.
        """
        key = num_rows, device, streams.note(device)
        found = self._blocks.get(key)
        if found is None:
            if len(self._blocks) >= MOST_SHAPES:
                self._blocks.clear()
            found = self._blocks[key] = self._find_blocks(num_rows, device)
        return found

    def _find_blocks(self, num_rows: int, device: torch.device) -> Blocks:
        if self.permutation is None:
            found = zip(self.rows(num_rows, device), self.scales)
            return Blocks([(slot, rows, scale) for (slot, rows), scale in found if isinstance(rows, slice)])
        per_entry = self.rows_per_entry(num_rows)
        if per_entry < RUN:
            with torch.inference_mode(False):  # kept for other calls, which may want gradients
                order = self._rows_at(0, self.num_entries, per_entry, device)
                assert isinstance(order, Tensor)
                blocks = [
                    (slot, slice(start * per_entry, stop * per_entry), scale)
                    for (slot, start, stop), scale in zip(self.spans, self.scales)
                ]
                return Blocks(blocks, order, order.argsort())
        of_entry = torch.empty_like(self.permutation)
        numbers = torch.arange(self.num_segments, dtype=torch.int32, device="cpu")
        of_entry[self.permutation.long()] = numbers.repeat_interleave(self.seg_lens)
        runs, lens = torch.unique_consecutive(of_entry, return_counts=True)
        ends = (lens.cumsum(0) * per_entry).tolist()
        return Blocks(
            [
                (self.spans[number][0], slice(start, stop), self.scales[number])
                for number, start, stop in zip(runs.tolist(), [0, *ends], ends)
            ]
        )

    def rows_per_entry(self, num_rows: int, layer: object = "a layer") -> int:
        """Rows of every entry in a tensor of this many rows.

        Args:
            num_rows: the size of dimension 0.
            layer: how messages name what has the rows.

        Raises:
            RowMappingError: the number of rows is no multiple of the number of entries.
        """
        if num_rows % max(self.num_entries, 1):
            raise RowMappingError(
                f"{layer} received {num_rows} rows for {self.num_entries} adapter ids, and can't tell which rows "
                f"belong to which sample: expected a multiple of {self.num_entries}. Pass one id for every sample of "
                "the batch; leave a layer that gathers or drops rows, or sees positions alone, out of target_modules, "
                "or give all samples of a batch the same adapter."
            )
        return num_rows // max(self.num_entries, 1)

    @cached_property
    def _rows(self) -> dict[tuple[int, torch.device, int], list[tuple[int, slice | Tensor]]]:
        return {}

    @cached_property
    def _blocks(self) -> dict[tuple[int, torch.device, int], Blocks]:
        return {}

    def _rows_at(self, start: int, stop: int, per_entry: int, device: torch.device) -> slice | Tensor:
        if self.permutation is None:
            return slice(start * per_entry, stop * per_entry)
        entries = self.permutation[start:stop, None].long()
        return (entries * per_entry + torch.arange(per_entry, dtype=torch.int64, device="cpu")).flatten().to(device)

    def pack(self) -> Tensor:
        """The plan as one int32 tensor, the form in which it travels to a device.

        ``[num_entries, num_segments, is_permuted, 0 | slot, first position and bits of the float32 weight of each
        segment | -1, E, 0 | permutation]``. A kernel finds a segment's slot and bounds at places that depend on
        nothing else. Without the permutation the length depends on the number of segments alone.
        """
        is_permuted = self.permutation is not None
        header = torch.tensor([self.num_entries, self.num_segments, is_permuted, 0], dtype=torch.int32, device="cpu")
        weights = torch.tensor(self.scales, dtype=torch.float32, device="cpu")
        triples = torch.zeros(self.num_segments + 1, 3, dtype=torch.int32, device="cpu")
        triples[:-1, 0], triples[-1, 0] = self.weight_indices, BASE
        triples[:, 1] = self.seg_indptr
        triples[:-1, 2] = weights.view(torch.int32)
        permutation = [] if self.permutation is None else [self.permutation]
        return torch.cat([header, triples.flatten(), *permutation])

    @classmethod
    def unpack(cls, packed: Tensor) -> Segments:
        """Read a plan back from the beginning of what [`pack`][peft_multibatch.Segments.pack] wrote."""
        num_entries, num_segments, is_permuted, _ = packed[:HEADER].tolist()
        sizes = [HEADER, 3 * (num_segments + 1), num_entries * is_permuted]
        # cloned, because a plan must not change when persistent buffers are written for the next call
        _, triples, permutation = packed[: sum(sizes)].cpu().clone().split(sizes)
        slots, bounds, bits = triples.view(-1, 3).t().contiguous()
        weights = bits[:-1].view(torch.float32)
        return cls(slots[:-1], bounds, permutation if is_permuted else None, None if (weights == 1).all() else weights)


class SegmentBuffer:
    """A plan at a fixed place on a device, which is what captured graphs read.

    The buffer never moves and never grows. ``update`` writes the next call's plan over the last one's; what lies
    behind the written part is stale and must not be read, which ops know from the plan's header.

    Args:
        capacity: most entries that a plan may have.
        device: where the buffer lives.
    """

    def __init__(self, capacity: int, device: torch.device | str = "cpu") -> None:
        self.capacity = capacity
        self.packed = torch.zeros(packed_size(capacity), dtype=torch.int32, device=device)

    def update(self, segments: Segments) -> None:
        """Write a plan into the buffer: one copy, of the length of the compressed plan.

        Args:
            segments: a plan of at most ``capacity`` entries; the caller makes a larger buffer for a larger plan.
        """
        assert segments.num_entries <= self.capacity, (segments.num_entries, self.capacity)
        packed = segments.pack()
        self.packed[: packed.numel()].copy_(packed, non_blocking=True)


def packed_size(entries: int) -> int:
    """Length that no packed plan of this many entries exceeds."""
    return HEADER + 3 * (entries + 1) + entries


def capacity_for(entries: int) -> int:
    """A power of two, so that a growing batch makes a new graph a few times and not every time."""
    return 1 << max(entries - 1, 15).bit_length()
