"""What ``mb.report()`` returns: how every patched layer runs, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """How one layer runs a mixed batch.

    Attributes:
        name: the layer's name in the model.
        how: ``"fused q_proj/k_proj/v_proj"``, ``"segmented"`` or ``"per segment"``, PEFT's own module once a segment.
        reason: why it doesn't run the fastest way, or the empty string.
    """

    name: str
    how: str
    reason: str = ""


@dataclass(frozen=True)
class Report(Sequence[LayerReport]):
    """One entry per patched layer; printed, a summary with one line for every way of running.

    Attributes:
        layers: the entries.
        backend: the backend in use.
        backend_reason: why this one.
    """

    layers: tuple[LayerReport, ...]
    backend: str
    backend_reason: str

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index):
        return self.layers[index]

    def __str__(self) -> str:
        counts = Counter((layer.how, layer.reason) for layer in self.layers)
        lines = [f"backend {self.backend}: {self.backend_reason}"]
        for (how, reason), count in counts.items():
            example = next(layer.name for layer in self.layers if (layer.how, layer.reason) == (how, reason))
            lines.append(f"{count:5} × {how}{f' ({reason})' if reason else ''}, such as {example}")
        return "\n".join(lines)
