"""Plans at fixed places on devices, which compiled and captured graphs of kernels read."""

from __future__ import annotations

import torch

from peft_multibatch import streams
from peft_multibatch.calls.batch_plan import BatchPlan
from peft_multibatch.errors import ModelStateError
from peft_multibatch.plan.segments import CUT, SegmentBuffer, capacity_for


class PlanBuffers:
    """For each device a buffer for every component that a plan may have.

    Attributes:
        by_device: the buffers, by the name of their device.
    """

    def __init__(self) -> None:
        self.by_device: dict[str, list[SegmentBuffer]] = {}
        self._outgrown: list[list[SegmentBuffer]] = []  # which captured graphs may still read

    def grow(self, device: torch.device, entries: int, components: int) -> None:
        """Make buffers for plans of this many entries and components."""
        with torch.inference_mode(False):
            buffers = [SegmentBuffer(capacity_for(entries), device) for _ in range(components)]
        self.by_device[str(device)] = buffers
        for buffer in buffers:
            torch._dynamo.mark_static_address(buffer.packed)

    def follow(self) -> None:
        """The current streams read what stands here, which may have been written on others."""
        for device in map(torch.device, self.by_device):
            streams.before_read(device)

    def write(self, plan: BatchPlan, components: int, is_captured: bool) -> None:
        """Put a plan into all buffers that are large enough, and make larger ones where there are none.

        Raises:
            ModelStateError: graphs were captured that read fewer components.
        """
        entries = plan.segments.num_entries
        for buffers in list(self.by_device.values()):
            if is_captured and len(plan.components) > len(buffers):
                raise ModelStateError(
                    f"a CUDA graph was captured under ids that gave a sample {len(buffers)} adapters at most, and "
                    f"now a mixture has {len(plan.components)}: expected mixtures as long as those that were in "
                    "force when it was captured. Call disable and enable, and capture it again."
                )
            if entries > buffers[0].capacity or len(plan.components) > len(buffers):
                self._outgrown.append(buffers)
                self.grow(buffers[0].packed.device, max(entries, buffers[0].capacity), components)
        for buffers in (*self.by_device.values(), *self._outgrown):
            if entries <= buffers[0].capacity:
                device = buffers[0].packed.device
                with streams.writing(device):
                    for index, buffer in enumerate(buffers):
                        buffer.update(plan.component(index).cut(CUT))
