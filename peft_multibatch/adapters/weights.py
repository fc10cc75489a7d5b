"""One adapter's weights as PEFT holds them, and whether it still holds the same."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_multibatch.adapters.checks import check_fit, check_halves
from peft_multibatch.adapters.offload import onloaded
from peft_multibatch.adapters.shards import SHARDED, own, shard_of, split_of
from peft_multibatch.adapters.tables import Part
from peft_multibatch.errors import ModelStateError, UnsupportedError


if TYPE_CHECKING:
    from peft_multibatch.compat import LoraLayer


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
        self._sizes: list[int] = []  # with the address and the order in memory, they tell what may be read
        self._are_contiguous: list[bool] = []
        self._memory: list[torch.UntypedStorage] = []  # while it is held, nothing else gets these addresses
        self._is_volatile = False

    def parts(self, layers: Iterable[LoraLayer]) -> list[Part | None]:
        """The adapter's weights in these layers, None where it has none.

        Raises:
            ModelStateError: the weights are on the meta device, and nobody knows where their values are.
        """
        return [self._parts[layer] if layer in self._parts else self._read(layer) for layer in layers]

    def check(self, layers: Iterable[LoraLayer]) -> None:
        """Read the weights in these layers, but for those that are offloaded until their part of the model runs.

        Raises:
            AdapterMismatchError: they don't fit.
        """
        for layer in layers:
            modules = [each._modules.get(self.name) for each in (layer.lora_A, layer.lora_B)]
            weights = [module._parameters.get("weight") for module in modules if module is not None]
            if not any(weight is not None and weight.is_meta for weight in weights):
                self.parts([layer])

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
                and list(map(Tensor.numel, tensors)) == self._sizes
                and list(map(Tensor.is_contiguous, self._whole)) == self._are_contiguous
                and not any(self.name in modules for modules in self._lacking)
            )
        except KeyError:
            return False

    def _read(self, layer: LoraLayer) -> Part | None:
        name = self.name
        modules_a, modules_b = layer.lora_A._modules, layer.lora_B._modules
        with self._lock:
            if name not in modules_a and name not in modules_b:
                self._lacking.append(modules_a)
                self._parts[layer] = None
                return None
            check_halves(name, layer)
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
            check_fit(name, layer, a, b, scaling)
            self._module_dicts += modules_a, modules_b
            self._modules += module_a, module_b
            self._parameter_dicts += module_a._parameters, module_b._parameters
            self._tensors += a, b
            for tensor in (a, b):
                is_sharded = isinstance(tensor, SHARDED)
                (self._sharded if is_sharded else self._whole).append(tensor)
                (self._shard_addresses if is_sharded else self._addresses).append(own(tensor).data_ptr())
                self._memory.append(own(tensor).untyped_storage())
            self._are_contiguous += (tensor.is_contiguous() for tensor in (a, b) if not isinstance(tensor, SHARDED))
            self._sizes += a.numel(), b.numel()
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
