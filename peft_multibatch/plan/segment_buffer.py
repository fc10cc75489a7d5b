"""Plans at fixed addresses on a device, for captured graphs."""

from __future__ import annotations

import torch

from peft_multibatch.plan.segments import HEADER, Segments


class SegmentBuffer:
    """A plan at a fixed address on a device, for captured graphs.

    The buffer never moves and never grows. ``update`` overwrites the last plan with the next one. Anything after the
    plan's own length is stale; ops get the length from the plan's header.

    Args:
        capacity: the most entries that a plan may have.
        device: the device of the buffer.
    """

    def __init__(self, capacity: int, device: torch.device | str = "cpu") -> None:
        self.capacity = capacity
        self.packed = torch.zeros(packed_size(capacity), dtype=torch.int32, device=device)

    def update(self, segments: Segments) -> None:
        """Copy a plan into the buffer. Copies only the length of the compressed plan.

        Args:
            segments: a plan of at most ``capacity`` entries; the caller allocates a larger buffer for a larger plan.
        """
        assert segments.num_entries <= self.capacity, (segments.num_entries, self.capacity)
        packed = segments.pack()
        self.packed[: packed.numel()].copy_(packed, non_blocking=True)


def packed_size(entries: int) -> int:
    """The maximum length of a packed plan with this many entries."""
    return HEADER + 3 * (entries + 1) + entries
