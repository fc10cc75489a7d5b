"""Parsing and checking an adapter's configuration, of which a store accepts only plain LoRA."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from peft import LoraConfig

from peft_multibatch.adapters.store.patterns import LONGEST, MOST_PATTERNS, NAME, Patterns, is_safe
from peft_multibatch.compat import check_target_module_exists
from peft_multibatch.errors import AdapterFileError, AdapterUnsupportedError


# Keys of LoRA's configuration that don't affect what a trained adapter computes.
WITHOUT_EFFECT = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
})  # fmt: skip

# Keys that are read, and the types of their values.
READ: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
    "target_modules": (list, str),
    "exclude_modules": (list, str, type(None)),
    "layers_to_transform": (list, int, type(None)),
    "layers_pattern": (list, str, type(None)),
}

# Keys for which only these values are accepted. Others must be off, as PEFT's new options are by default.
ONLY = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}

# Keys that PEFT knows are on with an empty list or dictionary, except for these.
EMPTY_IS_OFF = frozenset({"layer_replication", "modules_to_save", "target_parameters"})
KNOWN = frozenset(field.name for field in dataclasses.fields(LoraConfig))

MOST_NAMES = 8192
MOST_LISTS = 16


class Settings(NamedTuple):
    """The part of an adapter's configuration that affects what it computes.

    Attributes:
        rank: the rank of modules that no pattern matches.
        alpha: their ``lora_alpha``.
        is_rank_stabilized: whether alpha is divided by the square root of the rank instead of the rank.
        ranks: (pattern, rank) pairs.
        alphas: (pattern, alpha) pairs.
        targets: names of modules, or a pattern.
        excluded: names of modules, or a pattern, or None.
        layers: indices of layers, or None for all.
        layers_pattern: names of the lists that contain these layers.
        dropout: the probability of its dropout in train mode.
    """

    rank: int
    alpha: float
    is_rank_stabilized: bool
    ranks: tuple[tuple[str, int], ...]
    alphas: tuple[tuple[str, float], ...]
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str | None
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    dropout: float

    def names(self, patterns: Patterns, modules: Iterable[str]) -> set[str]:
        """The modules that PEFT would adapt.

        Args:
            patterns: matches the patterns.
            modules: the names of all modules.

        Raises:
            AdapterUnsupportedError: matching takes too long.
        """
        targets: Any = self.targets
        excluded, layers = self.excluded, None if self.layers is None else [*self.layers]
        if isinstance(excluded, str):
            modules = [module for module in modules if not patterns.matches(excluded, module)]
            excluded = None
        if isinstance(targets, str):
            modules = [module for module in modules if patterns.matches(targets, module)]
            targets = {*modules}
        config = _Config(targets, excluded, layers, [*self.layers_pattern])
        return {module for module in modules if check_target_module_exists(config, module)}

    def rank_of(self, patterns: Patterns, module: str) -> int:
        """The rank in a module."""
        return patterns.first(self.ranks, module, self.rank)

    def scaling_of(self, patterns: Patterns, module: str, rank: int) -> float:
        """The scaling in a module where the adapter has this rank."""
        alpha = patterns.first(self.alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.is_rank_stabilized else alpha / rank


class _Config(NamedTuple):
    """The attributes of a configuration that PEFT's matching reads."""

    target_modules: Any
    exclude_modules: Any
    layers_to_transform: Any
    layers_pattern: Any
    target_parameters: None = None


def read_settings(name: str, config: Mapping[str, Any]) -> Settings:
    """Parse and check an adapter's configuration.

    Args:
        name: the adapter's name, for messages.
        config: the contents of its ``adapter_config.json``.

    Raises:
        AdapterUnsupportedError: it isn't plain LoRA.
        AdapterFileError: a value is invalid.
    """
    for key, value in sorted(config.items(), key=lambda item: item[0] not in ONLY):  # checks the type first
        is_empty = value in ("", [], {}) and (key not in KNOWN or key in EMPTY_IS_OFF)
        is_off = value is None or value is False or is_empty
        if key in ONLY:
            if not any(type(value) is type(each) and value == each for each in ONLY[key]):
                raise _unsupported(name, key, value)
        elif key not in WITHOUT_EFFECT and key not in READ and not is_off:
            raise _unsupported(name, key, value)
    values = {"lora_dropout": 0.0, "use_rslora": False, "lora_alpha": 8, **config}
    if "peft_type" not in config:
        raise _wrong(name, "peft_type", None)
    for key, types in READ.items():
        if type(values.get(key)) not in types:
            raise _wrong(name, key, values.get(key))
    try:
        LoraConfig(**{key: config[key] for key in (*READ, "task_type") if key in config})
    except (TypeError, ValueError) as error:
        raise AdapterFileError(
            f"adapter {name!r} has a configuration that PEFT refuses ({str(error)[:200]}): expected one that PEFT's "
            "save_pretrained writes. Save the adapter again."
        ) from error
    ranks, alphas = (_pattern(name, key, values.get(key)) for key in ("rank_pattern", "alpha_pattern"))
    layers = values.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if values["r"] < 1 or any(type(rank) is not int or rank < 1 for _, rank in ranks):
        raise _wrong(name, "r", [values["r"], *(rank for _, rank in ranks)])
    if not _is_finite(values["lora_alpha"]):
        raise _wrong(name, "lora_alpha", values["lora_alpha"])
    if not 0 <= values["lora_dropout"] <= 1:
        raise _wrong(name, "lora_dropout", values["lora_dropout"])
    if layers is not None and any(type(each) is not int for each in layers):
        raise _wrong(name, "layers_to_transform", layers)
    if isinstance(values["target_modules"], str) and values["target_modules"].lower() == "all-linear":
        raise AdapterUnsupportedError(
            f"adapter {name!r} has target_modules='all-linear', which PEFT replaces with module names before saving: "
            "expected module names. Load the adapter with load_adapter, and save it again."
        )
    return Settings(
        values["r"],
        values["lora_alpha"],
        values["use_rslora"],
        ranks,
        alphas,
        _names(name, "target_modules", values["target_modules"]),
        _names(name, "exclude_modules", values.get("exclude_modules")) or None,
        tuple(layers) if layers else None,
        _strings(name, "layers_pattern", values.get("layers_pattern")),
        float(values["lora_dropout"]),
    )


def _pattern(name: str, key: str, value: Any) -> tuple[tuple[str, Any], ...]:
    if len(value or ()) > MOST_PATTERNS:
        raise _wrong(name, key, f"{len(value)} patterns")
    for pattern, number in (value or {}).items():
        _check_pattern(name, key, pattern)
        if not _is_finite(number):
            raise _wrong(name, key, value)
    return tuple((value or {}).items())


def _names(name: str, key: str, value: Any) -> tuple[str, ...] | str:
    if isinstance(value, str):
        _check_pattern(name, key, value)
        return value
    if len(value or ()) > MOST_NAMES or any(not isinstance(each, str) for each in value or ()):
        raise _wrong(name, key, value)
    return tuple(sorted(value or ()))


def _strings(name: str, key: str, value: Any) -> tuple[str, ...]:
    found = (value,) if value and isinstance(value, str) else tuple(value or ())
    if len(found) > MOST_LISTS:
        raise _wrong(name, key, value)
    if any(not isinstance(each, str) for each in found):
        raise _wrong(name, key, value)
    if any(not NAME.fullmatch(each) for each in found):  # PEFT would take it for a pattern
        raise _unsupported(name, key, value)
    return found


def _check_pattern(name: str, key: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise _wrong(name, key, pattern)
    try:
        is_supported = is_safe(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _wrong(name, key, pattern) from error
    if not is_supported:
        raise AdapterUnsupportedError(
            f"adapter {name!r} has the pattern {pattern[:80]!r} in {key}: expected at most {LONGEST} characters, "
            "without repeated groups, references, flags, and characters that no module's name has. Write module names "
            "instead, or use load_adapter."
        )


def _is_finite(value: Any) -> bool:
    if type(value) not in (int, float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _unsupported(name: str, key: str, value: Any) -> AdapterUnsupportedError:
    return AdapterUnsupportedError(
        f"adapter {name!r} has {key}={repr(value)[:80]} in its configuration: expected plain LoRA on linear layers, "
        "because a store supports only lora_A and lora_B. Use load_adapter."
    )


def _wrong(name: str, key: str, value: Any) -> AdapterFileError:
    return AdapterFileError(
        f"adapter {name!r} has {key}={repr(value)[:80]} in its configuration: expected a value that PEFT's "
        "save_pretrained writes. Save the adapter again."
    )
