"""The weights that a batch reads: PEFT's own tensors, found again whenever PEFT holds others.

A bank is one projection group, an adapter is one slot. Neither owns weights nor copies any. An ``Adapter`` remembers
what it found in PEFT's dictionaries and where, and a call begins by comparing all of that with what is there now, so
that whatever happened since the last call (an optimizer step, ``.data`` written in place or replaced, ``set_scale``, a
hot-swap, ``.to()``, another adapter under the same name) is what the next call computes with.
docs/explanation/bank.md says why weights aren't stacked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_multibatch.adapters.offload import loader
from peft_multibatch.adapters.shards import own, split_of
from peft_multibatch.adapters.tables import Part, SlotWeights, Table, TableRows, dtype_of
from peft_multibatch.adapters.weights import Adapter
from peft_multibatch.compat import dequantize_module_weight
from peft_multibatch.errors import ModelStateError


if TYPE_CHECKING:
    from peft_multibatch.compat import LoraLayer


class Bank:
    """One projection group: the LoRA layers whose adapters run as one product.

    Args:
        layers: the group's LoRA layers, one a slice, in the order of their outputs.
    """

    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        self.key = f"bank {next(_keys)}"  # a number might become a variable of a graph
        self.layers = tuple(layers)
        self.splits = [split_of(layer) for layer in layers]
        self.is_split = any(self.splits)
        self.widths = [
            layer.out_features if split is None else len(own(layer.get_base_layer().weight))
            for layer, split in zip(layers, self.splits)
        ]
        self.slice_offsets = [0, *accumulate(self.widths)]
        # What graphs of ops read. Written by `sync`: PEFT's tensors slot by slot, and their ranks and scalings.
        self.lora_a: list[Tensor] = []
        self.lora_b: list[Tensor] = []
        self.ranks: Tensor | None = None
        self.scalings: Tensor | None = None
        # What graphs of kernels read. Written by `hold`.
        self.held: tuple[TableRows, ...] = ()
        self._tables: dict[torch.device, dict[torch.dtype | None, Table]] = {}
        self._slots = 0
        # What `tables` was last called for and what it gave: mixes differ more often than adapters.
        self._last: dict[torch.device, tuple[dict[int, Adapter], int, tuple[TableRows, ...]]] = {}
        # Whose rows the tables hold, and for whom graphs can read them.
        self._rows: dict[torch.device, dict[int, Adapter]] = {}
        self._held_for: dict[torch.device, dict[int, Adapter]] = {}

    def weights(self, adapter: Adapter) -> SlotWeights:
        """An adapter's parts as torch's products take them: transposed, still PEFT's own memory."""
        # of `.data`, because a view keeps its base from being swapped
        return [
            part and (part.lora_a.data.t(), part.lora_b.data.t(), part.scaling) for part in adapter.parts(self.layers)
        ]

    def has_variants(self) -> bool:
        """Whether any adapter here is a DoRA adapter, the one of `KNOWN_VARIANTS`."""
        return any(layer.lora_variant for layer in self.layers)

    def dora_scales(self, adapters: Mapping[int, Adapter]) -> list[Tensor | None]:
        """For each slice what DoRA multiplies outputs with, ``[S + 1, N]``, the last row for the base model alone.

        The magnitudes over the norms of the adapted weights, 1 for adapters without DoRA; None where nobody has it.
        Computed anew from the weights as they are, because nothing shows that they were written in place.
        """
        found: list[Tensor | None] = []
        for layer in self.layers:
            if not any(adapter.name in layer.lora_variant for adapter in adapters.values()):
                found.append(None)
                continue
            if any(parameter.is_meta for parameter in layer.parameters()):
                raise ModelStateError(
                    "a layer with a DoRA adapter is offloaded, and DoRA reads base weights and magnitudes apart from "
                    "their modules' forwards, which PEFT can't do there either: expected them on a real device. Leave "
                    "layers with DoRA adapters out of what is offloaded."
                )
            weight = dequantize_module_weight(layer.base_layer)
            weight = weight.t() if layer.fan_in_fan_out else weight
            rows = []
            for adapter in adapters.values():
                (part,) = adapter.parts([layer])
                if part is None or adapter.name not in layer.lora_variant:
                    rows.append(torch.ones(len(weight), dtype=weight.dtype, device=weight.device))
                    continue
                with torch.no_grad():  # the norm counts as a constant in DoRA's gradients
                    delta = part.lora_b @ part.lora_a * part.scaling
                    norm = torch.linalg.norm(weight.to(delta.dtype) + delta, dim=1)
                rows.append(layer.lora_magnitude_vector[adapter.name].weight / norm)
            rows.append(torch.ones(len(weight), dtype=weight.dtype, device=weight.device))
            found.append(torch.stack(rows))
        return found

    def gather(self, adapters: Iterable[Adapter | None]) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """What the ops take for these adapters: ``lora_A``, ``lora_B``, ranks ``[S, I]`` and scalings ``[S, I]``.

        Both lists have ``S * I`` entries; those of an adapter that lacks a slice have rank 0.
        """
        parts = [
            part or self._absent(layer)
            for adapter in adapters
            for layer, part in zip(self.layers, adapter.parts(self.layers) if adapter else [None] * len(self.layers))
        ]
        shape = -1, len(self.layers)
        ranks = torch.tensor([len(part.lora_a) for part in parts], dtype=torch.int32, device="cpu").view(shape)
        dtype = torch.float64 if any(part.lora_a.dtype == torch.float64 for part in parts) else torch.float32
        scalings = torch.tensor([part.scaling for part in parts], dtype=dtype, device="cpu").view(shape)
        return [part.lora_a for part in parts], [part.lora_b for part in parts], ranks, scalings

    def tables(self, adapters: Mapping[int, Adapter], device: torch.device, slots: int) -> tuple[TableRows, ...]:
        """The bank as kernels read it: a table for each dtype that these adapters have here.

        Args:
            adapters: those in use, by slot; only their rows are brought up to date.
            device: where the tables, and all weights in use, live.
            slots: how many slots there are.

        Raises:
            ModelStateError: an adapter is on another device.
        """
        last = self._last.get(device)
        if last is not None and last[0] == adapters and last[1] == slots:
            return last[2]
        read = self._read(adapters)
        for slot, parts in read.items():
            for part in parts:
                if part and not part.lora_a.device == part.lora_b.device == device:
                    raise ModelStateError(
                        f"the weights of adapter {adapters[slot].name!r} are on {part.lora_a.device} and "
                        f"{part.lora_b.device}, and the layer's input is on {device}: expected them on one device. "
                        "Move the adapter there."
                    )
        tables = self._tables.setdefault(device, {})
        dtypes = {dtype_of(part) for parts in read.values() for part in parts if part}
        present = set()
        if self._slots != slots:  # tables also for those that aren't in use now: a captured graph can get no new ones
            self._slots = slots
            modules = [module for layer in self.layers for module in layer.lora_A._modules.values()]
            present = {weight.dtype for module in modules if (weight := module._parameters.get("weight")) is not None}
        for dtype in {*tables, *dtypes, *present}:
            if dtype not in tables or len(tables[dtype].rows) < slots:
                tables[dtype] = Table(dtype, 1 << max(slots - 1, 15).bit_length(), len(self.layers), device)
                self._rows.pop(device, None)
                self._held_for.pop(device, None)
        for table in tables.values():  # those of other dtypes as well: a graph may read them
            for slot in table.update(read):
                self._held_for.get(device, {}).pop(slot, None)
        found = tuple(table.describe(read) for dtype, table in tables.items() if dtype in dtypes)
        self._last[device] = dict(adapters), slots, found
        self._rows.setdefault(device, {}).update(adapters)
        return found

    def has_rows(self, adapters: Mapping[int, Adapter], device: torch.device, slots: int) -> bool:
        """Whether ``tables`` has been called for all of these adapters, if not for all at once."""
        return slots == self._slots and adapters.items() <= self._rows.get(device, {}).items()

    def hold(self, adapters: Mapping[int, Adapter], device: torch.device, is_captured: bool) -> bool:
        """Let graphs of kernels read the bank's tables, for these adapters as well as for those that it held before.

        What graphs have as constants changes as rarely as it can: a rank only grows, as long as the tables stay.

        Returns:
            Whether something changed that graphs have as a constant.

        Raises:
            ModelStateError: something would have to change that a captured graph has as a constant.
        """
        held_for = self._held_for.setdefault(device, {})
        if adapters.items() <= held_for.items():
            return False
        read = self._read(adapters)
        before = {id(table.rows): table for table in self.held}
        found = []
        for table in self._tables.get(device, {}).values():
            now = table.describe(read)
            was = before.get(id(now.rows), now)
            found.append(now._replace(rank=max(now.rank, was.rank), is_aligned=now.is_aligned and was.is_aligned))
        is_same = len(found) == len(self.held) and all(
            now.rows is was.rows and now[1:] == was[1:] for now, was in zip(found, self.held)
        )
        if not is_same:
            if is_captured:
                raise ModelStateError(
                    "a CUDA graph was captured, and now there are more adapters, or adapters of a larger rank or "
                    "another dtype, than it can serve: expected adapters like those that were there when it was "
                    "captured. Call disable and enable, and capture it again."
                )
            self.held = tuple(found)
        held_for.update(adapters)
        return not is_same

    def forget(self) -> None:
        """Let go of the adapters that were described last, and of their memory."""
        self._last.clear()
        self._rows.clear()
        self._held_for.clear()

    def _read(self, adapters: Mapping[int, Adapter]) -> dict[int, list[Part | None]]:
        return {slot: adapter.parts(self.layers) for slot, adapter in adapters.items()}

    def sync(self, adapters: Sequence[Adapter | None]) -> None:
        """Bring what graphs of ops read up to date, in new tensors: a backward to come may need the old ones."""
        self.lora_a, self.lora_b, self.ranks, self.scalings = self.gather(adapters)

    @staticmethod
    def _absent(layer: LoraLayer) -> Part:
        a = torch.zeros(0, layer.in_features, device=base_device(layer))
        return Part(a, a.new_zeros(layer.out_features, 0), 0.0)


def base_device(layer: LoraLayer) -> torch.device:
    """Where the base layer runs, whatever its weights are called and however they are kept."""
    base = layer.get_base_layer()
    hook = loader(base)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    return next(itertools.chain(base.parameters(), base.buffers())).device


_keys = itertools.count()
