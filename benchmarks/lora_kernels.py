"""Benchmark the kernels alone, with weights cold in the cache, as CUDA graphs.

    python benchmarks/lora_kernels.py                       # results/lora_kernels.csv beside this script
    python benchmarks/lora_kernels.py --sweep               # also tries launches other than the chosen one
    python benchmarks/lora_kernels.py --grid                # results/lora_kernels_grid.csv: many more points
    python benchmarks/lora_kernels.py --uneven              # _uneven.csv: plans whose segments differ much in length

Every point is launched for a plan that the host knows, and for any plan, as in compiled decoding and continuous
batching. Both are compared with float64 before they are timed. One graph runs the point on as many copies of the
weights as fill the cache twice, so that weights are always read from memory; x and y stay in the cache, as in a model.
The floor is the time to move the necessary bytes (each adapter in use once, x and y) at the bandwidth of a
device-to-device copy in the same run. The best engine is the fastest of the kernels of several engines, measured on an
H100 with the same method.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import csv
import multiprocessing
import statistics
import subprocess
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib
import torch
import triton
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table as Rows
from torch import Tensor

from peft_multibatch import SegmentBuffer, Segments
from peft_multibatch.adapters.tables import (
    LayerWeights,
    SlotRows,
    SlotWeights,
    TableBlock,
    TableRows,
    Tables,
    WeightTable,
)
from peft_multibatch.calls.buffers import capacity_for
from peft_multibatch.ops import launches as cutting
from peft_multibatch.ops import torch_backend, triton_backend


matplotlib.use("Agg")
import matplotlib.pyplot as plt


RESULTS = Path(__file__).parent / "results"
PROCESSES = 12  # compile in parallel
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on a CPU, tests check a point
console = Console(width=170)


class Point(NamedTuple):
    rows: int
    adapters: int
    inputs: int
    widths: tuple[int, ...]
    rank: int
    target: float | None = None
    engine: float | None = None
    spread: str = ""
    per_entry: int = 1

    def __str__(self) -> str:
        widths = "+".join(str(width) for width in self.widths)
        found = f"M{self.rows} L{self.adapters} r{self.rank} {self.inputs}→{widths} {self.spread}".rstrip()
        return found if self.per_entry == 1 else f"{found}, {self.per_entry} rows per entry"

    def ids(self) -> list[int]:
        """Return the adapter of every entry: by default, all have as many."""
        entries = self.rows // self.per_entry
        if self.spread in ("half", "three quarters"):  # of all entries have one adapter
            long = entries // 2 if self.spread == "half" else entries * 3 // 4
            rest = entries - long
            return [0] * long + [1 + entry * (self.adapters - 1) // rest for entry in range(rest)]
        if self.spread == "prompts":  # of five adapters, and 64 rows of decoding
            long = (entries - 64) // 5
            ids = [prompt * 5 % self.adapters for prompt in range(5) for _ in range(long)]
            return ids + [entry % self.adapters for entry in range(entries - len(ids))]
        if self.spread == "Zipf":
            shares = torch.tensor([1 / (1 + adapter) for adapter in range(self.adapters)])
            bounds = (shares.cumsum(0) / shares.sum() * entries).round().tolist()
            return [next(adapter for adapter, bound in enumerate(bounds) if entry < bound) for entry in range(entries)]
        return [entry * self.adapters // entries for entry in range(entries)]


QKV = (4096, 1024, 1024)
ONE = (4096,)
POINTS = [  # with the target and the best engine, in µs on an H100
    Point(1, 1, 4096, ONE, 16, 3.3, 7.7),
    Point(8, 8, 4096, ONE, 16, 4.5, 9.7),
    Point(32, 32, 4096, ONE, 16, 6, 14.0),
    Point(64, 64, 4096, ONE, 16, 8.3, 16.9),
    Point(256, 256, 4096, ONE, 16, 21, 35.8),
    Point(1, 1, 4096, QKV, 16, 3.7, 9.7),
    Point(32, 4, 4096, QKV, 16, 5.5, 12.5),
    Point(32, 32, 4096, QKV, 16, 9, 18.9),
    Point(128, 128, 4096, QKV, 16, 22, 37.5),
    Point(32, 8, 4096, ONE, 64, 7.5, 13.8),
    Point(32, 8, 4096, ONE, 128, 9.5, 17.0),
    Point(32, 8, 4096, QKV, 64, 10, 18.1),
    Point(32, 8, 4096, QKV, 128, 15, 25.2),
    Point(32, 8, 4096, (14336,), 16, 6.5, 13.0),
    Point(32, 8, 14336, ONE, 16, 6, 11.1),
    Point(512, 4, 4096, ONE, 16, 8, 16.1),
    Point(512, 4, 4096, ONE, 64, 12, 21.3),
    Point(512, 4, 4096, QKV, 16, 10, 20.6),
    Point(512, 4, 4096, QKV, 64, 16, 38.5),
    Point(4096, 8, 4096, ONE, 16, 38, 53.9),
    Point(4096, 8, 4096, ONE, 64, 45, 64.3),
    Point(4096, 8, 4096, QKV, 16, 52, 93.3),
    Point(4096, 8, 4096, QKV, 64, 62, 137.7),
    Point(8192, 32, 4096, ONE, 16, 75, 97.5),
    Point(8192, 32, 4096, ONE, 64, 84, 107.6),
    Point(8192, 32, 4096, QKV, 16, 108, 172.6),
    Point(8192, 32, 4096, QKV, 64, 135, 271.3),
]
# A Llama-8B layer.
LAYER = [
    Point(rows, adapters, inputs, widths, 16)
    for rows, adapters in ((32, 32), (64, 8), (64, 32), (64, 64), (256, 8), (256, 32), (1024, 8), (1024, 32))
    for inputs, widths in ((4096, QKV), (4096, ONE), (4096, (14336, 14336)), (14336, ONE))
]
UNEVEN = [
    Point(rows, adapters, inputs, widths, rank, spread=spread, per_entry=per_entry)
    for spread, per_entry, rank, shapes in (
        ("half", 1, 16, ((256, 8), (1024, 8), (1024, 32), (4096, 8), (4096, 32), (16384, 32))),
        ("half", 1, 64, ((1024, 8), (4096, 8))),
        ("half", 1, 128, ((1024, 8), (4096, 8))),
        ("half", 1, 256, ((1024, 8), (4096, 8))),
        ("half", 12, 16, ((768, 8),)),
        ("half", 5, 16, ((320, 8), (1280, 8))),
        ("half", 100, 16, ((1600, 8), (6400, 8))),
        ("half", 100, 128, ((6400, 8),)),
        ("even", 5, 16, ((320, 8), (1280, 8))),
        ("even", 100, 16, ((1600, 8),)),
        ("even", 512, 16, ((16384, 8), (16384, 32))),
        ("prompts", 1, 16, ((1024, 8), (1024, 32))),
        ("prompts", 1, 64, ((1024, 32),)),
        ("Zipf", 1, 16, ((64, 16), (256, 32), (1024, 8), (1024, 32), (4096, 32))),
        ("Zipf", 1, 64, ((256, 32), (4096, 8))),
        ("three quarters", 1, 16, ((32, 2), (128, 2), (512, 2), (2048, 2), (8192, 2))),
    )
    for rows, adapters in shapes
    for inputs, widths in ((4096, QKV), (4096, ONE), (4096, (14336, 14336)), (14336, ONE))
]
GRID = [
    Point(rows, adapters, hidden, (hidden,), rank)
    for hidden in (576, 2048, 8192)
    for rank in (8, 64)
    for rows in (1, 16, 64, 1024, 8192)
    for adapters in (1, 8, 64)
    if adapters <= rows
]


def random_parts(point: Point, dtype: torch.dtype) -> dict[int, list[LayerWeights]]:
    """Create random adapters, by slot."""
    return {
        slot: [
            LayerWeights(
                torch.randn(point.rank, point.inputs, device=DEVICE, dtype=dtype) / point.inputs**0.5,
                torch.randn(width, point.rank, device=DEVICE, dtype=dtype),
                0.5 + slot % 3,
            )
            for width in point.widths
        ]
        for slot in range(point.adapters)
    }


class Fixed:
    """An adapter that has weights in a single table."""

    def __init__(self, table: WeightTable, slot: int, parts: list[LayerWeights]) -> None:
        self.serial = slot
        self._table, self._parts = table, parts

    def rows(self, block: TableBlock) -> SlotRows:
        return block.read(
            self.serial, self.serial, lambda layers: self._parts if layers == self._table.layers else None
        )


class Case:
    """Random adapters, enough copies of them to fill the cache, and a plan; with ``for_any_plan`` at a fixed address,
    with ``is_whole`` never cut into pieces."""

    def __init__(
        self,
        point: Point,
        dtype: torch.dtype = torch.bfloat16,
        copies: int | None = None,
        for_any_plan: bool = False,
        is_whole: bool = False,
    ) -> None:
        self.point = point
        self.for_any_plan = for_any_plan
        per_adapter = point.rank * (point.inputs * len(point.widths) + sum(point.widths)) * dtype.itemsize
        self.bytes = point.adapters * per_adapter + point.rows * dtype.itemsize * (
            point.inputs + 2 * sum(point.widths)
        )
        if copies is None:
            cache = torch.cuda.get_device_properties(0).L2_cache_size
            copies = max(2, min(400, triton.cdiv(2 * cache, point.adapters * per_adapter)))
        self.parts = [random_parts(point, dtype) for _ in range(copies)]
        memory, slots = Tables(), max(16, point.adapters)
        self._tables = [
            memory.make(dtype, slots, [object() for _ in point.widths], {dtype}, DEVICE) for _ in self.parts
        ]
        for table, parts in zip(self._tables, self.parts):
            table.block.write({slot: Fixed(table, slot, row) for slot, row in parts.items()})
        self.tables = [table.describe(parts) for table, parts in zip(self._tables, self.parts)]
        whole = Segments.from_ids(point.ids())
        piece = cutting.piece_for(point.rows, triton_backend.padded(point.rank))
        self.segments = whole if is_whole else cutting.even_out(whole, point.rows, piece)
        self.longest = self.segments.longest * point.per_entry
        self.plan = self.segments.pack().to(DEVICE)
        if for_any_plan:
            buffer = SegmentBuffer(capacity_for(whole.num_entries), DEVICE)  # as PlanBuffers does
            is_long = point.per_entry >= cutting.LONG_ENTRY
            buffer.update(whole.cut(1 if is_long else cutting.piece_for(whole.num_entries)))
            self.plan = buffer.packed
        self.x = torch.randn(point.rows, point.inputs, device=DEVICE, dtype=dtype)
        self.ys = [torch.randn(point.rows, width, device=DEVICE, dtype=dtype) for width in point.widths]

    def run(self, table: TableRows, ys: list[Tensor], launch: cutting.Launch | None = None) -> None:
        if self.for_any_plan:
            triton_backend.add_(ys, self.x, self.point.widths, self.plan, [table])
            return
        product = triton_backend.product(
            ys, self.x, self.point.widths, self.segments.num_segments, self.longest, table, launch
        )
        product(ys, self.x, self.plan, table.rows)

    def check(self, launch: cutting.Launch | None = None) -> float:
        """Return the relative error of a product, compared with float64."""
        ys = [y.clone() for y in self.ys]
        expected = [y.double() for y in self.ys]
        weights: dict[int, SlotWeights] = {
            slot: [(part.lora_a.t().double(), part.lora_b.t().double(), part.scaling) for part in parts]
            for slot, parts in self.parts[0].items()
        }
        torch_backend.apply_(expected, self.x.double(), self.segments, weights)
        self.run(self.tables[0], ys, launch)
        return max(float((y.double() - e).norm() / e.norm()) for y, e in zip(ys, expected))

    def time(self, launch: cutting.Launch | None = None, repeats: int = 15) -> list[float]:
        """Return the time of one product in microseconds, for each of `repeats` replays."""
        scratch = [y.clone() for y in self.ys]
        self.run(self.tables[0], scratch, launch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for table in self.tables:
                self.run(table, scratch, launch)
        times = []
        for index in range(repeats + 3):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if index >= 3:
                times.append(begin.elapsed_time(end) * 1000 / len(self.tables))
            for y in scratch:
                y.zero_()
        return times


def choose(case: Case, limits: cutting.Limits) -> cutting.Launch:
    """Return the launch that the package chooses for a plan that it knows."""
    point, segments = case.point, case.segments
    rank, itemsize = triton_backend.padded(point.rank), case.x.itemsize
    return cutting.choose(segments.num_segments, case.longest, point.inputs, point.widths, rank, itemsize, limits)


def copy_bandwidth() -> float:
    """Measure bytes per microsecond of a large copy, counting bytes read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.numel() / (times * 1000)


def shrink_launches(chosen: cutting.Launch, point: Point) -> list[cutting.Launch]:
    """Return launches that divide K and rows differently."""
    per_adapter = triton.cdiv(point.rows, point.adapters)
    tiles = {16: chosen.tiles} if per_adapter <= 64 else {t: triton.cdiv(per_adapter, t) for t in (16, 32, 64, 128)}
    blocks = (64, 128, 256, 512) if per_adapter <= 64 and point.rank <= 32 else (32, 64, 128)
    expand = chosen.expand_tiles, chosen.expand_block_t
    return [
        cutting.with_splits(
            tiles[t], t, splits, k, chosen.block_n, warps, chosen.expand_warps, point.inputs, expand
        )._replace(by_columns=chosen.by_columns, shrink_stages=stages, shrink_registers=registers)
        for t in tiles
        for k in blocks
        for stages in (3, 4)
        for registers in {0, chosen.shrink_registers}
        for warps in (1, 2, 4, 8)
        for splits in {1, 2, 4, 8, 16, 32, triton.cdiv(point.inputs, k)}
        if splits <= triton.cdiv(point.inputs, k) and (t == 16 or (splits <= 4 and warps >= 2))
    ]


def expand_launches(chosen: cutting.Launch) -> list[cutting.Launch]:
    """Return launches that divide columns differently."""
    return [
        chosen._replace(block_n=n, expand_warps=warps, by_columns=by_columns)
        for n in (32, 64, 128, 256, 512, 1024)
        for warps in (1, 2, 4, 8)
        for by_columns in (False, True)
    ]


def compile_all(job: list[tuple[Point, list[cutting.Launch] | None]]) -> None:
    """Run launches once in a separate process, so that their kernels are in Triton's cache; None for the chosen one,
    and for any plan."""
    for point, candidates in job:
        if candidates is None:
            case = Case(point, copies=1, for_any_plan=True)
            case.run(case.tables[0], case.ys)
        for case in (Case(point, copies=1), *([Case(point, copies=1, is_whole=True)] if point.spread else [])):
            for launch in candidates or [choose(case, cutting.limits_of(DEVICE))]:
                with contextlib.suppress(triton.runtime.errors.OutOfResources):
                    case.run(case.tables[0], case.ys, launch)
    torch.cuda.synchronize()


def best_of(
    case: Case,
    candidates: list[cutting.Launch],
    best: cutting.Launch,
    pool: concurrent.futures.ProcessPoolExecutor,
) -> cutting.Launch:
    list(pool.map(compile_all, [[(case.point, candidates[start::PROCESSES])] for start in range(PROCESSES)]))
    found = statistics.median(case.time(best, 5)), best
    for launch in dict.fromkeys(candidates):
        with contextlib.suppress(triton.runtime.errors.OutOfResources):
            found = min(found, (statistics.median(case.time(launch, 5)), launch))
    return found[1]


def words(point: str) -> str:
    """Spell out a point such as ``M32 L8 r16 4096→4096``."""
    rows, adapters, rank, *rest = point.split(" ")
    plural = "" if adapters == "L1" else "s"
    counts = f"{rows[1:]} row{'' if rows == 'M1' else 's'}, {adapters[1:]} adapter{plural}, rank {rank[1:]}"
    return f"{counts},\n{', '.join(rest)}"


def plot(records: list[dict], path: Path) -> None:
    """Plot the floor, the measured times and the target of every point, if any has a target of those that have one."""
    records = [record for record in records if record["target_us"]] or records
    figure, axis = plt.subplots(figsize=(7.5, 0.42 * len(records) + 1))
    series = {"bytes floor": "floor_us", "known plan": "p50_us", "any plan": "any_plan_us", "target": "target_us"}
    for index, (label, key) in enumerate(series.items()):
        if not any(float(record[key] or 0) for record in records):
            continue
        places = [row + 0.2 * (index - 1.5) for row in range(len(records))]
        axis.barh(places, [float(record[key] or 0) for record in records], height=0.2, label=label)
    axis.set_yticks(range(len(records)), [words(record["point"]) for record in records], fontsize=8)
    axis.invert_yaxis()
    axis.set_ylim(len(records) - 0.4, -0.6)
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel(
        f"microseconds, shrink and expand, weights cold in cache\n{records[0]['gpu']}, commit {records[0]['commit']}"
    )
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def ratios(records: list[dict]) -> str:
    """Compare the points that have one with the best engine, and launches for any plan with those for a known one."""
    found = []
    for label, key in (("known plan", "p50_us"), ("any plan", "any_plan_us")):
        times = [each["engine_us"] / each[key] for each in records if each["engine_us"]]
        if times:
            mean, least = statistics.geometric_mean(times), min(times)
            found.append(
                f"{label}: the best engine takes {mean:.2f} times as long (geometric mean), at least {least:.2f}"
            )
    most = max(records, key=lambda each: each["any_plan_us"] / each["p50_us"])
    found.append(f"any plan / known plan: up to {most['any_plan_us'] / most['p50_us']:.2f} ({most['point']})")
    return "\n".join(found)


def main(
    sweep: bool = False,
    grid: bool = False,
    uneven: bool = False,
    only: str = "",
    out: Annotated[
        Path | None,
        typer.Option(
            help="the CSV; the plot is written next to it",
            show_default="results/lora_kernels.csv, _grid.csv or _uneven.csv",
        ),
    ] = None,
    commit: str = "",
) -> None:
    """Check and time every point; with --sweep, also search for better launches."""
    kind, points = ("_grid", GRID) if grid else ("_uneven", UNEVEN) if uneven else ("", POINTS + LAYER)
    out = out or RESULTS / f"lora_kernels{kind}.csv"
    points = [point for point in points if only in str(point)]
    gpu, bandwidth = torch.cuda.get_device_name(), copy_bandwidth()
    commit = commit or subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    pool = concurrent.futures.ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn"))
    list(pool.map(compile_all, [[(point, None) for point in points[start::PROCESSES]] for start in range(PROCESSES)]))
    records, table = [], Rows("point", "floor", "best engine", "target", "known plan", "any plan", "best of sweep", "")
    for point in track(points, description="points", console=console):
        torch.manual_seed(0)
        case = Case(point)
        chosen = choose(case, cutting.limits_of(DEVICE))
        fixed = Case(point, for_any_plan=True)
        error = max(case.check(chosen), fixed.check())
        if not error < 8e-3:
            raise SystemExit(f"{point}: relative error {error:.1e}; nothing is timed")
        times, any_plan = case.time(chosen), statistics.median(fixed.time())
        del fixed
        whole = statistics.median(Case(point, is_whole=True).time()) if uneven else None
        best_launch = chosen
        if sweep:
            best_launch = best_of(case, shrink_launches(chosen, point), chosen, pool)
            best_launch = best_of(case, expand_launches(best_launch), best_launch, pool)
        best = statistics.median(case.time(best_launch)) if sweep else statistics.median(times)
        if not case.check(best_launch) < 8e-3:
            raise SystemExit(f"{point}: the best launch {best_launch} is wrong")
        p20, p50, p80 = (sorted(times)[int(len(times) * q)] for q in (0.2, 0.5, 0.8))
        floor = case.bytes / bandwidth
        shown = "" if best_launch == chosen else str(tuple(best_launch))
        table.add_row(
            str(point),
            *(f"{v:.1f}" if v else "" for v in (floor, point.engine, point.target, p50, any_plan, best)),
            f"{tuple(chosen)} {shown}",
        )
        console.print(f"{point}: {p50:.2f}, for any plan {any_plan:.2f}" + (f", not cut {whole:.2f}" if whole else ""))
        records.append({
            "point": str(point), "floor_us": round(floor, 2), "engine_us": point.engine, "target_us": point.target,
            "p20_us": round(p20, 2), "p50_us": round(p50, 2), "p80_us": round(p80, 2),
            "any_plan_us": round(any_plan, 2), **({"whole_us": round(whole, 2)} if whole else {}),
            "sweep_us": round(best, 2) if sweep else "", "error": f"{error:.1e}",
            "copy_TB_s": round(bandwidth / 1e6, 2), "gpu": gpu, "torch": torch.__version__,
            "triton": triton.__version__, "commit": commit.strip(),
            "launch": " ".join(map(str, chosen)), "best_launch": " ".join(map(str, best_launch)),
        })  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    plot(records, out.with_suffix(".png"))
    console.print(f"{gpu}, copy {bandwidth / 1e6:.2f} TB/s; µs")
    console.print(table)
    console.print(ratios(records))


if __name__ == "__main__":
    typer.run(main)
