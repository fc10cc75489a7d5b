"""Watches PEFT's dictionary of configurations, to learn when adapters are added or deleted.

PEFT, and transformers for its own models, have a dictionary of configurations by adapter name, which they change
whenever an adapter is added or deleted. While a model is enabled, it is replaced by a ``WatchedConfigs``.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable
from typing import Any

from torch import nn

from peft_multibatch.plan.names import AdapterNames


CONFIGS = "peft_config"
"""The attribute of models and tuners with the dictionary."""


class WatchedConfigs(dict):
    """Configurations by adapter name. Copies and pickles are plain dictionaries.

    Args:
        configs: the dictionary that it replaces.
        names: notified of every adapter that is added or deleted.
    """

    def __init__(self, configs: dict[str, Any], names: AdapterNames) -> None:
        super().__init__(configs)
        self.original = configs
        self.names = names
        names.update(configs)

    def __setitem__(self, name: str, config: Any) -> None:
        self.names.check(name)  # before the entry exists
        super().__setitem__(name, config)
        self.names.add(name)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.names.remove(name)

    def pop(self, name: str, *default: Any) -> Any:
        found = super().pop(name, *default)
        self.names.remove(name)
        return found

    def popitem(self) -> tuple[str, Any]:
        name, config = super().popitem()
        self.names.remove(name)
        return name, config

    def clear(self) -> None:
        super().clear()
        self.names.update(())

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, config in dict(*args, **kwargs).items():
            self[name] = config

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def __ior__(self, other: Any) -> WatchedConfigs:  # type: ignore[misc]
        self.update(other)
        return self

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: dict) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return dict, (dict(self),)


def watch(model: nn.Module, names: AdapterNames, around: Iterable[nn.Module] = ()) -> None:
    """Watch a model's configurations, in all objects that reference the dictionary.

    Args:
        model: the model.
        names: notified of every adapter that is added or deleted.
        around: models that may share the configurations.
    """
    configs = model.__dict__.get(CONFIGS)
    if configs is None:
        if names.of_peft:
            names.update(())
    elif not isinstance(configs, WatchedConfigs) or configs.names is not names:
        _replace(configs, WatchedConfigs(configs, names), [model, *around])


def unwatch(model: nn.Module, around: Iterable[nn.Module] = ()) -> None:
    """Restore the original dictionary, with the current entries."""
    configs = model.__dict__.get(CONFIGS)
    if isinstance(configs, WatchedConfigs):
        configs.original.clear()
        configs.original.update(configs)
        _replace(configs, configs.original, [model, *around])


def _replace(old: dict, new: dict, known: Iterable[Any]) -> None:
    """Replace a dictionary in all objects that reference it; a model and its tuner share one.

    Args:
        old: the dictionary to replace.
        new: its replacement.
        known: objects that may reference it, because the garbage collector doesn't find them after ``gc.freeze()``.
    """
    holders = [*known, *(getattr(each, "base_model", None) for each in known), *gc.get_referrers(old)]
    for holder in holders:
        attributes = holder if type(holder) is dict else getattr(holder, "__dict__", None)
        if type(attributes) is dict and attributes.get(CONFIGS) is old:
            attributes[CONFIGS] = new
