"""Which adapters a model has, and which it ever had: learned when PEFT adds and deletes them, not when somebody looks.

PEFT, and transformers for its own models, keep a dictionary of configurations by name, and change it whenever an
adapter comes or goes. A ``WatchedConfigs`` stands in its place while a model is enabled.
"""

from __future__ import annotations

import copy
import gc
from typing import Any

from torch import nn


CONFIGS = "peft_config"
"""Attribute of models and tuners that holds the dictionary."""


class WatchedConfigs(dict):
    """Configurations by adapter name. A copy or a pickle of it is a plain dictionary.

    Attributes:
        ever: every name that was ever added, in the order in which they came.
        changes: how often it was changed.
        original: the dictionary in whose place it stands.
    """

    def __init__(self, configs: dict[str, Any]) -> None:
        super().__init__(configs)
        self.ever: dict[str, None] = dict.fromkeys(configs)
        self.changes = 0
        self.original = configs

    def _changed(self) -> None:
        self.ever.update(dict.fromkeys(self))
        self.changes += 1

    def __setitem__(self, name: str, config: Any) -> None:
        super().__setitem__(name, config)
        self.ever.setdefault(name)  # the one that came, however many there are
        self.changes += 1

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.changes += 1

    def pop(self, *args: Any) -> Any:
        self.changes += 1
        return super().pop(*args)

    def popitem(self) -> tuple[str, Any]:
        self.changes += 1
        return super().popitem()

    def clear(self) -> None:
        self.changes += 1
        super().clear()

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **kwargs)
        self._changed()

    def setdefault(self, name: str, default: Any = None) -> Any:
        found = super().setdefault(name, default)
        self._changed()
        return found

    def __ior__(self, other: Any) -> WatchedConfigs:  # type: ignore[misc]
        self.update(other)
        return self

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: dict) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return dict, (dict(self),)


NONE = WatchedConfigs({})
"""What models without adapters have: always the same, so that nothing seems to have changed."""


def watch(model: nn.Module) -> WatchedConfigs:
    """A model's configurations, watched from now on wherever an object holds them; none where it has none."""
    configs = model.__dict__.get(CONFIGS)
    if configs is None:
        return NONE
    if not isinstance(configs, WatchedConfigs):
        _replace(configs, WatchedConfigs(configs))
    return model.__dict__[CONFIGS]


def unwatch(model: nn.Module) -> None:
    """Put the dictionary back that was there before, as it would be by now."""
    configs = model.__dict__.get(CONFIGS)
    if isinstance(configs, WatchedConfigs):
        configs.original.clear()
        configs.original.update(configs)
        _replace(configs, configs.original)


def _replace(old: dict, new: dict) -> None:
    """Put one dictionary in the place of another in all objects that hold it: a model and its tuner share one."""
    for holder in gc.get_referrers(old):
        attributes = holder if type(holder) is dict else getattr(holder, "__dict__", None)
        if type(attributes) is dict and attributes.get(CONFIGS) is old:
            attributes[CONFIGS] = new
