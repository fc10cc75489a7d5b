"""The model's layers for an adapter store, patched when the first stored adapter has weights for them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

from peft_multibatch.adapters.offload import base_device
from peft_multibatch.errors import AdapterMismatchError, AdapterUnsupportedError, UnsupportedError
from peft_multibatch.layers import table as handlers
from peft_multibatch.layers.patch import PatchedLayer
from peft_multibatch.layers.plain import check_plain, layer_for, without_patch
from peft_multibatch.model.scan import LayerScan


SERVED = ("cpu", "cuda")
"""Device types on which a store works."""


class StoredLayers:
    """The model's layers, as an adapter store looks them up.

    Attributes:
        names: the names of layers that stored adapters can use.
        changes: a counter of changes: layers that were added, removed or refused.
        layers: layers that aren't part of the model -> the modules that they represent.

    Args:
        refresh: brings the handle up to date, and returns its layers by name and its scan of the model.
        patch: makes a ``PatchedLayer``; takes the arguments of that class except for the router.
        model: the model that contains the layers.
    """

    def __init__(
        self,
        refresh: Callable[[bool], tuple[Mapping[str, PatchedLayer], LayerScan]],
        patch: Callable[..., PatchedLayer],
        model: nn.Module,
    ) -> None:
        self.names: MutableMapping[Any, str] = weakref.WeakKeyDictionary()  # calls may still run removed layers
        self.changes = 0
        self._refresh, self._patch, self._model = refresh, patch, model
        self.layers: dict[Any, nn.Module] = {}
        self._plain: dict[nn.Module, PatchedLayer] = {}
        self._lock = threading.RLock()

    def module_names(self) -> Iterable[str]:
        """The names of all modules, with PEFT's layers instead of the modules inside them."""
        _, scan = self._refresh(False)
        return [*(prefix[:-1] for prefix in scan.names.values() if prefix), *scan.layers.values()]

    def is_training(self) -> bool:
        """Whether the model is in train mode."""
        return self._model.training

    def cover(self, name: str, modules: Iterable[str]) -> dict[str, Any]:
        """Prepare modules for a stored adapter.

        Args:
            name: the adapter's name, for messages.
            modules: the names of the modules for which it has weights.

        Returns:
            The modules' LoRA layers, by module name.

        Raises:
            AdapterMismatchError: there is no such module.
            AdapterUnsupportedError: the module can't have stored adapters.
        """
        with self._lock:
            return self._cover(name, modules)

    def _cover(self, name: str, modules: Iterable[str]) -> dict[str, Any]:
        known, scan = self._refresh(False)
        places = {prefix[:-1]: module for module, prefix in scan.names.items()}
        found: dict[str, Any] = {}
        new: list[tuple[nn.Module, tuple]] = []
        for module in modules:
            patched = known.get(module)
            if patched is not None:
                _check(name, module, patched.is_fast, patched.reason, patched.refusal)
                found[module] = patched.module
                continue
            place = places.get(module)
            if place is None:
                raise AdapterMismatchError(
                    f"adapter {name!r} has weights for {module}, which the model doesn't have: expected an adapter "
                    "that was trained for this model. Check its base_model_name_or_path."
                )
            check_plain(module, place, places[module.rpartition(".")[0]])
            layer = layer_for(place)
            choice = handlers.choose(module, layer, self._model)
            _check(name, module, getattr(choice.handler, "is_fast", False), choice.reason, choice.refusal)
            found[module] = layer
            new.append((place, (layer, module, *choice)))
        device = self.device()
        for module, layer in found.items():
            if base_device(layer) != device:
                raise AdapterUnsupportedError(
                    f"adapter {name!r} has weights for {module}, which is on {base_device(layer)}, and the store is "
                    f"on {device}: expected a model on one device. Use load_adapter."
                )
        for place, arguments in new:
            self.layers[arguments[0]] = place  # before the patch, because refreshes drop patched layers not in here
            self._plain[place] = self._patch(*arguments, place=place, inner=without_patch(place, is_hooked=True))
        if new:
            known, _ = self._refresh(True)
            found = {module: known[module].module for module in found}
        return found

    def update(self, scan: LayerScan, layers: Mapping[Any, PatchedLayer]) -> dict[Any, PatchedLayer]:
        """Follow changes of the model.

        Args:
            scan: a new scan of the model.
            layers: PEFT's layers.

        Returns:
            The layers that aren't part of the model.
        """
        for place, patched in list(self._plain.items()):
            if type(place) is not type(patched.module.base_layer):  # the layer represents what the module was before
                patched.remove()
                del self._plain[place], self.layers[patched.module]
        plain = {patched.module: patched for place, patched in list(self._plain.items()) if place in scan.names}
        self.names.update({layer: patched.name for layer, patched in (*layers.items(), *plain.items())})
        self.changes += 1
        return plain

    def remove(self) -> None:
        """Restore the forward of all modules."""
        for patched in self._plain.values():
            patched.remove()
        self._plain.clear()
        self.layers.clear()

    def device(self) -> torch.device:
        """The model's current device."""
        # several times faster than parameters()
        found = (each for module in self._model.modules() for each in module._parameters.values() if each is not None)
        return next(found).device


def device_of(model: nn.Module) -> torch.device:
    """The device of a model.

    Raises:
        UnsupportedError: it is on several devices, or on one that stores don't support.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type not in SERVED:
        raise UnsupportedError(
            f"adapter_store was called on a model whose parameters are on {', '.join(sorted(map(str, devices)))}: "
            f"expected all of them on one device of type {' or '.join(SERVED)}. With device_map, use load_adapter."
        )
    return devices.pop()


def _check(name: str, module: str, is_fast: bool, reason: str, refusal: str) -> None:
    if refusal or not is_fast:
        why = refusal.removesuffix(".") if refusal else f"{reason}. Use load_adapter"
        raise AdapterUnsupportedError(
            f"adapter {name!r} has weights for {module}, where stored adapters can't run: {why}."
        )
