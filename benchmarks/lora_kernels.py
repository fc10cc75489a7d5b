"""Benchmark the kernels alone, with weights cold in the cache, as CUDA graphs.

    python benchmarks/lora_kernels.py                       # results/lora_kernels.csv beside this script
    python benchmarks/lora_kernels.py --sweep               # also tries launches other than the chosen one
    python benchmarks/lora_kernels.py --grid                # results/lora_kernels_grid.csv: many more points
    python benchmarks/lora_kernels.py --graphs              # results/lora_kernels_graphs.csv: launches for any plan

Every point is compared with float64 before it is timed. One graph runs the point on as many copies of the weights as
fill the cache twice, so that weights are always read from memory; x and y stay in the cache, as in a model. The floor
is the time to move the necessary bytes (each adapter in use once, x and y) at the bandwidth of a device-to-device copy
in the same run.
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
from peft_multibatch.ops import launches as cutting
from peft_multibatch.ops import torch_backend, triton_backend
from peft_multibatch.plan.segments import piece_for


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
    target: float | None

    def __str__(self) -> str:
        widths = "+".join(str(width) for width in self.widths)
        return f"M{self.rows} L{self.adapters} r{self.rank} {self.inputs}→{widths}"


QKV = (4096, 1024, 1024)
POINTS = [
    Point(1, 1, 4096, (4096,), 16, 3.5),
    Point(32, 32, 4096, (4096,), 16, 6),
    Point(64, 64, 4096, (4096,), 16, 8),
    Point(256, 256, 4096, (4096,), 16, 19),
    Point(1, 1, 4096, QKV, 16, 4),
    Point(32, 32, 4096, QKV, 16, 9),
    Point(128, 128, 4096, QKV, 16, 19),
    Point(32, 8, 4096, QKV, 128, 15),
    Point(32, 8, 14336, (4096,), 16, 5.5),
    Point(512, 4, 4096, QKV, 16, 10),
    Point(4096, 8, 4096, (4096,), 16, 36),
    Point(4096, 8, 4096, QKV, 16, 50),
    Point(4096, 8, 4096, QKV, 64, 58),
    Point(8192, 32, 4096, (4096,), 64, 80),
]
# The rest of a Llama-8B layer at two decode points.
REST = [
    Point(rows, rows, inputs, widths, 16, None)
    for rows in (32, 64)
    for inputs, widths in ((4096, (14336, 14336)), (14336, (4096,)))
]
GRID = [
    Point(rows, adapters, hidden, (hidden,), rank, None)
    for hidden in (576, 2048, 8192)
    for rank in (8, 64)
    for rows in (1, 16, 64, 1024, 8192)
    for adapters in (1, 8, 64)
    if adapters <= rows
]
# A Llama-8B layer in a graph that must serve any plan, as in compiled decoding and continuous batching.
GRAPHS = [
    Point(rows, adapters, inputs, widths, 16, None)
    for rows in (64, 256, 1024)
    for adapters in (8, 32)
    for inputs, widths in ((4096, QKV), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))
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
    """Random adapters, enough copies of them to fill the cache, and a plan; with ``for_any_plan`` at a fixed
    address."""

    def __init__(
        self,
        point: Point,
        dtype: torch.dtype = torch.bfloat16,
        copies: int | None = None,
        for_any_plan: bool = False,
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
        self.segments = Segments.from_ids([row * point.adapters // point.rows for row in range(point.rows)])
        self.plan = self.segments.pack().to(DEVICE)
        if for_any_plan:
            buffer = SegmentBuffer(max(point.rows, 1024), DEVICE)
            buffer.update(self.segments.cut(piece_for(point.rows)))
            self.plan = buffer.packed
        self.x = torch.randn(point.rows, point.inputs, device=DEVICE, dtype=dtype)
        self.ys = [torch.randn(point.rows, width, device=DEVICE, dtype=dtype) for width in point.widths]

    def run(self, table: TableRows, ys: list[Tensor], launch: cutting.Launch | None = None) -> None:
        if self.for_any_plan:
            triton_backend.add_(ys, self.x, self.point.widths, self.plan, [table])
            return
        product = triton_backend.product(
            ys, self.x, self.point.widths, self.segments.num_segments, self.segments.longest, table, launch
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


def choose(case: Case, processors: int) -> cutting.Launch:
    """Return the launch that the package chooses for a plan that it knows."""
    point, segments = case.point, case.segments
    rank = triton_backend.padded(point.rank)
    return cutting.choose(segments.num_segments, segments.longest, point.inputs, point.widths, rank, processors)


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
    return [
        cutting.cut(tiles[t], t, splits, k, chosen.block_n, warps, chosen.expand_warps, point.inputs)
        for t in tiles
        for k in blocks
        for warps in (1, 2, 4, 8)
        for splits in {1, 2, 4, 8, 16, 32, triton.cdiv(point.inputs, k)}
        if splits <= triton.cdiv(point.inputs, k) and (t == 16 or (splits <= 4 and warps >= 2))
    ]


def expand_launches(chosen: cutting.Launch) -> list[cutting.Launch]:
    """Return launches that divide columns differently."""
    return [
        chosen._replace(block_n=n, expand_warps=warps) for n in (32, 64, 128, 256, 512, 1024) for warps in (1, 2, 4, 8)
    ]


def compile_all(job: tuple[Point, list[cutting.Launch]]) -> None:
    """Run launches once in a separate process, so that their kernels are in Triton's cache."""
    point, candidates = job
    case = Case(point, copies=1)
    for launch in candidates:
        with contextlib.suppress(triton.runtime.errors.OutOfResources):
            case.run(case.tables[0], case.ys, launch)
    torch.cuda.synchronize()


def best_of(
    case: Case,
    candidates: list[cutting.Launch],
    best: cutting.Launch,
    pool: concurrent.futures.ProcessPoolExecutor,
) -> cutting.Launch:
    list(pool.map(compile_all, [(case.point, candidates[start::PROCESSES]) for start in range(PROCESSES)]))
    found = statistics.median(case.time(best, 5)), best
    for launch in dict.fromkeys(candidates):
        with contextlib.suppress(triton.runtime.errors.OutOfResources):
            found = min(found, (statistics.median(case.time(launch, 5)), launch))
    return found[1]


def words(point: str) -> str:
    """Spell out a point such as ``M32 L8 r16 4096→4096``."""
    rows, adapters, rank, shape = point.split(" ")
    plural = "" if adapters == "L1" else "s"
    return f"{rows[1:]} row{'' if rows == 'M1' else 's'}, {adapters[1:]} adapter{plural}, rank {rank[1:]},\n{shape}"


def plot(records: list[dict], path: Path) -> None:
    """Plot the floor, the measured time and the target of every point."""
    figure, axis = plt.subplots(figsize=(7.5, 0.42 * len(records) + 1))
    series = {"bytes floor": "floor_us", "peft_multibatch": "p50_us", "aim": "target_us"}
    for index, (label, key) in enumerate(series.items()):
        if not any(float(record[key] or 0) for record in records):
            continue
        places = [row + 0.27 * (index - 1) for row in range(len(records))]
        axis.barh(places, [float(record[key] or 0) for record in records], height=0.27, label=label)
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


def main(
    sweep: bool = False,
    grid: bool = False,
    graphs: bool = False,
    only: str = "",
    out: Annotated[
        Path | None,
        typer.Option(
            help="the CSV; the plot is written next to it",
            show_default="results/lora_kernels.csv, _grid.csv or _graphs.csv",
        ),
    ] = None,
    commit: str = "",
) -> None:
    """Check and time every point; with --sweep, also search for better launches."""
    if graphs and (sweep or grid):
        raise typer.BadParameter("launches of graphs can't be chosen: expected --graphs without --sweep and --grid")
    out = out or RESULTS / f"lora_kernels{'_graphs' if graphs else '_grid' if grid else ''}.csv"
    points = [point for point in (GRAPHS if graphs else GRID if grid else POINTS + REST) if only in str(point)]
    gpu, bandwidth = torch.cuda.get_device_name(), copy_bandwidth()
    commit = commit or subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    pool = concurrent.futures.ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn"))
    records, table = [], Rows("point", "floor", "target", "ours", "p20", "p80", "best of sweep", "launch")
    for point in track(points, description="points", console=console):
        torch.manual_seed(0)
        case = Case(point, for_any_plan=graphs)
        chosen = choose(case, torch.cuda.get_device_properties(0).multi_processor_count)
        error = case.check(chosen)
        if not error < 8e-3:
            raise SystemExit(f"{point}: relative error {error:.1e}; nothing is timed")
        times = case.time(chosen)
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
        launches = ["" if graphs else " ".join(map(str, launch)) for launch in (chosen, best_launch)]
        table.add_row(
            str(point),
            *(f"{v:.1f}" if v else "" for v in (floor, point.target, p50, p20, p80, best)),
            "" if graphs else f"{tuple(chosen)} {shown}",
        )
        console.print(f"{point}: {p50:.2f}, {best:.2f} with {tuple(best_launch)}" if sweep else f"{point}: {p50:.2f}")
        records.append({
            "point": str(point), "floor_us": round(floor, 2), "target_us": point.target,
            "p20_us": round(p20, 2), "p50_us": round(p50, 2), "p80_us": round(p80, 2),
            "sweep_us": round(best, 2) if sweep else "", "error": f"{error:.1e}",
            "copy_TB_s": round(bandwidth / 1e6, 2), "gpu": gpu, "torch": torch.__version__,
            "triton": triton.__version__, "commit": commit.strip(),
            "launch": launches[0], "best_launch": launches[1],
        })  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    plot(records, out.with_suffix(".png"))
    console.print(f"{gpu}, copy {bandwidth / 1e6:.2f} TB/s; µs")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
