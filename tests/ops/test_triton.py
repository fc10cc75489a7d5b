"""The Triton kernels against the torch backend in float64, in the interpreter on a CPU and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import assert_close
from weight_tables import make_table, update

from peft_multibatch import SegmentBuffer, Segments, ops
from peft_multibatch.adapters.tables import LayerWeights
from peft_multibatch.ops import launches


triton_backend = pytest.importorskip("peft_multibatch.ops.triton_backend", reason="needs triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not triton_backend.INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1"
)


def random_parts(ranks, inputs, widths, dtype):
    """Create random adapters: `ranks` has a row per slot and a column per slice; 0 means no adapter."""
    return {
        slot: [
            LayerWeights(
                (torch.randn(rank, inputs) / inputs**0.5).to(DEVICE, dtype),
                torch.randn(width, rank).to(DEVICE, dtype),
                [2.0, -0.5, 0.25, 1.0][(slot + i) % 4],
            )
            if rank
            else None
            for i, (rank, width) in enumerate(zip(row, widths))
        ]
        for slot, row in enumerate(ranks)
    }


def table_of(parts, dtype, slots=None):
    table = make_table(dtype, slots or len(parts), len(parts[0]), DEVICE)
    update(table, parts)
    return table.describe(parts)


def exact(parts):
    """Convert adapters for torch's products in float64."""
    return {
        slot: [part and (part.lora_a.t().double(), part.lora_b.t().double(), part.scaling) for part in row]
        for slot, row in parts.items()
    }


def check(mix, ranks, inputs, widths, dtype=torch.float32, weights=None, rows=1, strided=False, launch=None):
    """Run a mix both ways; returns what the kernels wrote, for further checks."""
    weights = weights or dtype
    parts = random_parts(ranks, inputs, widths, weights)
    table = table_of(parts, weights, len(ranks) + 3)
    plan = Segments.from_ids(mix)
    num_rows = len(mix) * rows
    x = torch.randn(num_rows, inputs + 8).to(DEVICE, dtype)[:, :inputs]
    whole = torch.randn(num_rows, sum(widths) + 16).to(DEVICE, dtype)
    before = whole.clone()
    ys = list(whole[:, : sum(widths)].split(widths, dim=1))
    if not strided:
        x, ys = x.contiguous(), [y.contiguous() for y in ys]
    expected = [y.double() for y in ys]
    # x is first rounded to the weights' dtype, as in PEFT
    ops.torch_backend.apply_(expected, x.to(weights).double(), plan, exact(parts))
    longest = max((stop - start for _, start, stop in plan.spans), default=0) * rows

    def run(outputs, adds=True):
        if x.numel() and table.rank:
            sizes = widths, plan.num_segments, longest
            product = triton_backend.product(outputs, x, *sizes, table, launch, adds=adds)
            product(outputs, x, plan.pack().to(DEVICE), table.rows)

    deltas = [torch.zeros_like(y) for y in expected]
    ops.torch_backend.apply_(deltas, x.to(weights).double(), plan, exact(parts))
    written = [torch.full_like(y, float("nan")) for y in ys]
    again = [y.clone() for y in ys]
    untouched = [torch.tensor([(s < 0 or not ranks[s][i]) for s in plan.slots]) for i in range(len(widths))]
    kept = [y[u.repeat_interleave(rows)].clone() for y, u in zip(ys, untouched)]
    run(ys)
    run(again)
    run(written, adds=False)
    coarsest = max(dtype, weights, key=lambda each: torch.finfo(each).eps)
    for y, want, twice, same, skip in zip(ys, expected, again, kept, untouched):
        assert_close(y, want, coarsest)
        assert torch.equal(y, twice)  # the same input gives the same bits
        assert torch.equal(y[skip.repeat_interleave(rows)], same)
    if x.numel() and table.rank:
        for y, want, skip in zip(written, deltas, untouched):
            assert_close(y, want, coarsest)
            assert y[skip.repeat_interleave(rows)].eq(0).all()
    if strided:
        assert torch.equal(whole[:, sum(widths) :], before[:, sum(widths) :])


@pytest.mark.parametrize("path", ["eager", "graph"])
def test_two_adapters_three_samples_three_slices(path):
    """Weight indices [0, 0, 1], ranks [1, 1], scalings [1.0, 0.5], lengths [1, 1, 1], offsets [0, 3, 6, 9]."""
    plan = Segments.from_ids([0, 0, 1], lens=[1, 1, 1])
    assert plan.num_segments == 2
    parts = random_parts([[1, 1, 1], [1, 1, 1]], 5, [3, 3, 3], torch.float32)
    for slot, scaling in enumerate([1.0, 0.5]):
        parts[slot] = [part._replace(scaling=scaling) for part in parts[slot]]
    table = table_of(parts, torch.float32)
    x, y = torch.randn(3, 5, device=DEVICE), torch.randn(3, 9, device=DEVICE)
    expected = y.clone()
    for row, (slot, scaling) in enumerate([(0, 1.0), (0, 1.0), (1, 0.5)]):
        for i in range(3):
            a, b, *_ = parts[slot][i]
            expected[row, 3 * i : 3 * i + 3] += scaling * (b @ (a @ x[row]))
    ys = list(y.split(3, dim=1))
    if path == "eager":
        product = triton_backend.product(ys, x, [3, 3, 3], plan.num_segments, plan.longest, table)
        product(ys, x, plan.pack().to(DEVICE), table.rows)
    else:  # a buffer full of leftovers from other calls
        buffer = SegmentBuffer(8, DEVICE)
        buffer.packed.fill_(1_234_567)
        buffer.update(plan)
        triton_backend.add_(ys, x, [3, 3, 3], buffer.packed, [table])
    assert_close(y, expected)


def test_a_buffer_with_long_segments_in_pieces():
    parts = random_parts([[8], [3]], 72, [40], torch.float32)
    table = table_of(parts, torch.float32)
    x, y = torch.randn(90, 72, device=DEVICE), torch.randn(90, 40, device=DEVICE)
    plan = Segments.from_ids([0] * 50 + [1, 0, -1, -1] * 10)
    expected = y.double()
    ops.torch_backend.apply_([expected], x.double(), plan, exact(parts))
    buffer = SegmentBuffer(128, DEVICE)
    for pieces in (plan.cut(90), plan.cut(16)):
        actual = y.clone()
        buffer.update(pieces)
        triton_backend.add_([actual], x, [40], buffer.packed, [table])
        assert_close(actual, expected)
    assert (plan.num_segments, pieces.num_segments) == (3, 4 + 1 + 2)


def test_a_large_buffer_has_larger_pieces(monkeypatch):
    """So that weights are read once for many rows."""
    launches_of, original = [], triton_backend.Product
    monkeypatch.setattr(
        triton_backend, "Product", lambda key, launch: launches_of.append(launch) or original(key, launch)
    )
    parts = random_parts([[8], [3]], 36, [24], torch.float32)
    table = table_of(parts, torch.float32)
    entries = 2048
    x, y = torch.randn(entries, 36, device=DEVICE), torch.randn(entries, 24, device=DEVICE)
    plan = Segments.from_ids([0] * 1000 + [1] * 700 + [-1] * 48 + [1, 0, 0, 0] * 75)
    expected = y.double()
    ops.torch_backend.apply_([expected], x.double(), plan, exact(parts))
    buffer = SegmentBuffer(entries, DEVICE)
    pieces = plan.cut(launches.piece_for(entries))
    assert pieces.longest == 128 and pieces.num_segments == 10 + 7 + 1
    buffer.update(pieces)
    triton_backend.add_([y], x, [24], buffer.packed, [table])
    assert_close(y, expected)
    (launch,) = launches_of
    assert (launch.block_t, launch.tiles) == (64, 2)


def test_few_tall_tiles_split_columns(monkeypatch):
    """Otherwise, most multiprocessors would have nothing to do."""
    chosen, original = [], triton_backend.Product
    monkeypatch.setattr(triton_backend, "Product", lambda key, launch: chosen.append(launch) or original(key, launch))
    monkeypatch.setattr(triton_backend, "limits_of", lambda _: launches.Limits(132, 227 * 1024))
    parts = random_parts([[40], [64]], 4096, [24], torch.float32)
    x, y = torch.randn(1100, 4096, device=DEVICE), torch.randn(1100, 24, device=DEVICE)
    plan = Segments.from_ids([0] * 600 + [1] * 500)
    expected = y.double()
    ops.torch_backend.apply_([expected], x.double(), plan, exact(parts))
    triton_backend.Products([y], x, [24], [plan], [table_of(parts, torch.float32)])([y], x, {})
    assert_close(y, expected)
    assert [(launch.block_t, launch.splits) for launch in chosen] == [(64, 4)]


@pytest.mark.parametrize(
    ("slots", "per_entry", "most"),
    [
        ([0, 0, 1], 1, 2),  # two segments of three samples
        ([0] * 39 + [1] * 25, 1, 39),  # even enough
        ([0] * 50 + [1] * 14, 1, 16),
        ([0] * 40 + [1] * 24, 65, 40),  # pieces of one entry would have two tiles each, the second almost empty
        ([0] * 90 + [1, 2, 3] * 10, 1, 16),
        ([1, 0, 0, 0, 2, 0, 0, 3, -1], 24, 1),  # an entry has more rows than a piece
        ([1, 0, 0, 0, 2, 0, 0, 3, -1], 6, 2),
        ([-1] * 30 + [0, 2], 4, 4),
    ],
)
@pytest.mark.parametrize("adds", [True, False])
def test_uneven_plans_are_cut_before_they_are_launched(slots, per_entry, most, adds, monkeypatch):
    grids, original = [], triton_backend.Product
    monkeypatch.setattr(triton_backend, "Product", lambda key, launch: grids.append(key) or original(key, launch))
    parts = random_parts([[8, 4], [3, 0], [5, 16], [2, 2]], 36, [40, 24], torch.float32)
    table = table_of(parts, torch.float32)
    plan, num_rows = Segments.from_ids(slots), len(slots) * per_entry
    x = torch.randn(num_rows, 36, device=DEVICE)
    ys = [torch.randn(num_rows, width, device=DEVICE) for width in (40, 24)]
    expected = [y.double() if adds else torch.zeros_like(y, dtype=torch.float64) for y in ys]
    ops.torch_backend.apply_(expected, x.double(), plan, exact(parts))
    products = triton_backend.Products(ys, x, [40, 24], [plan], [table], adds)
    products(ys, x, {})
    for y, want in zip(ys, expected):
        assert_close(y, want)
    (key,) = grids
    assert key.longest == most * per_entry
    assert key.num_segments == sum(-(-length // most) for length in plan.seg_lens.tolist())
    if most == plan.longest:
        assert key.num_segments == plan.num_segments < len(slots)


@pytest.mark.parametrize("by_columns", [False, True])
def test_a_graph_goes_round_more_segments_than_it_has_programs_for(by_columns, monkeypatch):
    """Every row of a mixture may have its own weight, and thus its own segment."""
    grids, original = [], triton_backend.Product

    def product(key, launch):
        grids.append(key)
        return original(key, launch._replace(by_columns=by_columns, block_n=16))

    monkeypatch.setattr(triton_backend, "Product", product)
    monkeypatch.setattr(triton_backend, "_products", {})
    parts = random_parts([[8, 4], [3, 0], [0, 0]], 36, [40, 24], torch.float32)
    table = table_of(parts, torch.float32)
    x = torch.randn(160, 36, device=DEVICE)
    ys = [torch.randn(160, width, device=DEVICE) for width in (40, 24)]
    slots, weights = [0, 1, 2, -1, 0] * 16, [0.25 + index / 80 for index in range(80)]
    plan = Segments.from_ids(slots, weights=weights)
    expected = [y.double() for y in ys]
    ops.torch_backend.apply_(expected, x.double(), plan, exact(parts))
    buffer = SegmentBuffer(128, DEVICE)
    buffer.update(plan.cut(16))
    triton_backend.add_(ys, x, [40, 24], buffer.packed, [table])
    for y, want in zip(ys, expected):
        assert_close(y, want)
    ((key,), segments) = grids, plan.num_segments
    assert segments == 80 > 2 * key.num_segments


MIXES = {
    "[0, 0, 1]": [0, 0, 1],
    "interleaved": [2, 0, 1, 2, 0, 3],
    "with base": [-1, 1, -1, 0],
    "all base": [-1, -1],
    "no adapter here": [3, 3],
}
RANKS = [[3, 8, 1], [0, 4, 16], [5, 0, 12], [0, 0, 0]]


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_mixes(mix, slices, rows):
    check(mix, [row[:slices] for row in RANKS], 72, [40, 24, 33][:slices], rows=rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_dtypes_and_strides(dtype, strided):
    # triton 3.9's interpreter multiplies bfloat16 incorrectly, so it isn't used on a CPU
    check([0, 1, 1, 2, 0], RANKS, 48, [16, 40, 8], dtype, rows=2, strided=strided)


def test_weights_of_another_dtype_than_x():
    check([0, 1, 0], [[4], [8]], 40, [24], torch.float32, torch.float16)
    check([0, 1, 0], [[4], [8]], 40, [24], torch.float16, torch.float32)


@pytest.mark.parametrize("mix", [[0, 0, 1], [2, 0, -1, 1, 3, 0, -1, 2]], ids=str)
@pytest.mark.parametrize("by_columns", [False, True])
def test_more_segments_and_tiles_than_a_grid_can_have(mix, by_columns, monkeypatch):
    """With 65,535 of them, as on a GPU, this would take several GB."""
    grids, original = [], triton_backend.Product

    def product(key, launch):
        grids.append(original(key, launch))
        return grids[-1]

    monkeypatch.setattr(triton_backend, "Product", product)
    monkeypatch.setattr(triton_backend, "_products", {})
    monkeypatch.setattr(triton_backend, "_MOST_PROGRAMS", 3)
    launch = launches.with_splits(3, 16, 2, 32, 32, 4, 4, num_inputs=160)._replace(by_columns=by_columns)
    check(mix, RANKS, 160, [70, 33, 24], rows=33, launch=launch)
    places = [(each._shrink_grid[2], each._expand_grid[0 if by_columns else 1]) for each in grids]
    assert len(places) == 2 and all(max(each) <= 3 for each in places)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_orders_of_programs(splits, slices, by_columns):
    launch = launches.with_splits(2, 16, splits, 32, 32, 4, 4, num_inputs=160)
    assert launch.splits == splits
    launch = launch._replace(by_columns=by_columns)
    check([0, 0, 1, -1, 0], [row[:slices] for row in RANKS], 160, [70, 33, 24][:slices], rows=9, launch=launch)


@pytest.mark.parametrize(
    ("kilobytes", "segments", "longest", "rank", "stages", "registers"),
    [
        (227, 8, 512, 64, 3, 0),  # blocks are twice as large, so two programs share a multiprocessor
        (227, 8, 512, 128, 4, 80),
        (227, 32, 256, 64, 4, 80),
        (227, 32, 256, 128, 3, 80),  # more programs than can run at once
        (227, 32, 256, 16, 3, 0),
        (227, 32, 256, 256, 3, 0),
        (64, 32, 256, 64, 3, 0),  # not even one program has room for a fourth block
    ],
)
def test_large_ranks_have_as_many_blocks_on_their_way_as_fit(kilobytes, segments, longest, rank, stages, registers):
    limits = launches.Limits(132, kilobytes * 1024)
    found = launches.choose(segments, longest, 4096, (4096, 1024, 1024), rank, 2, limits)
    assert (found.shrink_stages, found.shrink_registers) == (stages, registers)


def test_a_table_follows_its_parts():
    parts = random_parts([[4], [8]], 32, [16], torch.float32)
    table = make_table(torch.float32, 4, 1, DEVICE)
    one = {1: parts[1]}
    update(table, one)
    assert table.rows[1, 0, 2] == 8 and table.rows[0].eq(0).all()
    assert table.describe(one)[1:] == (torch.float32, 8, True)
    place = table.rows.data_ptr()
    update(table, parts)
    assert table.rows[:, 0, 2].tolist() == [4, 8, 0, 0]
    assert not table.describe(parts).is_aligned  # rows of four elements aren't a multiple of 16 bytes in every dtype
    a, b, *_ = parts[0][0]
    parts[0] = [LayerWeights(a.half(), b.half(), 3.0)]
    update(table, parts)
    assert table.rows[:, 0, 2].tolist() == [0, 8, 0, 0]  # belongs in another table
    assert table.rows.data_ptr() == place


GPU_RANKS = [1, 3, 5, 8, 12, 16, 32, 64, 100, 256]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", GPU_RANKS)
def test_ranks_on_a_gpu(rank, dtype):
    for rows in (1, 7, 150):
        check([0, 1, 0, 2, -1, 2], [[rank], [max(1, rank // 2)], [0]], 576, [1536], dtype, rows=rows)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_slices_on_a_gpu(slices, mix, dtype):
    for rows in (1, 33):
        check(
            mix, [row[:slices] for row in RANKS], 576, [576, 192, 192][:slices], dtype, rows=rows, strided=rows == 33
        )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("mix", "rows", "slots"),
    [([0], 65_536, 1), (list(range(1024)), 1, 1024), ([5, 900, 17] * 40, 11, 1024), (list(range(64)) * 2, 3, 64)],
    ids=["65,536 rows", "1,024 slots", "three of 1,024", "interleaved 64"],
)
def test_sizes_on_a_gpu(mix, rows, slots):
    check(mix, [[8]] * slots, 192, [320], torch.bfloat16, rows=rows)


@pytest.mark.gpu
def test_a_graph_serves_every_mix():
    """Captured once with a plan buffer and a table; replays use what is written into both."""
    parts = random_parts([[8, 4], [16, 0], [3, 12]], 320, [96, 64], torch.bfloat16)
    table = make_table(torch.bfloat16, 8, 2, "cuda")
    update(table, parts)
    buffer = SegmentBuffer(16, "cuda")
    buffer.update(Segments.from_ids([0] * 6))
    x = torch.randn(6, 320, device="cuda", dtype=torch.bfloat16)
    ys = [torch.empty(6, width, device="cuda", dtype=torch.bfloat16) for width in (96, 64)]
    triton_backend.add_(ys, x, [96, 64], buffer.packed, [table.describe(parts)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_backend.add_(ys, x, [96, 64], buffer.packed, [table.describe(parts)])
    for mix in ([0, 0, 1, 1, 2, 2], [2, 1, 0, -1, 1, 0], [-1] * 6, [1] * 6, [0, 0, 0, 0, 0, 1]):
        if mix[0] == 1:
            a, b, *_ = parts[1][0]
            parts[1] = [LayerWeights(torch.randn_like(a), torch.randn_like(b), 7.0), None]
            update(table, parts)
        plan = Segments.from_ids(mix)
        buffer.update(plan)
        for y in ys:
            y.normal_()
        expected = [y.double() for y in ys]
        ops.torch_backend.apply_(expected, x.double(), plan, exact(parts))
        graph.replay()
        for y, want in zip(ys, expected):
            assert_close(y, want)


@pytest.mark.parametrize(
    ("capability", "limit", "ranks", "dtype"),
    [
        (75, 64, "64,128", "float16"),
        (89, 99, "128,512", "float32"),
        (90, 227, "128,512", "float32"),
        (90, 227, "64,128", "bfloat16"),  # shrink has fewer registers and more blocks
    ],
    ids=["T4", "L4", "H100", "H100 in half precision"],
)
def test_launches_fit_into_shared_memory(capability, limit, ranks, dtype):
    """On a T4, an L4 or RTX 4090, and an H100, for which the kernels are compiled here."""
    script = Path(__file__).with_name("shared_memory.py")
    options = ["--capability", capability, "--limit", limit * 1024, "--ranks", ranks, "--dtypes", dtype]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, *map(str, options)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count("expand_kernel") > 3, done.stdout + done.stderr[-2000:]
