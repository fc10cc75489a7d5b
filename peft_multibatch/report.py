"""The return types of ``mb.report()`` and ``mb.verify()``."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Literal, overload


Source = Literal["PEFT", "store"]
"""Where an adapter's weights are."""

State = Literal["ready", "refused", "broken"]
"""Whether an adapter can run; see ``AdapterReport``."""


@dataclass(frozen=True)
class LayerReport:
    """How one layer runs a mixed batch.

    Attributes:
        name: the layer's name in the model.
        how: ``"fused q_proj/k_proj/v_proj"``, ``"segmented"``, or ``"per segment"`` (PEFT's module, once per segment).
        reason: why it doesn't run in the fastest way, or the empty string.
    """

    name: str
    how: str
    reason: str = ""


@dataclass(frozen=True)
class AdapterReport:
    """The state of one adapter.

    Attributes:
        id: its integer id.
        name: its name.
        source: where its weights are: ``"PEFT"`` for PEFT's modules inside the model, or ``"store"``.
        version: a number that changes whenever the adapter changes; -1 if it can't be read.
        ranks: its ranks, in ascending order.
        dtype: the dtypes of its weights, such as ``"bfloat16"``.
        bytes: the memory of its weights.
        layers: the number of the model's layers in which it has weights.
        state: ``"ready"``; ``"refused"`` if it can't run in mixed batches; ``"broken"`` if PEFT couldn't run it
            either. Batches that don't name it aren't affected.
        reason: why it isn't ready, or doesn't run in the fastest way; or the empty string.
    """

    id: int
    name: str
    source: Source
    version: int
    ranks: tuple[int, ...]
    dtype: str
    bytes: int
    layers: int
    state: State
    reason: str = ""


@dataclass(frozen=True)
class StoreStats:
    """Counters of an adapter store.

    Attributes:
        registered: number of registered adapters.
        pinned: number of pinned adapters.
        host_adapters: number of adapters in host memory.
        host_bytes: bytes of host memory in use.
        host_bytes_kept: bytes of free blocks kept for reuse.
        max_host_bytes: the limit for both together.
        device_adapters: number of adapters on the device; on a CPU, this and the next three are 0.
        device_bytes: bytes of device memory in use.
        device_bytes_kept: bytes of free blocks kept for reuse.
        max_device_bytes: the limit for both together.
        hits: adapters that were in memory where calls compute when a call or request named them.
        misses: adapters that weren't.
        loads: number of adapters that were loaded.
        evictions: number of adapters that were evicted from where calls compute.
        bytes_read: bytes read from files.
        load_seconds: time that loads which have ended took, with waits for host memory, summed over threads.
    """

    registered: int
    pinned: int
    host_adapters: int
    host_bytes: int
    host_bytes_kept: int
    max_host_bytes: int
    device_adapters: int
    device_bytes: int
    device_bytes_kept: int
    max_device_bytes: int
    hits: int
    misses: int
    loads: int
    evictions: int
    bytes_read: int
    load_seconds: float

    def __str__(self) -> str:
        text = (
            f"store: {self.registered} adapters registered, {self.host_adapters} in host memory "
            f"({self.host_bytes} of {self.max_host_bytes} bytes)"
        )
        if self.max_device_bytes:
            text += f", {self.device_adapters} on the device ({self.device_bytes} of {self.max_device_bytes} bytes)"
        return f"{text}; {self.hits} hits, {self.misses} misses, {self.evictions} evictions"


@dataclass(frozen=True, repr=False)
class Report(Sequence[LayerReport]):
    """One entry per patched layer. It prints as a summary, with one line per adapter.

    Attributes:
        layers: the entries.
        backend: the backend in use.
        backend_reason: why it was chosen.
        adapters: one entry per adapter, in the order of their ids; only those stored adapters that are in memory.
        store: the counters of the adapter store, or None.
    """

    layers: tuple[LayerReport, ...]
    backend: str
    backend_reason: str
    adapters: tuple[AdapterReport, ...] = ()
    store: StoreStats | None = None

    def __len__(self) -> int:
        return len(self.layers)

    @overload
    def __getitem__(self, index: int) -> LayerReport: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LayerReport, ...]: ...
    def __getitem__(self, index: int | slice) -> LayerReport | tuple[LayerReport, ...]:
        return self.layers[index]

    def __repr__(self) -> str:
        store = "" if self.store is None else f", store={self.store.registered} registered"
        return f"Report(backend={self.backend!r}, layers={len(self.layers)}, adapters={len(self.adapters)}{store})"

    def __str__(self) -> str:
        lines = [f"backend {self.backend}: {self.backend_reason}"]
        lines += [f"{count:5} × {how}, such as {example}" for count, how, example in self._ways()]
        rows = [tuple(field.name for field in fields(AdapterReport)), *map(_cells, self.adapters)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows] if self.adapters else []
        lines += [str(self.store)] if self.store is not None else []
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        ways = [(str(count), how, example) for count, how, example in self._ways()]
        return (
            f"<p>backend <b>{html.escape(self.backend)}</b>: {html.escape(self.backend_reason)}</p>"
            + html_table(("layers", "how", "such as"), ways)
            + html_table([field.name for field in fields(AdapterReport)], map(_cells, self.adapters))
            + ("" if self.store is None else f"<p>{html.escape(str(self.store))}</p>")
        )

    def _ways(self) -> list[tuple[int, str, str]]:
        """The number of layers that run in each way, and the first of them."""
        examples: dict[tuple[str, str], str] = {}
        for layer in self.layers:
            examples.setdefault((layer.how, layer.reason), layer.name)
        counts = Counter((layer.how, layer.reason) for layer in self.layers)
        return [
            (counts[how, reason], f"{how}{f' ({reason})' if reason else ''}", example)
            for (how, reason), example in examples.items()
        ]


@dataclass(frozen=True)
class OutputCheck:
    """One output of a mixed batch, compared with PEFT's.

    Attributes:
        name: its name, such as ``"logits"`` or ``"hidden_states[1]"``.
        shape: its shape.
        error: the largest difference, relative to the output's largest value.
        wrong: samples whose difference is larger than the tolerance.
        note: what couldn't be compared and why, or the empty string.
        is_seen: whether it was compared, and differs between adapters.
    """

    name: str
    shape: tuple[int, ...]
    error: float
    wrong: tuple[int, ...]
    note: str = ""
    is_seen: bool = False


@dataclass(frozen=True)
class LayerCheck:
    """One run of a layer in a mixed batch.

    Attributes:
        name: the layer's name in the model.
        error: the largest difference of its output from PEFT's, relative to the largest value.
        problem: why its rows can't be in the order of the samples, or the empty string.
    """

    name: str
    error: float
    problem: str = ""


@dataclass(frozen=True, repr=False)
class Verification:
    """The comparison of a mixed batch with PEFT, one adapter at a time. True if everything that was compared is right.

    Attributes:
        outputs: one entry per tensor that the model returns.
        layers: one entry per run of a patched layer, in order.
        tolerance: the largest acceptable error.
    """

    outputs: tuple[OutputCheck, ...]
    layers: tuple[LayerCheck, ...]
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether some output differs between adapters, all outputs are right, and all layers have rows in order."""
        is_right = not any(each.wrong for each in self.outputs) and not any(each.problem for each in self.layers)
        return is_right and any(each.is_seen for each in self.outputs)

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        counts = f"outputs={len(self.outputs)}, layers={len(self.layers)}"
        return f"Verification(ok={self.ok}, {counts}, tolerance={self.tolerance:g})"

    def __str__(self) -> str:
        lines = [f"{'right' if self.ok else 'NOT VERIFIED'}, tolerance {self.tolerance:.0e}"]
        for each in self.outputs:
            wrong = f", wrong for samples {', '.join(map(str, each.wrong))}" if each.wrong else ""
            lines.append(
                f"{each.name} {[*each.shape]}: error {each.error:.1e}{wrong}{f' ({each.note})' * bool(each.note)}"
            )
        first = next((each for each in self.layers if each.error > self.tolerance), None)
        if first is not None:
            lines.append(f"first layer that differs: {first.name}, error {first.error:.1e}")
        lines += [f"{each.name}: {each.problem}" for each in self.layers if each.problem]
        return "\n".join(lines)


def _cells(adapter: AdapterReport) -> tuple[str, ...]:
    return tuple(", ".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in astuple(adapter))


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table for notebooks, with escaped texts."""

    def line(cells: Iterable[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
