"""The layers of a model as an adapter store sees them: by name, and patched once an adapter has weights there."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

from peft_multibatch.adapters.bank import base_device
from peft_multibatch.errors import AdapterMismatchError, AdapterUnsupportedError, UnsupportedError
from peft_multibatch.layers import table as handlers
from peft_multibatch.layers.patch import PatchedLayer
from peft_multibatch.layers.plain import check_plain, layer_for, without_patch
from peft_multibatch.model.scan import LayerScan


SERVED = ("cpu", "cuda")
"""Kinds of devices on which a store serves."""


class StoredLayers:
    """What a store asks the model.

    Attributes:
        names: of layers that run what stored adapters have there.
        changes: another number whenever layers came, went, or can't take part any more.
        layers: those that aren't PEFT's, and the modules for which they stand.

    Args:
        refresh: brings the handle up to date, and gives its layers, by their names, and its scan of the model.
        patch: makes a ``PatchedLayer``, from what its class takes but the router.
        model: the model that holds the layers.
    """

    def __init__(
        self,
        refresh: Callable[[bool], tuple[Mapping[str, PatchedLayer], LayerScan]],
        patch: Callable[..., PatchedLayer],
        model: nn.Module,
    ) -> None:
        self.names: MutableMapping[Any, str] = weakref.WeakKeyDictionary()  # calls may still run layers that are gone
        self.changes = 0
        self._refresh, self._patch, self._model = refresh, patch, model
        self.layers: dict[Any, nn.Module] = {}
        self._plain: dict[nn.Module, PatchedLayer] = {}
        self._lock = threading.RLock()

    def module_names(self) -> Iterable[str]:
        """Names of all modules, with PEFT's layers in the place of what they stand for."""
        _, scan = self._refresh(False)
        return [*(prefix[:-1] for prefix in scan.names.values() if prefix), *scan.layers.values()]

    def is_training(self) -> bool:
        """Whether the model is in train mode."""
        return self._model.training

    def cover(self, name: str, modules: Iterable[str]) -> dict[str, Any]:
        """LoRA layers by the names of modules, which from now on run what stored adapters have there.

        Raises:
            AdapterMismatchError: there is no such module.
            AdapterUnsupportedError: it can't take part.
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
                    f"adapter {name!r} has weights for {module}, and the model has no such module: expected an "
                    "adapter that was trained for this model. Look at its base_model_name_or_path."
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
                    f"adapter {name!r} has weights for {module}, which is on {base_device(layer)}, and the store "
                    f"serves {device}: expected a model on one device. Use load_adapter."
                )
        for place, arguments in new:
            self.layers[arguments[0]] = place  # first, because others look for layers that nobody knows
            self._plain[place] = self._patch(*arguments, place=place, inner=without_patch(place, is_hooked=True))
        if new:
            known, _ = self._refresh(True)
            found = {module: known[module].module for module in found}
        return found

    def update(self, scan: LayerScan, layers: Mapping[Any, PatchedLayer]) -> dict[Any, PatchedLayer]:
        """Take note of a new look at the model.

        Args:
            scan: the look.
            layers: PEFT's layers.

        Returns:
            The layers that aren't PEFT's.
        """
        plain = {patched.module: patched for place, patched in list(self._plain.items()) if place in scan.names}
        self.names.update({layer: patched.name for layer, patched in (*layers.items(), *plain.items())})
        self.changes += 1
        return plain

    def remove(self) -> None:
        """Give all modules their own forward back."""
        for patched in self._plain.values():
            patched.remove()
        self._plain.clear()
        self.layers.clear()

    def device(self) -> torch.device:
        """Where the model is now."""
        return next(iter(self._model.parameters())).device


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes.

    Raises:
        UnsupportedError: on several devices, or on one that stores don't serve.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type not in SERVED:
        raise UnsupportedError(
            f"adapter_store was called on a model whose parameters are on {', '.join(sorted(map(str, devices)))}: "
            f"expected all of them on one device of the kind {' or '.join(SERVED)}. With device_map, use load_adapter."
        )
    return devices.pop()


def _check(name: str, module: str, is_fast: bool, reason: str, refusal: str) -> None:
    if refusal or not is_fast:
        raise AdapterUnsupportedError(
            f"adapter {name!r} has weights for {module}, where stored adapters can't run: {refusal or reason}. Use "
            "load_adapter."
        )
