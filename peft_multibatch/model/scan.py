"""Finding a model's PEFT layers, and putting handlers in the place of their forwards."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from peft_multibatch.adapters import shards
from peft_multibatch.adapters.bank import Bank
from peft_multibatch.calls.router import Router
from peft_multibatch.compat import AuxiliaryTrainingWrapper, BaseTunerLayer, LoraLayer
from peft_multibatch.errors import UnsupportedError
from peft_multibatch.layers import table as handlers
from peft_multibatch.layers.patch import STATE, Patch


class Survey:
    """Every PEFT layer of a model as it was found, outermost ones only, and whether they would be found again.

    Attributes:
        layers: each layer, once wherever it is shared, and its name in the model.
        modules: all others, however many adapters there are.

    Raises:
        UnsupportedError: a part of the model is wrapped so that layers don't hold their weights as they compute.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[Any, str] = {}
        self._seen: set[nn.Module] = set()
        self._dicts: list[dict] = []  # of the children of all modules that aren't PEFT layers
        self._children: list[tuple] = []
        self.modules = [model]
        self._visit(model, "")
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
            and all(map(operator.is_, self._read(), self._held))
            and list(map(type, self.modules)) == self._types
        )

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
        self._dicts.append(module._modules)
        self._children.append(tuple(module._modules.values()))
        for key, child in module._modules.items():
            if child is None or child in self._seen:
                continue
            self._seen.add(child)
            self.modules.append(child)
            if isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                self.layers[child] = prefix + key
            else:
                self._visit(child, f"{prefix}{key}.")


def own_attribute(module: nn.Module, method: str) -> str:
    """Where the method is that calls arrive at behind accelerate's hooks, which move inputs and weights before."""
    # put in front of the hooks, ours would go with them when somebody removes them or adds others
    return "_old_forward" if method == "forward" and {"_hf_hook", "_old_forward"} <= module.__dict__.keys() else method


def replace(module: nn.Module, attribute: str, method: Callable) -> Callable[[], None]:
    """Set an instance attribute and return what undoes it, also where somebody else moved it in the meantime."""
    attributes = module.__dict__
    missing = object()
    before = attributes.get(attribute, missing)
    attributes[attribute] = method

    def undo() -> None:
        # accelerate moves a forward to another name when it adds a hook, and back when it removes one
        moved = ("forward", "_old_forward") if attribute in ("forward", "_old_forward") else (attribute,)
        for name in moved:
            if attributes.get(name) is not method:
                continue
            if before is not missing:
                attributes[name] = before
            elif name == attribute:
                del attributes[name]
            else:
                attributes[name] = types.MethodType(getattr(type(module), attribute), module)

    return undo


class Place:
    """A patched layer.

    Args:
        module: the layer.
        name: its name in the model.
        handler: what runs in the place of its forward.
        reason: why that isn't the fast one, or the empty string.
    """

    def __init__(self, module: Any, name: str, handler: Callable[..., Tensor], reason: str) -> None:
        self.module, self.name, self.handler, self.reason = module, name, handler, reason

    def patch(self, router: Router) -> None:
        """Put the handler in the place of the layer's forward."""
        attributes = self.module.__dict__
        if getattr(attributes.get("forward"), "__func__", None) in handlers.ALL and attributes.get(STATE) is None:
            del attributes["forward"]  # of a copy: what was put there belongs to the original
        attribute = own_attribute(self.module, "forward")
        bank = Bank([self.module]) if self.handler is handlers.linear else None
        attributes[STATE] = Patch(self.name, router, getattr(self.module, attribute), bank)
        self._undo = replace(self.module, attribute, types.MethodType(self.handler, self.module))

    def restore(self) -> None:
        """Put the layer's own forward back."""
        self._undo()
        self.module.__dict__.pop(STATE, None)
