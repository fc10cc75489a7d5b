"""The weights of one projection group: for every slot and slice, a reference to the tensors that PEFT holds.

A bank owns no weights and copies none. It reads PEFT's own dictionaries when a call begins, so that whatever happened
to an adapter since the last call (an optimizer step, ``.data`` written in place, ``set_scale``, a hot-swap, ``.to()``,
another adapter under the same name) is what the next call computes with, and PEFT's parameters stay where they are.
docs/explanation/bank.md says why weights aren't stacked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_multibatch.errors import ModelStateError


if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from peft_multibatch.ops.torch_backend import SlotWeights


class Bank:
    """Adapter weights of one projection group, by slot.

    Args:
        layers: the group's LoRA layers, one a slice, in the order of their outputs.
        names: the handle's list of adapter names, by slot; None where an adapter was deleted. Not copied.
    """

    def __init__(self, layers: Sequence[LoraLayer], names: list[str | None]) -> None:
        self.layers = tuple(layers)
        self.names = names
        self.slice_offsets = [0, *accumulate(layer.out_features for layer in layers)]
        # What compiled graphs read, written by `sync`: PEFT's tensors slot by slot, and their ranks and scalings.
        self.lora_a: list[Tensor] = []
        self.lora_b: list[Tensor] = []
        self.ranks: Tensor | None = None
        self.scalings: Tensor | None = None

    def parameters(self, slot: int) -> Iterator[tuple[Tensor, Tensor, float] | None]:
        """For every slice an adapter's ``lora_A`` ``[R, K]``, ``lora_B`` ``[N, R]`` and scaling, or None without any.

        Raises:
            ModelStateError: the weights are on the meta device, as accelerate's offloading leaves them.
        """
        name = self.names[slot]
        for layer in self.layers:
            # a module's `_modules` is read because `nn.ModuleDict` and `nn.Module` attribute look-ups cost ten times
            # more
            lora_a = layer.lora_A._modules.get(name)
            if lora_a is None:
                yield None
                continue
            a, b = lora_a._parameters["weight"], layer.lora_B._modules[name]._parameters["weight"]
            if a.is_meta or b.is_meta:
                raise ModelStateError(
                    f"the weights of adapter {name!r} are on the meta device, as offloading leaves them between "
                    "calls: expected them on a real device. Load the adapters without offloading."
                )
            yield a, b, float(layer.scaling[name])

    def weights(self, slot: int) -> SlotWeights:
        """``parameters`` as products take them: ``lora_A`` and ``lora_B`` transposed, still PEFT's own memory."""
        return [part and (part[0].t(), part[1].t(), part[2]) for part in self.parameters(slot)]

    def gather(self, slots: Iterable[int]) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """What the ops take for these slots: ``lora_A``, ``lora_B``, ranks ``[S, I]`` and scalings ``[S, I]``.

        Both lists have ``S * I`` entries; those of an adapter that lacks a slice have rank 0.
        """
        parts = [
            part or self._absent(layer) for slot in slots for layer, part in zip(self.layers, self.parameters(slot))
        ]
        shape = -1, len(self.layers)
        ranks = torch.tensor([a.shape[0] for a, _, _ in parts], dtype=torch.int32).view(shape)
        scalings = torch.tensor([scaling for _, _, scaling in parts], dtype=torch.float32).view(shape)
        return [a for a, _, _ in parts], [b for _, b, _ in parts], ranks, scalings

    def sync(self) -> None:
        """Bring what compiled graphs read up to date, in place wherever the set of adapters is still the same."""
        self.lora_a, self.lora_b, ranks, scalings = self.gather(range(len(self.names)))
        if self.ranks is not None and self.scalings is not None and self.ranks.shape == ranks.shape:
            self.ranks.copy_(ranks)
            self.scalings.copy_(scalings)
        else:
            self.ranks, self.scalings = ranks, scalings

    @staticmethod
    def _absent(layer: LoraLayer) -> tuple[Tensor, Tensor, float]:
        weight = layer.get_base_layer().weight
        return weight.new_empty(0, layer.in_features), weight.new_empty(layer.out_features, 0), 0.0
