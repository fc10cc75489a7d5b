"""Plans at fixed addresses on devices, which compiled and captured graphs of kernels read."""

from __future__ import annotations

import torch

from peft_multibatch import streams
from peft_multibatch.calls.batch_plan import BatchPlan
from peft_multibatch.ops.launches import piece_for
from peft_multibatch.plan.segment_buffer import SegmentBuffer


class PlanBuffers:
    """One buffer per device and component of a plan.

    Attributes:
        by_device: the buffers of all components, by device name.
    """

    def __init__(self) -> None:
        self.by_device: dict[str, list[SegmentBuffer]] = {}
        self._outgrown: list[list[SegmentBuffer]] = []  # too small now, but captured graphs may still read them

    def grow(self, device: torch.device, entries: int, components: int) -> None:
        """Allocate buffers for plans of this many entries and components."""
        with torch.inference_mode(False):
            buffers = [SegmentBuffer(capacity_for(entries), device) for _ in range(components)]
        self.by_device[str(device)] = buffers
        for buffer in buffers:
            torch._dynamo.mark_static_address(buffer.packed)

    def follow(self) -> None:
        """Make the current streams wait for writes to the buffers on other streams."""
        for device in map(torch.device, self.by_device):
            streams.before_read(device)

    def write(self, plan: BatchPlan, components: int) -> None:
        """Copy a plan into all buffers that are large enough, and allocate larger ones if there are none."""
        entries = plan.segments.num_entries
        for buffers in list(self.by_device.values()):
            if entries > buffers[0].capacity or len(plan.components) > len(buffers):
                self._outgrown.append(buffers)
                self.grow(buffers[0].packed.device, max(entries, buffers[0].capacity), components)
        for buffers in (*self.by_device.values(), *self._outgrown):
            if entries <= buffers[0].capacity:
                device = buffers[0].packed.device
                with streams.writing(device):
                    for index, buffer in enumerate(buffers):
                        buffer.update(plan.component(index).cut(piece_for(entries)))


def capacity_for(entries: int) -> int:
    """The capacity for this many entries: a power of two, so that growing batches need few new graphs."""
    return 1 << max(entries - 1, 15).bit_length()
