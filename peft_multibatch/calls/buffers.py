"""Plans at fixed addresses on devices, which compiled and captured graphs of kernels read."""

from __future__ import annotations

import torch

from peft_multibatch import streams
from peft_multibatch.calls.batch_plan import BatchPlan
from peft_multibatch.ops.launches import piece_for
from peft_multibatch.plan.segment_buffer import SegmentBuffer


class PlanBuffers:
    """One buffer per component of a plan, for each device and kind of input.

    Attributes:
        by_place: the buffers of all components, by device name and whether they are for inputs with ``LONG_ENTRY`` or
            more rows per entry, whose plans are cut into single entries.
    """

    def __init__(self) -> None:
        self.by_place: dict[tuple[str, bool], list[SegmentBuffer]] = {}
        # too small now, but captured graphs may still read them
        self._outgrown: list[tuple[tuple[str, bool], list[SegmentBuffer]]] = []

    def grow(self, place: tuple[str, bool], entries: int, components: int) -> None:
        """Allocate buffers for plans of this many entries and components."""
        with torch.inference_mode(False):
            buffers = [SegmentBuffer(capacity_for(entries), place[0]) for _ in range(components)]
        self.by_place[place] = buffers
        for buffer in buffers:
            torch._dynamo.mark_static_address(buffer.packed)

    def follow(self) -> None:
        """Make the current streams wait for writes to the buffers on other streams."""
        for device in {device for device, _ in self.by_place}:
            streams.before_read(torch.device(device))

    def write(self, plan: BatchPlan, components: int) -> None:
        """Copy a plan into all buffers that are large enough, and allocate larger ones if there are none."""
        entries = plan.segments.num_entries
        for place, buffers in list(self.by_place.items()):
            if entries > buffers[0].capacity or len(plan.components) > len(buffers):
                self._outgrown.append((place, buffers))
                self.grow(place, max(entries, buffers[0].capacity), components)
        for (device, is_long), buffers in (*self.by_place.items(), *self._outgrown):
            if entries <= buffers[0].capacity:
                with streams.writing(torch.device(device)):
                    for index, buffer in enumerate(buffers):
                        buffer.update(plan.component(index).cut(1 if is_long else piece_for(entries)))


def capacity_for(entries: int) -> int:
    """The capacity for this many entries: a power of two, so that growing batches need few new graphs."""
    return 1 << max(entries - 1, 15).bit_length()
