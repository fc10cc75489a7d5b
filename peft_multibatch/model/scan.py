"""Finding a model's PEFT layers, and knowing whether they would be found again."""

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
    """The model that holds the layers: what a ``PeftModel`` wraps."""
    if isinstance(model, (PeftModel, PeftMixedModel)):
        model = model.base_model
    return model.model if isinstance(model, BaseTuner) else model


class LayerScan:
    """Every PEFT layer of a model as it was found, outermost ones only, and whether they would be found again.

    Attributes:
        layers: each layer, once wherever it is shared, and its name in the model.
        modules: all others, however many adapters there are.
        buffers: the dictionaries of these that hold any.
        names: of the modules, the ones that may have PEFT layers as children, and how such children's names begin.

    Raises:
        UnsupportedError: a part of the model is wrapped so that layers don't hold their weights as they compute.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[Any, str] = {}
        self._seen: set[nn.Module] = set()
        self._dicts: list[dict] = []  # of the children of all modules that aren't PEFT layers
        self._children: list[tuple] = []
        self.modules = [model]
        self.names: dict[nn.Module, str] = {}
        self._visit(model, "")
        self.buffers = [module._buffers for module in self.modules if module._buffers]
        self._types = list(map(type, self.modules))  # which fully_shard changes
        if any(isinstance(module, shards.FLATTENED) for module in self.modules):
            raise UnsupportedError(
                "a part of the model is wrapped in FullyShardedDataParallel, which flattens weights: expected FSDP2, "
                "which keeps them apart. Use torch.distributed.fsdp.fully_shard, or fsdp_version 2 in accelerate."
            )
        self._held = self._read()

    def holds(self) -> bool:
        """Whether all modules still have the children that they had, and LoRA layers the dictionaries."""
        return (
            list(map(tuple, map(dict.values, self._dicts))) == self._children
            and self.holds_dictionaries()
            and list(map(type, self.modules)) == self._types
        )

    def holds_dictionaries(self) -> bool:
        """Whether all LoRA layers still have the dictionaries that they had."""
        return all(map(operator.is_, self._read(), self._held))

    def is_gathered(self) -> bool:
        """Whether FSDP shards any part of the model, and gathers its weights when it runs."""
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
                if isinstance(child, AuxiliaryTrainingWrapper):  # what it wraps may run itself again in `backward`
                    self.modules += child.modules()
            else:
                self._visit(child, f"{prefix}{key}.")
