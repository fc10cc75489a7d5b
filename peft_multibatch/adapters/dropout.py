"""The seed and step that determine an adapter's dropout masks, shared by all of its versions."""

from __future__ import annotations

import hashlib
import threading
from typing import Any, NamedTuple

import torch


class Draw(NamedTuple):
    """The seed and step of an adapter's masks in one call.

    Attributes:
        seed: torch's seed when the adapter first applied dropout.
        step: the number of earlier calls in which it applied dropout.
    """

    seed: int
    step: int


class DropoutState:
    """The seed and step of one adapter, independent of other adapters.

    The seed is ``torch.initial_seed()``, the last argument of ``torch.manual_seed``. A number drawn from torch's
    generator would depend on what else draws from it.

    Attributes:
        name: the adapter's name, so that adapters with the same seed have different masks.
        seed: None until the adapter first applies dropout.
        step: the number of calls so far in which it applied dropout.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seed: int | None = None
        self.step = 0
        self._keys: dict[tuple[int, str], int] = {}
        self._lock = threading.Lock()

    def draw(self) -> Draw:
        """Begin a call that applies dropout."""
        with self._lock:
            if self.seed is None:
                self.seed = torch.initial_seed()
            found = Draw(self.seed, self.step)
            self.step += 1
        return found

    def key(self, seed: int, layer: str) -> int:
        """The 64-bit key of the masks in a layer, which differs between processes.

        Args:
            seed: the seed of a draw.
            layer: the layer's name in the model.
        """
        found = self._keys.get((seed, layer))
        if found is None:
            words = "\0".join([str(seed), str(_rank()), self.name, layer])
            digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
            found = self._keys[seed, layer] = int.from_bytes(digest, "little")
        return found

    def reset(self) -> None:
        """Start over, with torch's seed at the next use."""
        self.load_state_dict({"seed": None, "step": 0})

    def state_dict(self) -> dict[str, Any]:
        """The seed and step."""
        with self._lock:
            return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        with self._lock:
            self.seed, self.step = state["seed"], state["step"]
            self._keys = {}


def _rank() -> int:
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if is_distributed else 0
