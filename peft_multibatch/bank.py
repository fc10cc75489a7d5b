"""The weights of one projection group: for every slot and slice, a reference to the tensors that PEFT holds.

A bank owns no weights and copies none. It reads PEFT's own dictionaries when a call begins, so that whatever happened
to an adapter since the last call (an optimizer step, ``.data`` written in place, ``set_scale``, a hot-swap, ``.to()``,
another adapter under the same name) is what the next call computes with, and PEFT's parameters stay where they are.
docs/explanation/bank.md says why weights aren't stacked.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from peft_multibatch.errors import ModelStateError


if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from peft_multibatch.ops.torch_backend import SlotWeights


class Bank:
    """Adapter weights of one projection group, by slot.

    Args:
        layers: the group's LoRA layers, one a slice, in the order of their outputs.
        names: the handle's list of adapter names, by slot; None where an adapter was deleted. Not copied.
    """

    def __init__(self, layers: Sequence[LoraLayer], names: list[str | None]) -> None:
        self.layers = tuple(layers)
        self.names = names
        self.slice_offsets = [0, *accumulate(layer.out_features for layer in layers)]
        # What compiled graphs read, written by `sync`: PEFT's tensors slot by slot, and their ranks and scalings.
        self.lora_a: list[Tensor] = []
        self.lora_b: list[Tensor] = []
        self.ranks: Tensor | None = None
        self.scalings: Tensor | None = None
        self._tables: dict[torch.device, Table] = {}

    def parameters(self, slot: int) -> Iterator[tuple[Tensor, Tensor, float] | None]:
        """For every slice an adapter's ``lora_A`` ``[R, K]``, ``lora_B`` ``[N, R]`` and scaling, or None without any.

        Raises:
            ModelStateError: the weights are on the meta device, as accelerate's offloading leaves them.
        """
        name = self.names[slot]
        for layer in self.layers:
            # a module's `_modules` is read because `nn.ModuleDict` and `nn.Module` attribute look-ups cost ten times
            # more
            lora_a = layer.lora_A._modules.get(name)
            if lora_a is None:
                yield None
                continue
            a, b = lora_a._parameters["weight"], layer.lora_B._modules[name]._parameters["weight"]
            if a.is_meta or b.is_meta:
                raise ModelStateError(
                    f"the weights of adapter {name!r} are on the meta device, as offloading leaves them between "
                    "calls: expected them on a real device. Load the adapters without offloading."
                )
            yield a, b, float(layer.scaling[name])

    def weights(self, slot: int) -> SlotWeights:
        """``parameters`` as products take them: ``lora_A`` and ``lora_B`` transposed, still PEFT's own memory."""
        return [part and (part[0].t(), part[1].t(), part[2]) for part in self.parameters(slot)]

    def gather(self, slots: Iterable[int]) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """What the ops take for these slots: ``lora_A``, ``lora_B``, ranks ``[S, I]`` and scalings ``[S, I]``.

        Both lists have ``S * I`` entries; those of an adapter that lacks a slice have rank 0.
        """
        parts = [
            part or self._absent(layer) for slot in slots for layer, part in zip(self.layers, self.parameters(slot))
        ]
        shape = -1, len(self.layers)
        ranks = torch.tensor([a.shape[0] for a, _, _ in parts], dtype=torch.int32, device="cpu").view(shape)
        scalings = torch.tensor([scaling for _, _, scaling in parts], dtype=torch.float32, device="cpu").view(shape)
        return [a for a, _, _ in parts], [b for _, b, _ in parts], ranks, scalings

    def table(self, device: torch.device) -> Table:
        """The bank's table on a device; a larger one where there are more slots than it holds."""
        table = self._tables.get(device)
        if table is None or len(table.rows) < len(self.names):
            table = self._tables[device] = Table(self, 1 << max(len(self.names) - 1, 7).bit_length(), device)
        return table

    def sync(self) -> None:
        """Bring what compiled graphs read up to date, in place wherever the set of adapters is still the same."""
        self.lora_a, self.lora_b, ranks, scalings = self.gather(range(len(self.names)))
        if self.ranks is not None and self.scalings is not None and self.ranks.shape == ranks.shape:
            self.ranks.copy_(ranks)
            self.scalings.copy_(scalings)
        else:
            self.ranks, self.scalings = ranks, scalings

    @staticmethod
    def _absent(layer: LoraLayer) -> tuple[Tensor, Tensor, float]:
        weight = layer.get_base_layer().weight
        return weight.new_empty(0, layer.in_features), weight.new_empty(layer.out_features, 0), 0.0


class TableRows(NamedTuple):
    """What kernels take of a table.

    Attributes:
        rows: int64 ``[slots, I, 4]``: addresses of ``lora_A`` and ``lora_B``, rank, bits of the float32 scaling.
        dtype: dtype of all weights in use, or None where they differ or can't be read row by row.
        rank: largest rank in use.
        is_aligned: whether all weights in use can be read 16 bytes at a time.
    """

    rows: Tensor
    dtype: torch.dtype | None
    rank: int
    is_aligned: bool


class Table:
    """A bank in the form that kernels read: for every slot and slice where the weights are, their rank and scaling.

    The tensor stays where it is, so that captured graphs see every update. Tensors that it points to are kept alive
    until their rows are written again.

    Args:
        bank: the bank to follow.
        slots: how many slots the table holds.
        device: where the table, and all weights in it, live.
    """

    def __init__(self, bank: Bank, slots: int, device: torch.device | str) -> None:
        self.bank = bank
        with torch.inference_mode(False):  # a table outlives the call in which it is made
            self.rows = torch.zeros((slots, len(bank.layers), 4), dtype=torch.int64, device=device)
        self._written: dict[int, list[tuple | None]] = {}
        self._last: tuple[list[int], list[list[tuple | None]], TableRows] | None = None
        self._held: dict[int, list[Tensor]] = {}
        self._lock = threading.Lock()

    def update(self, slots: Iterable[int]) -> TableRows:
        """Bring the rows of these slots up to date, which are those in use; copies nothing where nothing changed."""
        slots = list(slots)
        read = [[part and _describe(*part) for part in self.bank.parameters(slot)] for slot in slots]
        with self._lock:
            if self._last is not None and self._last[0] == slots and self._last[1] == read:
                return self._last[2]
            changed = [slot for slot, row in zip(slots, read) if self._written.get(slot) != row]
            for slot, row in zip(slots, read):
                self._written[slot] = row
                self._held[slot] = [tensor for part in self.bank.parameters(slot) if part for tensor in part[:2]]
            if changed:
                self._write(changed)
            live = [part for row in read for part in row if part]
            dtypes = {part[4] for part in live}
            found = TableRows(
                self.rows,
                dtypes.pop() if len(dtypes) == 1 else None,
                max((part[2] for part in live), default=0),
                all(part[0] % 16 == part[1] % 16 == part[2] % 8 == 0 for part in live),
            )
            self._last = slots, read, found
        return found

    def _write(self, slots: list[int]) -> None:
        rows = torch.zeros((len(slots), *self.rows.shape[1:]), dtype=torch.int64, device="cpu")
        for index, slot in enumerate(slots):
            for i, part in enumerate(self._written[slot]):
                if part:
                    a, b, rank, scaling, _ = part
                    bits = torch.tensor(scaling, dtype=torch.float32, device="cpu").view(torch.int32)
                    rows[index, i] = torch.tensor([a, b, rank, int(bits)], device="cpu")
        with torch.inference_mode(False):
            self.rows[torch.tensor(slots, device=self.rows.device)] = rows.to(self.rows.device)


def _describe(a: Tensor, b: Tensor, scaling: float) -> tuple[int, int, int, float, torch.dtype | None]:
    """Addresses, rank, scaling and common dtype; None where there is none or rows aren't contiguous."""
    dtype = a.dtype if a.dtype == b.dtype and a.is_contiguous() and b.is_contiguous() else None
    return a.data_ptr(), b.data_ptr(), a.size(0), scaling, dtype
