"""What the dropout masks of an adapter follow from: a seed and a count, which stay with it from version to version."""

from __future__ import annotations

import hashlib
import threading
from typing import Any, NamedTuple

import torch


class Draw(NamedTuple):
    """One call's share of an adapter's masks.

    Attributes:
        seed: torch's, as it was when the adapter first dropped anything.
        step: number of calls before this one in which it dropped anything.
    """

    seed: int
    step: int


class DropoutState:
    """The seed and the step of one adapter, which no other adapter has any part in.

    The seed is ``torch.initial_seed()``, what ``torch.manual_seed`` was called with last, and not a number that is
    drawn: how many others draw before would change it.

    Attributes:
        name: the adapter's name, which makes its masks other ones than those of all others with the same seed.
        seed: None until the adapter drops anything for the first time.
        step: number of calls so far in which it dropped anything.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seed: int | None = None
        self.step = 0
        self._keys: dict[tuple[int, str], int] = {}
        self._lock = threading.Lock()

    def draw(self) -> Draw:
        """A call begins to drop."""
        with self._lock:
            if self.seed is None:
                self.seed = torch.initial_seed()
            found = Draw(self.seed, self.step)
            self.step += 1
        return found

    def key(self, seed: int, layer: str) -> int:
        """The key of the masks in a layer: 64 bits, another one on each of several processes.

        Args:
            seed: of a draw.
            layer: its name in the model.
        """
        found = self._keys.get((seed, layer))
        if found is None:
            words = "\0".join([str(seed), str(_rank()), self.name, layer])
            digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
            found = self._keys[seed, layer] = int.from_bytes(digest, "little")
        return found

    def reset(self) -> None:
        """Begin anew, with the seed that torch has then."""
        self.load_state_dict({"seed": None, "step": 0})

    def state_dict(self) -> dict[str, Any]:
        """Seed and step."""
        with self._lock:
            return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one was."""
        with self._lock:
            self.seed, self.step = state["seed"], state["step"]
            self._keys = {}


def _rank() -> int:
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if is_distributed else 0
