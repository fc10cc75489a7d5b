"""The weights that a batch reads: PEFT's own tensors, found again whenever PEFT holds others.

A bank is one projection group, an adapter is one slot. Neither owns weights nor copies any. An ``Adapter`` remembers
what it found in PEFT's dictionaries and where, and a call begins by comparing all of that with what is there now, so
that whatever happened since the last call (an optimizer step, ``.data`` written in place or replaced, ``set_scale``, a
hot-swap, ``.to()``, another adapter under the same name) is what the next call computes with.
docs/explanation/bank.md says why weights aren't stacked.
"""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_multibatch.adapters.offload import loader, onloaded
from peft_multibatch.adapters.shards import SHARDED, own, shard_of, split_of
from peft_multibatch.adapters.tables import Part, Table, TableRows, dtype_of
from peft_multibatch.compat import dequantize_module_weight
from peft_multibatch.errors import ModelStateError, UnsupportedError


if TYPE_CHECKING:
    from peft_multibatch.compat import LoraLayer
    from peft_multibatch.ops.torch_backend import SlotWeights


_weight = itemgetter("weight")


class Adapter:
    """One adapter's weights as they were last read, layer by layer, and whether PEFT still holds the same.

    Comparing has to be cheap: a model has hundreds of layers, a batch dozens of adapters, and a decode step few
    milliseconds. So what was read is kept in flat lists, which are compared by functions that loop in C; a module's
    ``_modules`` and ``_parameters`` are read because ``nn.Module`` attributes cost ten times more.

    Args:
        name: the adapter's name in PEFT.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._get = itemgetter(name)
        self._parts: dict[LoraLayer, Part | None] = {}
        self._lock = threading.Lock()
        self._module_dicts: list[dict] = []
        self._modules: list[Any] = []
        self._scaling_dicts: list[dict] = []
        self._scalings: list[float] = []
        self._lacking: list[dict] = []  # of layers where this adapter has no weights
        self._parameter_dicts: list[dict] = []  # of lora_A and lora_B in turn
        self._tensors: list[Tensor] = []
        self._whole: list[Tensor] = []  # of these, those that are no DTensors
        self._addresses: list[int] = []
        self._sharded: list[Any] = []  # and those that are
        self._shard_addresses: list[int] = []
        self._sizes: list[int] = []  # of every lora_A: with the address, they tell the rank
        self._memory: list[torch.UntypedStorage] = []  # while it is held, nothing else gets these addresses
        self._is_volatile = False

    def parts(self, layers: Iterable[LoraLayer]) -> list[Part | None]:
        """The adapter's weights in these layers, None where it has none.

        Raises:
            ModelStateError: the weights are on the meta device, and nobody knows where their values are.
        """
        return [self._parts[layer] if layer in self._parts else self._read(layer) for layer in layers]

    def holds(self) -> bool:
        """Whether PEFT still holds everything that was read, at the same addresses, with the same scalings."""
        try:
            tensors = list(map(_weight, self._parameter_dicts))
            return (
                not self._is_volatile
                and list(map(self._get, self._module_dicts)) == self._modules
                and list(map(self._get, self._scaling_dicts)) == self._scalings
                and all(map(operator.is_, tensors, self._tensors))  # gradients go to the very parameter
                and list(map(Tensor.data_ptr, self._whole)) == self._addresses
                and list(map(Tensor.data_ptr, map(shard_of, self._sharded))) == self._shard_addresses
                and list(map(Tensor.numel, tensors[::2])) == self._sizes
                and not any(self.name in modules for modules in self._lacking)
            )
        except KeyError:
            return False

    def _read(self, layer: LoraLayer) -> Part | None:
        name = self.name
        modules_a, modules_b = layer.lora_A._modules, layer.lora_B._modules
        with self._lock:
            if name not in modules_a:
                self._lacking.append(modules_a)
                self._parts[layer] = None
                return None
            module_a, module_b, scaling = modules_a[name], modules_b[name], layer.scaling[name]
            held = module_a._parameters.get("weight"), module_b._parameters.get("weight")
            a, b = (onloaded(module, layer.get_base_layer()) for module in (module_a, module_b))
            if a is None or b is None:
                raise UnsupportedError(
                    f"the weights of adapter {name!r} are computed anew when they are read, as pruning and other "
                    "parametrizations do: expected plain parameters. Remove the parametrization, or run the adapters "
                    "one at a time."
                )
            if module_b._parameters.get("bias") is not None or _is_other_variant(layer.lora_variant, name):
                raise ModelStateError(
                    f"adapter {name!r} got a bias or another variant since enable chose how to run its layers: "
                    "expected it to stay as it was. Call disable and enable again."
                )
            if isinstance(a, SHARDED) + isinstance(b, SHARDED) != (split_of(layer) is not None):
                raise ModelStateError(
                    f"the weights of adapter {name!r} were sharded over devices, or put together, since enable chose "
                    "how to run its layers: expected them to stay as they were. Call disable and enable again."
                )
            if a.is_meta or b.is_meta:
                raise ModelStateError(
                    f"the weights of adapter {name!r} are on the meta device, without a hook that knows their values: "
                    "expected them on a real device. Load all adapters first, and offload the model afterwards."
                )
            self._module_dicts += modules_a, modules_b
            self._modules += module_a, module_b
            self._parameter_dicts += module_a._parameters, module_b._parameters
            self._tensors += a, b
            for tensor in (a, b):
                is_sharded = isinstance(tensor, SHARDED)
                (self._sharded if is_sharded else self._whole).append(tensor)
                (self._shard_addresses if is_sharded else self._addresses).append(own(tensor).data_ptr())
                self._memory.append(own(tensor).untyped_storage())
            self._sizes.append(a.numel())
            self._scaling_dicts.append(layer.scaling)
            self._scalings.append(scaling)
            # written in place, or copied from where it was offloaded to: what changes there can't be seen from here
            if isinstance(scaling, Tensor) or a is not held[0] or b is not held[1]:
                self._is_volatile = True
            part = self._parts[layer] = Part(own(a), own(b), float(scaling))
        return part


KNOWN_VARIANTS = {"DoraLinearVariant"}
"""Variants of LoRA that a bank's products cover."""


def _is_other_variant(variants: Mapping[str, Any], name: str) -> bool:
    return name in variants and type(variants[name]).__name__ not in KNOWN_VARIANTS


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
        scalings = torch.tensor([part.scaling for part in parts], dtype=torch.float32, device="cpu").view(shape)
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
