"""Plans at fixed addresses on devices, which compiled and captured graphs of kernels read."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peft_multibatch import streams
from peft_multibatch.calls.batch_plan import BatchPlan
from peft_multibatch.calls.call import Call
from peft_multibatch.ops.launches import piece_for
from peft_multibatch.plan.segment_buffer import SegmentBuffer


class PlanBuffer:
    """A component of a plan at fixed addresses on a device.

    Attributes:
        capacity: the most entries that a plan may have.
        short: the plan for inputs of few rows per entry, cut into pieces as ``piece_for`` says.
        long: the plan for inputs with ``LONG_ENTRY`` or more rows per sample in dimension 0, cut into single entries;
            if entries are tokens, which are all in one row, cut as ``short`` is.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.short, self.long = SegmentBuffer(capacity, device), SegmentBuffer(capacity, device)
        for each in (self.short, self.long):
            torch._dynamo.mark_static_address(each.packed)


class PlanBuffers:
    """One buffer per device and component of a plan.

    Attributes:
        by_device: the buffers of all components, by device name.
        has_long: whether there has been a long input, or compiled code, which may get some.
        is_compiled: whether there is compiled code, which takes all inputs of continuous batching for long ones.
        is_complete: whether the parts for long inputs have the plan that was written last as well.
    """

    def __init__(self) -> None:
        self.by_device: dict[str, list[PlanBuffer]] = {}
        self.has_long = self.is_compiled = self.is_complete = False
        self._outgrown: list[list[PlanBuffer]] = []  # too small now, but captured graphs may still read them

    def grow(self, device: torch.device, entries: int, components: int) -> None:
        """Allocate buffers for plans of this many entries and components."""
        with torch.inference_mode(False):
            self.by_device[str(device)] = [PlanBuffer(capacity_for(entries), device) for _ in range(components)]

    def follow(self) -> None:
        """Make the current streams wait for writes to the buffers on other streams."""
        for device in map(torch.device, self.by_device):
            streams.before_read(device)

    def write(self, plan: BatchPlan, components: int) -> None:
        """Copy a plan into all buffers that are large enough, and allocate larger ones if there are none.

        Only into the parts for short inputs, because steps of continuous batching need no others, and each has a plan.
        """
        entries = plan.segments.num_entries
        for buffers in list(self.by_device.values()):
            if entries > buffers[0].capacity or len(plan.components) > len(buffers):
                self._outgrown.append(buffers)
                self.grow(buffers[0].short.packed.device, max(entries, buffers[0].capacity), components)
        self.is_complete = False
        self._update(plan, lambda buffer: buffer.short, piece_for(entries))

    def complete(self, call: Call) -> None:
        """Copy a call's plan, which was written last, into the parts for long inputs as well, if it may read them."""
        if self.has_long and not self.is_complete and (self.is_compiled or not call.packed):
            most = piece_for(call.plan.segments.num_entries) if call.packed else 1
            self._update(call.plan, lambda buffer: buffer.long, most)
            self.is_complete = True

    def _update(self, plan: BatchPlan, of: Callable[[PlanBuffer], SegmentBuffer], most: int) -> None:
        for buffers in (*self.by_device.values(), *self._outgrown):
            if plan.segments.num_entries <= buffers[0].capacity:
                with streams.writing(buffers[0].short.packed.device), torch.inference_mode(False), torch.no_grad():
                    for index, buffer in enumerate(buffers):
                        of(buffer).update(plan.component(index).cut(most))


def capacity_for(entries: int) -> int:
    """The capacity for this many entries: a power of two, so that growing batches need few new graphs."""
    return 1 << max(entries - 1, 15).bit_length()
