"""Tables of weights that belong to no model."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from peft_multibatch.adapters.adapter import serials
from peft_multibatch.adapters.tables import Tables


ALL = {None, torch.float16, torch.bfloat16, torch.float32, torch.float64}


def make_table(dtype, slots, slices, device):
    """Make a table behind another one, as in models, so that slots aren't next to each other in memory."""
    memory, device = Tables(), torch.empty(0, device=device).device  # with its index
    first = memory.make(dtype, slots, ["other layer"], {dtype}, device)
    table = memory.make(dtype, slots, [f"layer {i}" for i in range(slices)], ALL, device)
    assert table.first == 1
    table.others = memory, first
    return table


def update(table, parts):
    """Write weights, by slot."""

    def adapter(slot, row):
        def parts_in(layers):
            return row if layers == table.layers else None

        serial = next(serials)
        return SimpleNamespace(serial=serial, rows=lambda block: block.read(slot, serial, parts_in))

    table.block.write({slot: adapter(slot, row) for slot, row in parts.items()})
