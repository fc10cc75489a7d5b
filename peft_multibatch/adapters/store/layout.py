"""Where an adapter's weights lie in its memory, and that they fit the model. Adapters with equal headers share one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from peft_multibatch.adapters.checks import check_scaling
from peft_multibatch.adapters.store.files import StoredTensor
from peft_multibatch.adapters.store.settings import Settings
from peft_multibatch.errors import AdapterMismatchError, AdapterUnsupportedError


StoreDtype = torch.dtype | Literal["file"] | None
"""What may be asked for as a store's ``dtype``."""

ALIGNMENT = 16
"""Bytes at a multiple of which every matrix begins, so that kernels read 16 at a time."""

KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])\.weight")


class Layers(Protocol):
    """What a store asks the model.

    Attributes:
        names: of layers that run what stored adapters have there; of those that come later as well.
        changes: another number whenever layers came, went, or can't take part any more.
    """

    names: MutableMapping[Any, str]
    changes: int

    def is_training(self) -> bool:
        """Whether the model is in train mode."""
        ...

    def device(self) -> torch.device:
        """Where the model is now."""
        ...

    def module_names(self) -> Iterable[str]:
        """Names of all modules, with PEFT's layers in the place of what they stand for."""
        ...

    def cover(self, name: str, modules: Iterable[str]) -> dict[str, Any]:
        """LoRA layers by the names of modules, which from now on run what stored adapters have there.

        Raises:
            AdapterMismatchError: there is no such module.
            AdapterUnsupportedError: it can't take part.
        """
        ...


class Half(NamedTuple):
    """A matrix in an adapter's memory."""

    start: int
    shape: tuple[int, int]


class StoredLayer(NamedTuple):
    """What an adapter has in one layer.

    Attributes:
        lora_a: ``[R, K]``.
        lora_b: ``[N, R]``.
        dtype: of both.
        scaling: what their product is multiplied with.
    """

    lora_a: Half
    lora_b: Half
    dtype: torch.dtype
    scaling: float


class Copy(NamedTuple):
    """Numbers that lie in a file as they do in memory, but for their dtype."""

    source: int
    target: int
    numbers: int
    from_dtype: torch.dtype
    to_dtype: torch.dtype


class Layout:
    """Where an adapter's weights lie in its memory.

    Attributes:
        layers: what it has, by the names of modules.
        size: bytes of its memory.
        file_size: bytes of the file behind its header.
        copies: what goes from the file into the memory.
        dropout: probability of its dropout, in train mode.
    """

    def __init__(
        self,
        name: str,
        tensors: Sequence[StoredTensor],
        settings: Settings,
        model: Layers,
        max_rank: int,
        dtype: StoreDtype,
    ) -> None:
        halves = self._halves(name, tensors)
        _check_names(name, halves, settings.names(name, model.module_names()))
        self.dropout = settings.dropout
        self._shapes = {
            module: (found["A"].shape, found["B"].shape, settings.rank_of(module)) for module, found in halves.items()
        }
        self._max_rank = max_rank
        covered = self.check(name, model)
        self.copies: list[Copy] = []
        self.size = 0
        places: dict[tuple[str, str], tuple[int, torch.dtype]] = {}
        for tensor in tensors:
            module, half = parse_key(name, tensor.key)
            wanted = _dtype_for(covered[module], tensor, dtype)
            places[module, half] = self._place(tensor, wanted), wanted
        self.file_size = sum(each.numbers * each.from_dtype.itemsize for each in self.copies)
        self.layers: dict[str, StoredLayer] = {}
        for module, found in halves.items():
            scaling = settings.scaling_of(module)
            check_scaling(name, scaling)
            (a, dtype_a), (b, dtype_b) = places[module, "A"], places[module, "B"]
            if dtype_a != dtype_b:
                raise AdapterMismatchError(
                    f"adapter {name!r} has lora_A of {dtype_a} and lora_B of {dtype_b} in {module}: expected one "
                    "dtype in both. Leave dtype out of adapter_store, which converts them."
                )
            self.layers[module] = StoredLayer(Half(a, found["A"].shape), Half(b, found["B"].shape), dtype_a, scaling)

    def check(self, name: str, model: Layers) -> dict[str, Any]:
        """The model's layers in which the adapter has anything.

        Raises:
            AdapterMismatchError: it doesn't fit them.
            AdapterUnsupportedError: one can't take part.
        """
        covered = model.cover(name, self._shapes)
        for module, (a, b, rank) in self._shapes.items():
            layer = covered[module]
            if not (a == (rank, layer.in_features) and b == (layer.out_features, rank)):
                raise AdapterMismatchError(
                    f"adapter {name!r} has lora_A of shape {[*a]} and lora_B of shape {[*b]} in {module}, of rank "
                    f"{rank} by its configuration: expected [{rank}, {layer.in_features}] and [{layer.out_features}, "
                    f"{rank}]. Save it again, from the model for which it was trained."
                )
            if rank > self._max_rank:
                raise AdapterMismatchError(
                    f"adapter {name!r} has the rank {rank} in {module}: expected {self._max_rank} at most. Pass "
                    "max_rank to adapter_store."
                )
        return covered

    def fill(self, memory: Tensor, file: Tensor) -> None:
        """Bring weights as they were in the file to where they belong, in the dtypes that they get.

        Args:
            memory: uint8 ``[size]``.
            file: uint8 ``[file_size]``.
        """
        for each in self.copies:
            source = file[each.source : each.source + each.numbers * each.from_dtype.itemsize]
            target = memory[each.target : each.target + each.numbers * each.to_dtype.itemsize]
            target.view(each.to_dtype).copy_(source.view(each.from_dtype))

    @property
    def is_plain(self) -> bool:
        """Whether the memory is the file, byte by byte."""
        return all(each.source == each.target and each.from_dtype == each.to_dtype for each in self.copies)

    def ranks(self) -> tuple[int, ...]:
        """Its ranks, in ascending order."""
        return tuple(sorted({layer.lora_a.shape[0] for layer in self.layers.values()}))

    def _halves(self, name: str, tensors: Sequence[StoredTensor]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for tensor in tensors:
            module, half = parse_key(name, tensor.key)
            if half in found.setdefault(module, {}):
                raise AdapterMismatchError(
                    f"adapter {name!r} has lora_{half} of {module} twice: expected it once. Save it again."
                )
            found[module][half] = tensor
        for module, halves in found.items():
            if len(halves) < 2:
                missing = "A" if "B" in halves else "B"
                raise AdapterMismatchError(
                    f"adapter {name!r} has no lora_{missing} in {module}: expected lora_A and lora_B. Save it again, "
                    "from a model in which it is complete."
                )
        return found

    def _place(self, tensor: StoredTensor, dtype: torch.dtype) -> int:
        count = tensor.shape[0] * tensor.shape[1]
        last = self.copies[-1] if self.copies else None
        start = -(-self.size // ALIGNMENT) * ALIGNMENT
        self.size = start + count * dtype.itemsize
        if (
            last is not None
            and last[3:] == (tensor.dtype, dtype)
            and last.source + last.numbers * tensor.dtype.itemsize == tensor.start
            and last.target + last.numbers * dtype.itemsize == start
        ):
            self.copies[-1] = last._replace(numbers=last.numbers + count)
        else:
            self.copies.append(Copy(tensor.start, start, count, tensor.dtype, dtype))
        return start


def parse_key(name: str, key: str) -> tuple[str, str]:
    """The module and the half, ``"A"`` or ``"B"``, to which a tensor of an adapter's file belongs.

    Raises:
        AdapterUnsupportedError: it is no matrix of a linear layer.
    """
    found = KEY.fullmatch(key)
    if found is None:
        raise AdapterUnsupportedError(
            f"adapter {name!r} has the tensor {key[:120]!r}: expected lora_A.weight and lora_B.weight of linear "
            "layers alone, because a store keeps nothing else. Use load_adapter."
        )
    return found["module"], found["half"]


def _check_names(name: str, found: Mapping[str, Any], wanted: set[str]) -> None:
    """Raise where PEFT finds other layers than the file has, and leaves out weights without a word, or makes up some.

    Raises:
        AdapterMismatchError: it would.
    """
    if not found and not wanted:
        raise AdapterMismatchError(
            f"adapter {name!r} has no weights, and would be the base model: expected some. Save it again."
        )
    for what, names in (("no weights for", wanted - found.keys()), ("weights for", found.keys() - wanted)):
        if names:
            is_in = "its configuration names" if what.startswith("no") else "its configuration or the model doesn't"
            raise AdapterMismatchError(
                f"adapter {name!r} has {what} {min(names)}, which {is_in}, and {len(names) - 1} more like it: "
                "expected weights for the modules that target_modules names in this model. Save it again, from the "
                "model for which it was trained."
            )


def _dtype_for(layer: Any, tensor: StoredTensor, asked: StoreDtype) -> torch.dtype:
    """The dtype that a matrix gets: what was asked for, or what PEFT's ``load_adapter`` gives it in this layer."""
    if isinstance(asked, torch.dtype):
        return asked
    if asked == "file":
        return tensor.dtype
    weight = getattr(layer.get_base_layer(), "weight", None)
    return torch.float64 if getattr(weight, "dtype", None) == torch.float64 else torch.float32
