"""Versions of adapters in PEFT's modules, and the check whether they are still up to date."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Iterable
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peft_multibatch import streams
from peft_multibatch.adapters import notices, views
from peft_multibatch.adapters.adapter import AnyAdapter
from peft_multibatch.adapters.checks import HOOKS, check_fit, check_halves, check_scaling, why_apart
from peft_multibatch.adapters.offload import comes_later, onloaded
from peft_multibatch.adapters.shards import SHARDED, check_adapter, own, shard_of, split_of
from peft_multibatch.adapters.slots import Slots
from peft_multibatch.adapters.tables import LayerWeights
from peft_multibatch.compat import LoraLayer
from peft_multibatch.errors import AdapterMismatchError, ModelStateError, UnsupportedError


class ReadLayer(Protocol):
    """A layer from which adapters are read.

    Attributes:
        module: the PEFT layer.
        name: its name in the model.
        is_fast: whether it runs as one product for all adapters, except for those that run apart.
        refusal: why adapters on this layer can't run in mixed batches, or the empty string.
    """

    module: Any
    name: str
    is_fast: bool
    refusal: str


_weight, _bias, _hooks_of = itemgetter("weight"), itemgetter("bias"), itemgetter(*HOOKS)


class Adapter(AnyAdapter):
    """One version of an adapter in PEFT's modules.

    A call uses the same version until it ends, even if PEFT's modules change. A version shares PEFT's memory, so it
    sees in-place writes to weights.

    Comparing with PEFT has to be cheap: a model has hundreds of layers, a batch dozens of adapters, and a decode step
    takes a few milliseconds. So everything that was read is kept in flat lists, which are compared by functions that
    loop in C. A module's ``_modules`` and ``_parameters`` are read directly, because ``nn.Module`` attributes cost ten
    times more.

    Attributes:
        name: the adapter's name in PEFT.
        serial: a number that no other version of any adapter has.
        apart: layers that run as products for other adapters, but need PEFT's own module for this one -> the reason.
        reaches_any: whether it has entries in any layer of the model.
        dropouts: its dropout modules, by layer.
        is_plain: whether it runs as a product in all fast layers, without dropouts and variants.

    Args:
        name: the adapter's name in PEFT.
        slots: the pool from which it takes its slot.
    """

    def __init__(self, name: str, slots: Slots) -> None:
        super().__init__(name, slots)
        self.apart: dict[Any, str] = {}
        self.dropouts: dict[Any, nn.Dropout] = {}
        self._get = itemgetter(name)
        weakref.finalize(self, _keep_for_kernels, self._parts).atexit = False
        self._views: dict[Any, Any] = {}
        self._seen: object = None  # the value of notices.now() at the last close check
        self._dicts: list[dict] = []  # dictionaries with an entry of this name
        self._entries: list[Any] = []
        self._lacking: list[dict] = []  # dictionaries without one
        self._halves: list[nn.Module] = []  # lora_A and lora_B, alternating
        self._attributes: list[dict] = []  # the modules' __dict__
        self._numbers: list[int] = []  # their lengths
        self._weights: list[dict] = []  # the modules' _parameters
        self._parameters: list[dict] = []  # those of modules that run as products
        self._tensors: list[Tensor] = []
        self._magnitudes: list[dict] = []  # parameters of DoRA, whose values every call reads again
        self._magnitude_tensors: list[Tensor] = []
        self._whole: list[Tensor] = []  # those of the tensors that aren't DTensors
        self._addresses: list[int] = []
        self._sharded: list[Any] = []  # the DTensors
        self._shard_addresses: list[int] = []
        self._sizes: list[int] = []  # together with address and contiguity, they define the memory that kernels read
        self._are_contiguous: list[bool] = []
        self._is_volatile = False
        self._comes_later = False  # whether some weights are offloaded and not read yet
        self.reaches_any = False
        self._layers: list[Any] = []  # layers with entries
        self._containers: list[dict] = []  # their containers
        self._close_dicts: list[dict] = []  # checked only if something was noticed
        self._close_entries: list[Any] = []
        self._close_attributes: list[dict] = []

    @property
    def is_plain(self) -> bool:  # type: ignore[override]
        return not (self.apart or self.dropouts or self._magnitudes or self._comes_later)

    @property
    def num_layers(self) -> int:
        """The number of layers in which it has entries."""
        return len({layer for layer in (*self._parts, *self._views) if self.has(layer)})

    def ranks(self) -> tuple[int, ...]:
        """Its ranks, in ascending order."""
        numbers = [len(part.lora_a) for part in self._parts.values() if part is not None]
        numbers += [number for view in self._views.values() if (number := getattr(view, "r", {}).get(self.name))]
        return tuple(sorted(set(numbers)))

    def tensors(self) -> list[Tensor]:
        """All of its weights that have been read so far."""
        found = [each for part in self._parts.values() if part is not None for each in part.parameters]
        for layer, view in self._views.items():
            if self._parts.get(layer) is None:
                for each in (entries[self.name] for entries in views.entries(view) if self.name in entries):
                    found += each.parameters() if isinstance(each, nn.Module) else [each]
        found += [part.magnitude for part in self._parts.values() if part is not None and part.magnitude is not None]
        return found

    def is_zero(self) -> bool:
        """Whether it is plain LoRA whose deltas are all zero."""
        return not self._views and all(not part.lora_b.any() for part in self._parts.values() if part is not None)

    def read(self, layers: Iterable[ReadLayer]) -> None:
        """Read its entries in these layers, except for weights that are offloaded until their module runs.

        Raises:
            UnsupportedError: it has entries in a layer that can't run mixed batches.
            AdapterMismatchError: its weights don't fit.
        """
        self._seen = notices.now()
        for layer in layers:
            module = layer.module
            held = views.entries(module)
            if layer.refusal:  # refused layers may contain other layers
                held += [each for inner in module.modules() for each in views.entries(inner)]
            if not any(self.name in each for each in held):
                self._lacking += held
                if layer.is_fast:
                    self._parts[module] = None
                continue
            self.reaches_any = True
            self._layers.append(module)
            self._containers += views.entries(module)
            if layer.refusal:
                raise UnsupportedError(f"adapter {self.name!r} can't run in a mixed batch: {layer.refusal}")
            if layer.is_fast:
                if split_of(module) is not None:
                    check_adapter(layer.name, module, self.name)
                reason = why_apart(module, self.name)
                if reason:
                    self._read_apart(layer, reason)
                elif comes_later(module, self.name):
                    self._comes_later = True
                else:
                    self._read(module)
            else:
                self._read_apart(layer, "")

    def parts(self, layers: Iterable[LoraLayer]) -> list[LayerWeights | None]:
        """The adapter's weights in fast layers; None for layers where it has none, or runs apart.

        Raises:
            ModelStateError: the weights are on the meta device, and no hook can load their values.
        """
        return [self._parts[layer] if layer in self._parts else self._read(layer) for layer in layers]

    def view(self, layer: Any) -> Any:
        """A view of a layer with this version active, or with no adapter if it has no entries there."""
        return views.view_of(layer, {self.name: self.source(layer)} if self.has(layer) else {})

    def source(self, layer: Any) -> Any:
        """A view with its entries in a layer, from which other views are made."""
        if layer not in self._views:
            self._views[layer] = views.view_of(layer, {self.name: layer}, runs=False)
        return self._views[layer]

    def variant(self, layer: Any) -> str:
        """Its LoRA variant in a layer, or the empty string."""
        part = self._parts.get(layer)
        if part is not None:
            return "DoRA" if part.magnitude is not None else ""
        variants = getattr(self._views.get(layer), "lora_variant", {})
        return type(variants[self.name]).__name__ if self.name in variants else ""

    def has(self, layer: Any) -> bool:
        """Whether it had entries in a layer when it was read."""
        return layer in self._views or self._parts.get(layer) is not None

    def holds(self, noticed: object) -> bool:
        """Whether PEFT still has the same modules and tensors, at the same addresses, with the same scalings.

        Args:
            noticed: the current value of ``notices.now()``.
        """
        try:
            tensors = list(map(_weight, self._weights))
            is_same = (
                not self._is_volatile
                and all(map(operator.is_, map(self._get, self._dicts), self._entries))
                and all(map(operator.is_, tensors, self._tensors))  # identity, because gradients go to the parameter
                and all(map(operator.is_, map(_weight, self._magnitudes), self._magnitude_tensors))
                and list(map(Tensor.data_ptr, self._whole)) == self._addresses
                and list(map(Tensor.data_ptr, map(shard_of, self._sharded))) == self._shard_addresses
                and list(map(Tensor.numel, tensors)) == self._sizes
                and list(map(Tensor.is_contiguous, self._whole)) == self._are_contiguous
                and list(map(len, self._attributes)) == self._numbers  # a replaced forward adds an attribute
                and all(map(operator.is_, map(type, self._halves), itertools.repeat(nn.Linear)))
            )
        except KeyError:
            return False
        if is_same and noticed != self._seen:
            is_same = self._holds_closely()
            if is_same:
                self._seen = noticed
        return is_same

    def _holds_closely(self) -> bool:
        """Whether none of the changes that ``notices`` reports concern this adapter: hooks, biases, new modules."""
        return (
            all(map(operator.is_, itertools.chain.from_iterable(map(views.entries, self._layers)), self._containers))
            and all(map(operator.is_, map(_bias, self._parameters), itertools.repeat(None)))
            and not any(itertools.chain.from_iterable(map(_hooks_of, self._close_attributes)))
            and all(map(operator.is_, map(self._get, self._close_dicts), self._close_entries))
            and not any(self.name in each for each in self._lacking)
            and all(why_apart(module, self.name) == reason for module, reason in self.apart.items())
        )

    def _read_apart(self, layer: ReadLayer, reason: str) -> None:
        module, name = layer.module, self.name
        if isinstance(module, LoraLayer):
            if name in module.lora_A or name in module.lora_B:
                check_halves(name, module)
            check_scaling(name, module.scaling.get(name, 1.0))
        self._views[module] = views.view_of(module, {name: module}, runs=False)
        for entries in (*views.entries(module), *views.settings(module)):
            if name in entries:
                self._dicts.append(entries)
                self._entries.append(entries[name])
            else:
                self._lacking.append(entries)
        if reason:
            self.apart[module] = reason
            self._parts[module] = None
            halves = module.lora_A[name], module.lora_B[name]
            weights = [half._parameters.get("weight") for half in halves]
            if all(each is not None and each.layout == torch.strided for each in weights) and not comes_later(
                module, name
            ):
                self._track(module, *halves)

    def _read(self, layer: LoraLayer) -> LayerWeights | None:
        name = self.name
        modules_a, modules_b = layer.lora_A._modules, layer.lora_B._modules
        with self._lock:
            if layer in self._parts:
                return self._parts[layer]
            if name not in modules_a and name not in modules_b:
                self._lacking += modules_a, modules_b
                self._parts[layer] = None
                return None
            check_halves(name, layer)
            module_a, module_b, scaling = modules_a[name], modules_b[name], layer.scaling[name]
            assert module_a is not None and module_b is not None
            a, b = self._track(layer, module_a, module_b)
            variants = layer.lora_variant
            magnitude = layer.lora_magnitude_vector[name].weight if name in variants else None
            self._dicts += modules_a, modules_b, layer.scaling
            self._entries += module_a, module_b, scaling
            self._halves += module_a, module_b
            self._parameters += module_a._parameters, module_b._parameters
            if magnitude is None:
                self._lacking.append(variants)
            else:
                entries = layer.lora_magnitude_vector._modules
                self._dicts += entries, variants
                self._entries += entries[name], variants[name]
                self._magnitudes.append(entries[name]._parameters)
                self._magnitude_tensors.append(magnitude)
                self._close_attributes.append(entries[name].__dict__)
            if isinstance(scaling, Tensor):  # may be written in place
                self._is_volatile = True
            self._close_attributes += module_a.__dict__, module_b.__dict__
            dropout = layer.lora_dropout._modules.get(name)
            if dropout is not None:
                self._close_dicts.append(layer.lora_dropout._modules)
                self._close_entries.append(dropout)
                self._close_attributes.append(dropout.__dict__)
                self._attributes.append(dropout.__dict__)
                self._numbers.append(len(dropout.__dict__))
            if isinstance(dropout, nn.Dropout):
                self.dropouts[layer] = dropout
                self._views[layer] = views.view_of(layer, {name: layer}, runs=False)
            part = LayerWeights(own(a).data, own(b).data, float(scaling), (own(a), own(b)), magnitude)
            self._parts[layer] = part
        return part

    def _track(self, layer: LoraLayer, module_a: nn.Module, module_b: nn.Module) -> tuple[Tensor, Tensor]:
        """Check the weights of a layer, and record their addresses."""
        name = self.name
        a, b = (onloaded(module, layer.get_base_layer()) for module in (module_a, module_b))
        assert a is not None and b is not None
        if split_of(layer) is None and isinstance(a, SHARDED) + isinstance(b, SHARDED):
            raise ModelStateError(
                f"the weights of adapter {name!r} are sharded over devices, but its layers aren't: expected both or "
                "neither. Add the adapter after the model was split."
            )
        if a.is_meta or b.is_meta:
            raise AdapterMismatchError(
                f"the weights of adapter {name!r} are on the meta device, without a hook that can load them: expected "
                "them on a real device. Load all adapters first, from complete files, and offload the model "
                "afterwards."
            )
        check_fit(name, layer, a, b, layer.scaling[name])
        for module, tensor in ((module_a, a), (module_b, b)):
            self._attributes.append(module.__dict__)
            self._numbers.append(len(module.__dict__))
            self._weights.append(module._parameters)
            self._tensors.append(tensor)
            self._sizes.append(tensor.numel())
            if isinstance(tensor, SHARDED):
                self._sharded.append(tensor)
                self._shard_addresses.append(own(tensor).data_ptr())
            else:
                self._whole.append(tensor)
                self._addresses.append(tensor.data_ptr())
                self._are_contiguous.append(tensor.is_contiguous())
            # a copy of an offloaded weight, whose changes can't be detected
            self._is_volatile = self._is_volatile or tensor is not module._parameters["weight"]
        return a, b


def _keep_for_kernels(parts: dict[Any, LayerWeights | None]) -> None:
    """Keep the weights of a freed version until running kernels have finished."""
    streams.keep_for_all([each for part in list(parts.values()) if part is not None for each in part[:2]])
