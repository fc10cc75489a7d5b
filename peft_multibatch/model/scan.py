"""Finding a model's PEFT layers, and detecting when to look for them again."""

from __future__ import annotations

import operator
from typing import Any

from torch import nn

from peft_multibatch.adapters import shards
from peft_multibatch.compat import (
    AuxiliaryTrainingWrapper,
    BaseTuner,
    BaseTunerLayer,
    LoraLayer,
    PeftMixedModel,
    PeftModel,
)
from peft_multibatch.errors import UnsupportedError


def inner_model(model: Any) -> Any:
    """The model that contains the layers, which a ``PeftModel`` wraps."""
    if isinstance(model, (PeftModel, PeftMixedModel)):
        model = model.base_model
    return model.model if isinstance(model, BaseTuner) else model


class LayerScan:
    """The outermost PEFT layers of a model, and a check whether this is still up to date.

    Attributes:
        layers: the layers and their names in the model; shared layers only once.
        modules: all modules of the model, without the adapters inside PEFT layers.
        buffers: the buffer dictionaries of these modules, if not empty.
        names: the modules that may have PEFT layers as children -> the prefix of their children's names.

    Raises:
        UnsupportedError: a part of the model is wrapped in FullyShardedDataParallel.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[Any, str] = {}
        self._seen: set[nn.Module] = set()
        self._dicts: list[dict] = []  # the child dictionaries of all modules that aren't PEFT layers
        self._children: list[tuple] = []
        self.modules = [model]
        self.names: dict[nn.Module, str] = {}
        self._visit(model, "")
        self.buffers = [module._buffers for module in self.modules if module._buffers]
        self._types = list(map(type, self.modules))  # fully_shard changes them
        if any(isinstance(module, shards.FLATTENED) for module in self.modules):
            raise UnsupportedError(
                "a part of the model is wrapped in FullyShardedDataParallel, which flattens weights: expected FSDP2, "
                "which doesn't. Use torch.distributed.fsdp.fully_shard, or fsdp_version 2 in accelerate."
            )
        self._held = self._read()

    def holds(self) -> bool:
        """Whether all modules still have the same children, and LoRA layers the same dictionaries."""
        return (
            list(map(tuple, map(dict.values, self._dicts))) == self._children
            and self.holds_dictionaries()
            and list(map(type, self.modules)) == self._types
        )

    def holds_dictionaries(self) -> bool:
        """Whether all LoRA layers still have the same dictionaries."""
        return all(map(operator.is_, self._read(), self._held))

    def is_gathered(self) -> bool:
        """Whether FSDP shards any part of the model and gathers its weights when it runs."""
        return any(isinstance(module, shards.GATHERED) for module in self.modules)

    def _read(self) -> list[Any]:
        return [
            held
            for layer in self.layers
            if isinstance(layer, LoraLayer)
            for held in (layer._modules.get("lora_A"), layer._modules.get("lora_B"), layer.__dict__.get("scaling"))
        ]

    def _visit(self, module: nn.Module, prefix: str) -> None:
        self.names[module] = prefix
        self._dicts.append(module._modules)
        self._children.append(tuple(module._modules.values()))
        for key, child in module._modules.items():
            if child is None or child in self._seen:
                continue
            self._seen.add(child)
            self.modules.append(child)
            if isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                self.layers[child] = prefix + key
                if isinstance(child, AuxiliaryTrainingWrapper):  # modules inside may use gradient checkpointing
                    self.modules += child.modules()
            else:
                self._visit(child, f"{prefix}{key}.")
