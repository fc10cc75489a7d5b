"""The weights that a batch reads, of the layers that run as one product: PEFT's own tensors, none of them copied.

A bank is one projection group, and an adapter in use has a slot in it. docs/explanation/bank.md says why weights
aren't stacked.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_multibatch import streams
from peft_multibatch.adapters.adapter import AnyAdapter
from peft_multibatch.adapters.offload import loader
from peft_multibatch.adapters.shards import own, split_of
from peft_multibatch.adapters.tables import LayerWeights, SlotWeights, TableRows, WeightTable, dtype_of, is_aligned
from peft_multibatch.compat import dequantize_module_weight
from peft_multibatch.errors import ModelStateError


if TYPE_CHECKING:
    from peft_multibatch.compat import LoraLayer


Expected = dict[torch.dtype | None, tuple[int, bool]]
"""Dtypes, for each the largest rank, and whether all weights can be read 16 bytes at a time."""


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
        # What graphs of ops read, adapter by adapter: with gradients what leads to PEFT's parameters, without any the
        # parameters' memory.
        self.lora_a: list[Tensor] = []
        self.lora_b: list[Tensor] = []
        self.inference_a: list[Tensor] = []
        self.inference_b: list[Tensor] = []
        self.ranks: Tensor | None = None
        self.scalings: Tensor | None = None
        # Tells what stored adapters that are registered have in these layers, in memory or not.
        self.expects: Callable[[Iterable[LoraLayer]], Expected] = lambda layers: {}
        # What graphs of kernels read. Written by `extend_for_graphs`.
        self.graph_tables: tuple[TableRows, ...] = ()
        self._tables: dict[torch.device, dict[torch.dtype | None, WeightTable]] = {}
        self._slots = 0
        self._lock = threading.Lock()
        # What `tables` was last called for and what it gave: plans differ more often than adapters.
        self._last: dict[tuple[torch.device, int], tuple[dict[int, int], int, tuple[TableRows, ...]]] = {}
        # Whose rows the tables hold, and for whom graphs can read them: serials of adapters, by slot.
        self._rows: dict[torch.device, dict[int, int]] = {}
        self._served: dict[torch.device, dict[int, int]] = {}

    def weights(self, adapter: AnyAdapter) -> SlotWeights:
        """An adapter's weights as torch's products take them: transposed, still PEFT's own memory."""
        return [part and (part.lora_a.t(), part.lora_b.t(), part.scaling) for part in adapter.parts(self.layers)]

    def dora_scales(self, adapters: Mapping[int, AnyAdapter]) -> list[Tensor | None]:
        """For each slice what DoRA multiplies outputs with, ``[S + 1, N]``, the last row for the base model alone.

        The magnitudes over the norms of the adapted weights, 1 for adapters without DoRA; None where nobody has it.
        Computed anew from the weights as they are, because nothing shows that they were written in place.
        """
        found: list[Tensor | None] = []
        for layer in self.layers:
            parts = {adapter: adapter.parts([layer])[0] for adapter in adapters.values()}
            if not any(part is not None and part.magnitude is not None for part in parts.values()):
                found.append(None)
                continue
            if any(parameter.is_meta for parameter in layer.base_layer.parameters()):
                raise ModelStateError(
                    "a layer with a DoRA adapter is offloaded, and DoRA reads base weights and magnitudes apart from "
                    "their modules' forwards, which PEFT can't do there either: expected them on a real device. Leave "
                    "layers with DoRA adapters out of what is offloaded."
                )
            weight = dequantize_module_weight(layer.base_layer)
            weight = weight.t() if layer.fan_in_fan_out else weight
            rows = []
            for part in parts.values():
                if part is None or part.magnitude is None:
                    rows.append(torch.ones(len(weight), dtype=weight.dtype, device=weight.device))
                    continue
                with torch.no_grad():  # the norm counts as a constant in DoRA's gradients
                    delta = part.lora_b @ part.lora_a * part.scaling
                    norm = torch.linalg.norm(weight.to(delta.dtype) + delta, dim=1)
                rows.append(part.magnitude / norm)
            rows.append(torch.ones(len(weight), dtype=weight.dtype, device=weight.device))
            found.append(torch.stack(rows))
        return found

    def gather(self, adapters: Iterable[AnyAdapter | None]) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """What the ops take for these adapters: ``lora_A``, ``lora_B``, ranks ``[S, I]`` and scalings ``[S, I]``.

        Both lists have ``S * I`` entries; those of an adapter that lacks a slice have rank 0.
        """
        none = [None] * len(self.layers)
        found = [part for adapter in adapters for part in (adapter.parts(self.layers) if adapter else none)]
        parts = [part or self._absent(layer) for part, layer in zip(found, itertools.cycle(self.layers))]
        shape = -1, len(self.layers)
        numbers = [0 if part is None else len(part.lora_a) for part in found]
        ranks = torch.tensor(numbers, dtype=torch.int32, device="cpu").view(shape)
        dtype = torch.float64 if any(part.lora_a.dtype == torch.float64 for part in parts) else torch.float32
        scalings = torch.tensor([part.scaling for part in parts], dtype=dtype, device="cpu").view(shape)
        lora_a, lora_b = zip(*(part.parameters for part in parts)) if parts else ((), ())
        return list(lora_a), list(lora_b), ranks, scalings

    def tables(self, adapters: Mapping[int, AnyAdapter], device: torch.device, slots: int) -> tuple[TableRows, ...]:
        """The bank as kernels read it: a table for each dtype that these adapters have here.

        Args:
            adapters: those in use, by slot; only their rows are brought up to date.
            device: where the tables, and all weights in use, live.
            slots: how many slots there are.

        Raises:
            ModelStateError: an adapter is on another device.
        """
        serials = {slot: adapter.serial for slot, adapter in adapters.items()}
        place = device, streams.note(device)
        last = self._last.get(place)
        if last is not None and last[0] == serials and last[1] == slots:
            return last[2]
        with self._lock:  # or the table that is written here is not the one that another thread has just made
            known = self._rows.get(device, {})
            new = {slot: adapter for slot, adapter in adapters.items() if known.get(slot) != adapter.serial}
            read = self._read_on(new, device)
            dtypes = {dtype_of(part) for parts in read.values() for part in parts if part}
            # a graph that is captured next may meet all of them, and during a capture nothing can be made that stays
            likely = set() if device in self._tables else {*self._likely(device)}
            tables = self._make_tables(device, dtypes | likely, slots)
            if device not in self._rows:  # some of them are new, and have nobody's rows
                read = self._read_on(adapters, device)
            for table in tables.values():  # those of other dtypes as well: a graph may read them
                for slot in table.update(read):
                    self._served.get(device, {}).pop(slot, None)
            found = tuple(rows for table in tables.values() if (rows := table.describe(adapters)).rank)
            streams.before_read(device)
            self._last[place] = serials, slots, found
            self._rows.setdefault(device, {}).update(serials)
        return found

    def has_rows(self, adapters: Mapping[int, AnyAdapter], device: torch.device, slots: int) -> bool:
        """Whether ``tables`` has been called for all of these adapters, if not for all at once."""
        rows = self._rows.get(device, {})
        return slots == self._slots and all(rows.get(slot) == each.serial for slot, each in adapters.items())

    def extend_for_graphs(
        self, adapters: Mapping[int, AnyAdapter], device: torch.device, is_captured: bool, is_capturing: bool = False
    ) -> bool:
        """Let graphs of kernels read the bank's tables, for these adapters as well as for those that came before.

        While a graph is being captured no table is made, of which it would be a part.

        What graphs have as constants changes as rarely as it can: a rank only grows, as long as the tables stay, and
        begins with the largest one that PEFT or a store has here.

        Returns:
            Whether something changed that graphs have as a constant.

        Raises:
            ModelStateError: something would have to change that a captured graph has as a constant.
        """
        with self._lock:
            return self._extend(adapters, device, is_captured, is_capturing)

    def _extend(
        self, adapters: Mapping[int, AnyAdapter], device: torch.device, is_captured: bool, is_capturing: bool
    ) -> bool:
        served = self._served.setdefault(device, {})
        serials = {slot: adapter.serial for slot, adapter in adapters.items()}
        if self.graph_tables and serials.items() <= served.items():
            return False
        before = {id(table.rows): table for table in self.graph_tables}
        likely = {} if is_captured else self._likely(device)
        made = {*likely} if not is_capturing else set()
        found = []
        for dtype, table in self._make_tables(device, made, self._slots).items():
            now = table.describe(adapters)
            rank, is_aligned = likely.get(dtype, (0, True))
            was = before.get(id(now.rows), now)
            found.append(
                now._replace(
                    rank=max(now.rank, was.rank, rank), is_aligned=now.is_aligned and was.is_aligned and is_aligned
                )
            )
        is_same = len(found) == len(self.graph_tables) and all(
            now.rows is was.rows and now[1:] == was[1:] for now, was in zip(found, self.graph_tables)
        )
        if not is_same:
            if is_captured:
                raise ModelStateError(
                    "a CUDA graph was captured, and now there are more adapters in use, or adapters of a larger rank "
                    "or another dtype, than it can serve: expected adapters like those that were there when it was "
                    "captured. Call disable and enable, and capture it again."
                )
            self.graph_tables = tuple(found)
        served.update(serials)
        return not is_same

    def serves(self, adapters: Mapping[int, AnyAdapter], device: torch.device, slots: int) -> bool:
        """Whether graphs that were captured have what these adapters need: tables of their dtypes, and their ranks."""
        tables = {table.dtype: table for table in self.graph_tables}
        parts = [part for parts in self._read(adapters).values() for part in parts if part]
        return slots == self._slots and all(
            (table := tables.get(dtype_of(part))) is not None
            and len(part.lora_a) <= table.rank
            and (not table.is_aligned or is_aligned(part))
            for part in parts
        )

    def forget(self) -> None:
        """Let go of what is known of adapters."""
        with self._lock:
            self._last.clear()
            self._rows.clear()
            self._served.clear()

    def _make_tables(
        self, device: torch.device, dtypes: set[torch.dtype | None], slots: int
    ) -> dict[torch.dtype | None, WeightTable]:
        """The bank's tables on a device, one for each dtype that there was, all large enough."""
        tables = self._tables.setdefault(device, {})
        self._slots = slots
        for dtype in {*tables, *dtypes}:
            if dtype not in tables or len(tables[dtype].rows) < slots:
                tables[dtype] = WeightTable(dtype, slots, len(self.layers), device)
                self._rows.pop(device, None)
                self._served.pop(device, None)
        return tables

    def _likely(self, device: torch.device) -> Expected:
        """Dtypes that there are here, and for each its largest rank and whether all weights are aligned.

        Looks at all adapters, and so only when a graph is made.
        """
        found: Expected = {**self.expects(self.layers)}
        for layer in self.layers:
            for name, module in layer.lora_A._modules.items():
                halves = module, layer.lora_B._modules.get(name)
                a, b = (half and half._parameters.get("weight") for half in halves)
                if a is None or b is None or not a.dim() == b.dim() == 2 or not a.device == b.device == device:
                    continue
                part = LayerWeights(own(a), own(b), 0.0)
                rank, aligned = found.get(dtype_of(part), (0, True))
                found[dtype_of(part)] = max(rank, len(part.lora_a)), aligned and is_aligned(part)
        return found

    def _read(self, adapters: Mapping[int, AnyAdapter]) -> dict[int, list[LayerWeights | None]]:
        return {slot: adapter.parts(self.layers) for slot, adapter in adapters.items()}

    def _read_on(
        self, adapters: Mapping[int, AnyAdapter], device: torch.device
    ) -> dict[int, list[LayerWeights | None]]:
        read = self._read(adapters)
        for slot, parts in read.items():
            for part in parts:
                if part and not part.lora_a.device == part.lora_b.device == device:
                    raise ModelStateError(
                        f"the weights of adapter {adapters[slot].name!r} are on {part.lora_a.device} and "
                        f"{part.lora_b.device}, and the layer's input is on {device}: expected them on one device. "
                        "Move the adapter there."
                    )
        return read

    def sync(self, adapters: Sequence[AnyAdapter | None], live: Collection[AnyAdapter]) -> None:
        """Bring what graphs of ops read up to date, in new tensors: a backward to come may need the old ones.

        Args:
            adapters: by their positions.
            live: those to which gradients go.
        """
        lora_a, lora_b, self.ranks, self.scalings = self.gather(adapters)
        self.inference_a, self.inference_b = ([each.data for each in found] for found in (lora_a, lora_b))
        is_live = [adapter in live for adapter in adapters for _ in self.layers]
        self.lora_a, self.lora_b = (list(map(_graph_input, found, is_live)) for found in (lora_a, lora_b))
        for found, dim in [(self.inference_a, 0), (self.inference_b, 1), (self.lora_a, 0), (self.lora_b, 1)]:
            for each in found:
                torch._dynamo.maybe_mark_dynamic(each, dim)  # so that one graph serves all ranks

    def trained(self, adapters: Iterable[AnyAdapter]) -> list[bool]:
        """Which weights of adapters want gradients."""
        parts = [part for adapter in adapters for part in adapter.parts(self.layers) if part]
        return [parameter.requires_grad for part in parts for parameter in part.parameters]

    @staticmethod
    def _absent(layer: LoraLayer) -> LayerWeights:
        # a rank that no graph takes for a constant, as it does with 0 and 1
        a = torch.zeros(2, layer.in_features, dtype=torch.float32, device=base_device(layer))
        b = a.new_zeros(layer.out_features, 2)
        return LayerWeights(a, b, 0.0, (a, b))


def base_device(layer: LoraLayer) -> torch.device:
    """Where the base layer runs, whatever its weights are called and however they are kept."""
    base = layer.get_base_layer()
    hook = loader(base)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    return next(itertools.chain(base.parameters(), base.buffers())).device


class _Ignored(torch.autograd.Function):
    """A tensor whose gradient goes nowhere."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def _graph_input(weight: Tensor, is_live: bool) -> Tensor:
    """What a graph takes in the place of a weight: it can't tell one that gets a gradient from one that gets none."""
    if weight.is_inference():
        return weight
    with torch.enable_grad():
        is_trained = is_live and weight.requires_grad
        return weight.view_as(weight) if is_trained else _Ignored.apply(weight.detach().requires_grad_())


_keys = itertools.count()
