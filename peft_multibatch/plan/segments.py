"""Compressed adapter ids: one entry per sample in, one segment per run of equal ids out.

Segments are made once per call and don't depend on layers or weights. Every layer scales them by its number of rows
per sample.

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
"""The slot that stands for the base model."""

HEADER = 4
"""Length of a packed plan's header: num_entries, num_segments, is_permuted and a zero."""

MOST_SHAPES = 16
"""The most input sizes for which a plan caches its rows."""

RUN = 16
"""Rows per entry from which, on a CPU, one product per run of equal entries is faster than reordering rows."""


class Blocks(NamedTuple):
    """Rows for products that don't support permutations.

    Attributes:
        blocks: (slot, rows, weight) of contiguous rows with one adapter.
        order: int64 ``[T]``. The row at each position of the blocks; None if blocks are in the order of the rows.
        inverse: int64 ``[T]``. The position of each row; None likewise.
    """

    blocks: list[tuple[int, slice, float]]
    order: Tensor | None = None
    inverse: Tensor | None = None


@dataclass(frozen=True)
class Segments:
    """Which adapter serves which entries, in the compressed form that ops read.

    ``num_segments`` is the number after compression: ids ``[0, 0, 1]`` are three entries and two segments.
    Allocations, copies and launches scale with it, never with the number of entries.

    Attributes:
        weight_indices: int32 ``[G]`` on the CPU. Slot of each segment's adapter, ``-1`` for the base model.
        seg_indptr: int32 ``[G + 1]`` on the CPU. Segment ``g`` has the positions ``seg_indptr[g]:seg_indptr[g + 1]``.
        permutation: int32 ``[E]`` on the CPU. The entry at each position: ids ``[0, 1, 0, 1]`` are two segments over
            the positions of ``[0, 2, 1, 3]``. None if entries are in adapter order already.
        weights: float32 ``[G]`` on the CPU. A factor for each segment's adapter, besides its own scaling; None if all
            are 1.
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
            slots: one slot per entry, ``-1`` for the base model; a sequence or an integer tensor ``[E]``.
            lens: for packed inputs, the number of tokens of each entry; the plan then has one entry per token.
            weights: a factor for each entry's adapter; 1 by default.

        Returns:
            Segments whose slots, or pairs of slot and weight, are all different: interleaved ids are first brought
            into adapter order.

        Example:
            >>> plan = Segments.from_ids([0, 0, 1])
            >>> plan.num_entries, plan.num_segments, plan.seg_lens.tolist()
            (3, 2, [2, 1])
        """
        keys = torch.as_tensor(slots, dtype=torch.int32, device="cpu")
        if weights is not None:  # combine slot and weight into one number, with the slot in the upper half
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
        """Number of entries before compression, ``E``."""
        return int(self.seg_indptr[-1])

    @property
    def seg_lens(self) -> Tensor:
        """int32 ``[G]``: number of entries of each segment."""
        return self.seg_indptr.diff()

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(slot, start, stop) of each segment, as Python numbers."""
        bounds = self.seg_indptr.tolist()
        return list(zip(self.weight_indices.tolist(), bounds, bounds[1:]))

    @cached_property
    def scales(self) -> list[float]:
        """The factor of each segment's adapter, as Python numbers."""
        return [1.0] * self.num_segments if self.weights is None else self.weights.tolist()

    @cached_property
    def longest(self) -> int:
        """Number of entries of the longest segment."""
        return max((stop - start for _, start, stop in self.spans), default=0)

    @cached_property
    def slots(self) -> list[int]:
        """The slot of every entry, in the order of the ids: the inverse of the compression."""
        ordered = self.weight_indices.repeat_interleave(self.seg_lens)
        if self.permutation is not None:
            ordered = torch.empty_like(ordered).scatter_(0, self.permutation.long(), ordered)
        return ordered.tolist()

    def cut(self, most: int) -> Segments:
        """The same plan with segments of at most this many entries, so several segments may have the same slot.

        For launches that give every segment the same number of programs. Results are cached.
        """
        if self.longest <= most:
            return self
        found = self._cuts.get(most)
        if found is None:
            with torch.inference_mode(False):  # other calls reuse it, possibly with gradients
                found = self._cuts[most] = self._in_pieces(most)
        return found

    def _in_pieces(self, most: int) -> Segments:
        parts = (self.seg_lens + most - 1) // most
        begins = self.seg_indptr[:-1] - most * (parts.cumsum(0) - parts)  # so that adding n * most gives the n-th part
        steps = torch.arange(0, most * int(parts.sum()), most, dtype=torch.int32, device="cpu")
        seg_indptr = torch.cat([begins.repeat_interleave(parts) + steps, self.seg_indptr[-1:]]).to(torch.int32)
        weights = None if self.weights is None else self.weights.repeat_interleave(parts)
        return Segments(self.weight_indices.repeat_interleave(parts), seg_indptr, self.permutation, weights)

    def packed_on(self, device: torch.device) -> Tensor:
        """``pack``'s result on a device, cached for the current stream."""
        place = device, streams.key(device)
        found = self._packed.get(place)
        if found is None:
            with torch.inference_mode(False):  # other calls reuse it, possibly with gradients
                found = self._packed[place] = self.pack().to(device, non_blocking=True)
        return found

    def rows(self, num_rows: int, device: torch.device, layer: object = "a layer") -> list[tuple[int, slice | Tensor]]:
        """The rows of each segment in a tensor with ``T // E`` rows per entry in dimension 0.

        Beams, returned sequences and tokens all multiply a sample's rows and keep them together, so one plan serves
        every layer. Results are cached, because a decode step needs the same one in every layer.

        Args:
            num_rows: ``T``, the size of dimension 0.
            device: the device of index tensors.
            layer: the name of the layer, for messages.

        Returns:
            (slot, rows) of every segment. Rows are a slice, or an int64 tensor if there is a permutation.

        Raises:
            RowMappingError: there are several segments, and the number of rows isn't a multiple of the entries.
        """
        stream = streams.note(device)  # this stream will read the weights of these segments
        if self.num_segments == 1:
            return [(slot, slice(0, num_rows)) for slot, _, _ in self.spans]
        key = num_rows, device, stream
        found = self._rows.get(key)
        if found is None:
            if len(self._rows) >= MOST_SHAPES:  # limits memory if prompts have many different lengths
                self._rows.clear()
            per_entry = self.rows_per_entry(num_rows, layer)
            with torch.inference_mode(False):  # other calls reuse these, possibly with gradients
                found = [(slot, self._rows_at(start, stop, per_entry, device)) for slot, start, stop in self.spans]
            self._rows[key] = found
        return found

    def blocks(self, num_rows: int, device: torch.device) -> Blocks:
        """The same for products that need contiguous rows. Results are cached as well.

        If interleaved entries have many rows, they aren't reordered: every run of equal entries becomes a block, and
        an adapter may have several.

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
            with torch.inference_mode(False):  # other calls reuse these, possibly with gradients
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
        """The number of rows per entry in a tensor with this many rows.

        Args:
            num_rows: the size of dimension 0.
            layer: the name of the layer, for messages.

        Raises:
            RowMappingError: the number of rows isn't a multiple of the number of entries.
        """
        if num_rows % self.num_entries if self.num_entries else num_rows:
            raise RowMappingError(
                f"{layer} received {num_rows} rows for {self.num_entries} adapter ids, so its rows can't be mapped to "
                f"samples: expected a multiple of {self.num_entries}. Pass one id per sample. If the layer gathers or "
                "drops rows, or sees only positions, leave it out of target_modules, or give all samples of a batch "
                "the same adapter."
            )
        return num_rows // max(self.num_entries, 1)

    @cached_property
    def _rows(self) -> dict[tuple[int, torch.device, int], list[tuple[int, slice | Tensor]]]:
        return {}

    @cached_property
    def _blocks(self) -> dict[tuple[int, torch.device, int], Blocks]:
        return {}

    @cached_property
    def _cuts(self) -> dict[int, Segments]:
        return {}

    @cached_property
    def _packed(self) -> dict[tuple[torch.device, int], Tensor]:
        return {}

    def _rows_at(self, start: int, stop: int, per_entry: int, device: torch.device) -> slice | Tensor:
        if self.permutation is None:
            return slice(start * per_entry, stop * per_entry)
        entries = self.permutation[start:stop, None].long()
        return (entries * per_entry + torch.arange(per_entry, dtype=torch.int64, device="cpu")).flatten().to(device)

    def pack(self) -> Tensor:
        """The plan as one int32 tensor, which is copied to devices.

        ``[num_entries, num_segments, is_permuted, 0 | slot, first position and bits of the float32 weight of each
        segment | -1, E, 0 | permutation]``. The offsets of a segment's slot and bounds depend only on its index.
        Without a permutation, the length depends only on the number of segments.
        """
        entries, segments, is_permuted = self.num_entries, self.num_segments, self.permutation is not None
        length = HEADER + 3 * (segments + 1)
        packed = torch.empty(length + entries * is_permuted, dtype=torch.int32, device="cpu")
        found = packed.numpy()  # assignments to it take a fraction of the time
        found[:HEADER] = entries, segments, is_permuted, 0
        triples = found[HEADER:length].reshape(-1, 3)
        triples[:-1, 0] = self.weight_indices.numpy()
        triples[:-1, 1] = self.seg_indptr[:-1].numpy()
        triples[:-1, 2] = 0x3F800000 if self.weights is None else self.weights.view(torch.int32).numpy()  # 1.0
        triples[-1] = BASE, entries, 0
        if self.permutation is not None:
            found[length:] = self.permutation.numpy()
        return packed

    @classmethod
    def unpack(cls, packed: Tensor) -> Segments:
        """Restore a plan from the start of a tensor that [`pack`][peft_multibatch.Segments.pack] made."""
        num_entries, num_segments, is_permuted, _ = packed[:HEADER].tolist()
        sizes = [HEADER, 3 * (num_segments + 1), num_entries * is_permuted]
        # cloned, because a plan must not change when a SegmentBuffer is overwritten by the next call
        _, triples, permutation = packed[: sum(sizes)].cpu().clone().split(sizes)
        slots, bounds, bits = triples.view(-1, 3).t().contiguous()
        weights = bits[:-1].view(torch.float32)
        return cls(slots[:-1], bounds, permutation if is_permuted else None, None if (weights == 1).all() else weights)
