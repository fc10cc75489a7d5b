"""Banks: the adapter weights of layers that run as one product, as references to PEFT's own tensors.

A bank covers one projection group, in which each adapter in use has a slot. docs/explanation/bank.md explains why
weights aren't stacked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_multibatch import streams
from peft_multibatch.adapters.adapter import AnyAdapter
from peft_multibatch.adapters.offload import base_device
from peft_multibatch.adapters.shards import own, split_of
from peft_multibatch.adapters.tables import LayerWeights, SlotWeights, TableRows, Tables, WeightTable, format_of
from peft_multibatch.errors import ModelStateError


if TYPE_CHECKING:
    from peft_multibatch.compat import LoraLayer


Expected = dict[torch.dtype | None, tuple[int, bool]]
"""Dtype -> the largest rank, and whether all weights can be read 16 bytes at a time."""


CanRun = Callable[[torch.dtype | None, int, torch.device], bool]
"""Whether graphs can run weights of a dtype and rank on a device."""


class Bank:
    """One projection group: the LoRA layers whose adapters run as one product.

    Args:
        layers: the group's LoRA layers, one per slice, in the order of their outputs.
        memory: all tables of the model.
    """

    def __init__(self, layers: Sequence[LoraLayer], memory: Tables) -> None:
        self.key = f"bank {next(_keys)}"  # a string, because dynamo may turn a number into a graph input
        self.layers = tuple(layers)
        self.splits = [split_of(layer) for layer in layers]
        self.is_split = any(self.splits)
        self.widths = [
            layer.out_features if split is None else len(own(layer.get_base_layer().weight))
            for layer, split in zip(layers, self.splits)
        ]
        self.slice_offsets = [0, *accumulate(self.widths)]
        # The inputs of graphs of ops, adapter by adapter: with gradients, tensors through which they reach PEFT's
        # parameters (lora_a, lora_b); without, the parameters' data (inference_a, inference_b).
        self.lora_a: list[Tensor] = []
        self.lora_b: list[Tensor] = []
        self.inference_a: list[Tensor] = []
        self.inference_b: list[Tensor] = []
        self.ranks: Tensor | None = None
        self.scalings: Tensor | None = None
        # Dtypes and ranks of all registered stored adapters in these layers, in memory or not.
        self.expects: Callable[[Iterable[LoraLayer], CanRun], Expected] = lambda layers, can_run: {}
        # The tables that graphs of kernels read. Written by `extend_for_graphs`.
        self.graph_tables: tuple[TableRows, ...] = ()
        self._tables: dict[torch.device, dict[torch.dtype | None, WeightTable]] = {}
        self._dtypes: dict[torch.device, set[torch.dtype | None]] = {}  # those of the tables
        self._slots = 0
        self._memory = memory
        # The last arguments and result of `tables`, because different plans often have the same adapters.
        self._last: dict[tuple[torch.device, int], tuple[dict[int, int], int, tuple[TableRows, ...]]] = {}
        # The adapters that graphs can run: serials, by slot.
        self._served: dict[torch.device, dict[int, int]] = {}

    def weights(self, adapter: AnyAdapter) -> SlotWeights:
        """An adapter's weights for the torch backend: transposed views of PEFT's own memory."""
        return [part and (part.lora_a.t(), part.lora_b.t(), part.scaling) for part in adapter.parts(self.layers)]

    def gather(self, adapters: Iterable[AnyAdapter | None]) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """The arguments of the ops for these adapters: ``lora_A``, ``lora_B``, ranks ``[S, I]``, scalings ``[S, I]``.

        Both lists have ``S * I`` entries. If an adapter has no weights for a slice, its rank there is 0.
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
        """The bank as kernels read it: one table per dtype of these adapters.

        Args:
            adapters: the adapters in use, by slot; only their rows are brought up to date.
            device: the device of the tables and of all weights in use.
            slots: the number of slots.

        Raises:
            ModelStateError: an adapter is on another device.
        """
        serials = {slot: adapter.serial for slot, adapter in adapters.items()}
        place = device, streams.note(device)
        last = self._last.get(place)
        if last is not None and last[0] == serials and last[1] == slots:
            return last[2]
        # a graph that is captured next may need any of these tables, which can't be made during a capture
        likely = set() if device in self._tables else {*self._likely(device, lambda *_: True)}
        with self._memory.lock:  # another thread may be replacing the table that is written here
            new = self._without_rows(adapters, device)
            tables = self._make_tables(device, likely | self._dtypes_of(new, device), slots)
            new = self._without_rows(adapters, device)  # some tables may be new and empty
            if new:
                self._memory.write(new, device)
            found = tuple(rows for table in tables.values() if (rows := table.describe(adapters)).rank)
            streams.before_read(device)
            self._last[place] = serials, slots, found
        return found

    def has_rows(self, adapters: Mapping[int, AnyAdapter], device: torch.device, slots: int) -> bool:
        """Whether the rows of all these adapters are in the tables."""
        known = self._serials(device)
        return slots == self._slots and all(
            serials.get(slot) == each.serial for serials in known for slot, each in adapters.items()
        )

    def _without_rows(self, adapters: Mapping[int, AnyAdapter], device: torch.device) -> dict[int, AnyAdapter]:
        """Adapters whose rows aren't in all tables, also those of other dtypes, because a graph may read them."""
        known = self._serials(device)
        return {slot: each for slot, each in adapters.items() if any(own.get(slot) != each.serial for own in known)}

    def _serials(self, device: torch.device) -> list[dict[int, int]]:
        return [each.serials for each in self._tables[device].values()] if device in self._tables else [{}]

    def extend_for_graphs(
        self,
        adapters: Mapping[int, AnyAdapter],
        device: torch.device,
        can_run: CanRun,
        is_fixed: bool,
        is_capturing: bool = False,
    ) -> bool:
        """Make graphs of kernels read the bank's tables for these adapters, and for all earlier ones.

        No tables are made during a capture, because the graph would own them.

        Constants of graphs change as rarely as possible: a table's rank starts with the largest one that PEFT or a
        store has here, and only grows. Adapters that graphs can't run don't count, because others run beside them.

        Args:
            adapters, device: the adapters, by slot, and the device of the tables.
            can_run: whether graphs can run weights of a dtype and rank on a device.
            is_fixed, is_capturing: whether captured graphs fix the constants, and whether one is being captured now.

        Returns:
            Whether a constant of graphs changed.

        Raises:
            ModelStateError: a constant of a captured graph would have to change.
        """
        adapters = {
            slot: adapter
            for slot, adapter in adapters.items()
            if all(can_run(each.dtype, each.rank, device) for each in adapter.formats(self.layers))
        }
        likely = {} if is_fixed or self._are_served(adapters, device) else self._likely(device, can_run)
        serials = {slot: adapter.serial for slot, adapter in adapters.items()}
        with self._memory.lock:
            if self._are_served(adapters, device):
                self._served.setdefault(device, {}).update(serials)
                return False
            before = {id(table.rows): table for table in self.graph_tables}
            found = []
            for dtype, table in self._make_tables(device, set() if is_capturing else {*likely}, self._slots).items():
                if not can_run(dtype, 1, device):
                    continue
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
                if is_fixed:
                    raise ModelStateError(
                        "a CUDA graph was captured, and now more adapters are in use than it has room for, or "
                        "adapters of a larger rank or another dtype: expected adapters like those at the capture. "
                        "Call disable and enable, and capture the graph again."
                    )
                self.graph_tables = tuple(found)
            self._served.setdefault(device, {}).update(serials)
            return not is_same

    def _are_served(self, adapters: Mapping[int, AnyAdapter], device: torch.device) -> bool:
        """Whether graphs can run these adapters. Looks only at those that are new."""
        served = self._served.get(device, {})
        new = {slot: adapter for slot, adapter in adapters.items() if served.get(slot) != adapter.serial}
        return bool(self.graph_tables) and (not new or self.serves(new, device, self._slots))

    def serves(self, adapters: Mapping[int, AnyAdapter], device: torch.device, slots: int) -> bool:
        """Whether captured graphs can run these adapters: they have tables for their dtypes and ranks."""
        rows = {dtype: table.rows for dtype, table in self._tables.get(device, {}).items()}  # maybe larger by now
        tables = {each.dtype: each for each in self.graph_tables if rows.get(each.dtype) is each.rows}
        formats = [each for adapter in adapters.values() for each in adapter.formats(self.layers)]
        return slots == self._slots and all(
            (table := tables.get(each.dtype)) is not None
            and each.rank <= table.rank
            and (each.is_aligned or not table.is_aligned)
            for each in formats
        )

    def forget(self) -> None:
        """Drop everything that was recorded about adapters."""
        with self._memory.lock:
            self._last.clear()
            self._served.clear()
            for table in [table for tables in self._tables.values() for table in tables.values()]:
                table.serials.clear()

    def _make_tables(
        self, device: torch.device, dtypes: set[torch.dtype | None], slots: int
    ) -> dict[torch.dtype | None, WeightTable]:
        """The bank's tables on a device, one per dtype seen so far, enlarged if needed."""
        tables, known = self._tables.setdefault(device, {}), self._dtypes.setdefault(device, set())
        known |= dtypes
        self._slots = slots
        for dtype in {*tables, *dtypes}:
            if dtype not in tables or len(tables[dtype].rows) < slots:
                tables[dtype] = self._memory.make(dtype, slots, self.layers, known, device)
                self._served.pop(device, None)
        return tables

    def _dtypes_of(self, adapters: Mapping[int, AnyAdapter], device: torch.device) -> set[torch.dtype | None]:
        """The dtypes of adapters in the bank's layers."""
        found = [(adapter.name, each) for adapter in adapters.values() for each in adapter.formats(self.layers)]
        for name, each in found:
            if each.devices != (device, device):
                raise ModelStateError(
                    f"the weights of adapter {name!r} are on {each.devices[0]} and {each.devices[1]}, and the layer's "
                    f"input is on {device}: expected them on one device. Move the adapter to the input's device."
                )
        return {each.dtype for _, each in found}

    def _likely(self, device: torch.device, can_run: CanRun) -> Expected:
        """The dtypes of all adapters here that graphs can run, the largest rank of each, and if all are aligned.

        Slow, because it reads all adapters; called only when a graph is made.
        """
        found: Expected = {**self.expects(self.layers, can_run)}
        for layer in self.layers:
            for name, module in layer.lora_A._modules.items():
                halves = module, layer.lora_B._modules.get(name)
                a, b = (half and half._parameters.get("weight") for half in halves)
                if a is None or b is None or not a.dim() == b.dim() == 2 or not a.device == b.device == device:
                    continue
                each = format_of(LayerWeights(own(a), own(b), 0.0))
                if not can_run(each.dtype, each.rank, device):
                    continue
                rank, is_aligned = found.get(each.dtype, (0, True))
                found[each.dtype] = max(rank, each.rank), is_aligned and each.is_aligned
        return found

    def sync(self, adapters: Sequence[AnyAdapter | None], live: Collection[AnyAdapter]) -> None:
        """Bring the inputs of graphs of ops up to date, in new tensors because a later backward may need the old ones.

        Args:
            adapters: the adapters, by position.
            live: those that get gradients.
        """
        lora_a, lora_b, self.ranks, self.scalings = self.gather(adapters)
        self.inference_a, self.inference_b = ([each.data for each in found] for found in (lora_a, lora_b))
        is_live = [adapter in live for adapter in adapters for _ in self.layers]
        self.lora_a, self.lora_b = (list(map(_graph_input, found, is_live)) for found in (lora_a, lora_b))
        for found, dim in [(self.inference_a, 0), (self.inference_b, 1), (self.lora_a, 0), (self.lora_b, 1)]:
            for each in found:
                torch._dynamo.maybe_mark_dynamic(each, dim)  # so that one graph serves all ranks

    def trained(self, adapters: Iterable[AnyAdapter]) -> list[bool]:
        """Whether each of the adapters' weights requires gradients."""
        parts = [part for adapter in adapters for part in adapter.parts(self.layers) if part]
        return [parameter.requires_grad for part in parts for parameter in part.parameters]

    @staticmethod
    def _absent(layer: LoraLayer) -> LayerWeights:
        # rank 2, because graphs specialize on sizes 0 and 1
        a = torch.zeros(2, layer.in_features, dtype=torch.float32, device=base_device(layer))
        b = a.new_zeros(layer.out_features, 2)
        return LayerWeights(a, b, 0.0, (a, b))


class _Ignored(torch.autograd.Function):
    """A tensor whose gradient is discarded."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def _graph_input(weight: Tensor, is_live: bool) -> Tensor:
    """A graph's input for a weight. Graphs can't distinguish weights that get gradients from those that don't."""
    if weight.is_inference():
        return weight
    with torch.enable_grad():
        is_trained = is_live and weight.requires_grad
        return weight.view_as(weight) if is_trained else _Ignored.apply(weight.detach().requires_grad_())


_keys = itertools.count()
