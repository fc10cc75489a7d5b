"""Every Python snippet of the README and the docs runs, in reading order."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


ROOT = Path(__file__).parents[2]
PAGES = [
    page.relative_to(ROOT)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if "```python" in page.read_text()
]


@pytest.mark.xdist_group("real model")
# transformers 5.17 warns about offloaded models
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device type")
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_snippets_run(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        exec(compile(snippet, str(page), "exec"), names)


# train_adapters.py downloads texts and trains for minutes; the examples for Ray have separate tests
ELSEWHERE = ("train_adapters", "ray_batch_inference", "ray_serve")
OPTIONS = {
    "accelerate_generate": ["--max-new-tokens", "4"],  # test_accelerate.py runs it with a small model
    "thousands_of_adapters": ["--adapters", "40", "--requests", "16", "--new-tokens", "3", "--room", "3MB"],
    "train_many": ["--steps", "3", "--rows", "1", "--length", "32"],
    "sweep_learning_rates": ["--steps", "2", "--length", "16"],
}
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem not in ELSEWHERE]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path, tmp_path):
    """Examples compare with PEFT and fail if they differ."""
    command = [sys.executable, path, *OPTIONS.get(path.stem, [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "matches PEFT" in done.stdout


# layers, hidden size, intermediate size, heads, key-value heads, head size, from the models' config.json
SIZED = {
    "SmolLM2-135M": (30, 576, 1536, 9, 3, 64),
    "Llama-3.2-1B": (16, 2048, 8192, 32, 8, 64),
    "Qwen2.5-7B": (28, 3584, 18944, 28, 4, 128),
    "Mistral-7B": (32, 4096, 14336, 32, 8, 128),
    "Llama-3.1-8B": (32, 4096, 14336, 32, 8, 128),
    "Llama-3.1-70B": (80, 8192, 28672, 64, 8, 128),
}


@pytest.mark.parametrize("name", SIZED)
def test_sizes_of_adapters(name):
    """The table of docs/store.md matches the formula above it."""
    page = (ROOT / "docs" / "store.md").read_text()
    names: dict[str, Any] = {}
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(next(each for each in snippets if each.startswith("def adapter_bytes")).partition("print(")[0], names)
    layers, hidden, intermediate, heads, groups, head = SIZED[name]
    shapes = {
        "q_proj": (hidden, heads * head), "k_proj": (hidden, groups * head), "v_proj": (hidden, groups * head),
        "o_proj": (heads * head, hidden), "gate_proj": (hidden, intermediate), "up_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }  # fmt: skip
    modules = [
        (f"layers.{layer}.{key}", SimpleNamespace(in_features=shape[0], out_features=shape[1]))
        for layer in range(layers)
        for key, shape in shapes.items()
    ]
    model = SimpleNamespace(named_modules=lambda: modules)
    sizes = [
        names["adapter_bytes"](model, targets, rank, each)
        for targets, rank in ((["q_proj", "v_proj"], 8), ([*shapes], 16))
        for each in (4, 2)
    ]
    row = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
    assert cells == [*(f"{size / 1e6:.1f} MB" for size in sizes), str(int(8e9 // sizes[-1]))]


REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Homepage"]


def measured(name: str, **wanted: str) -> dict[str, str]:
    """Return the only row of a CSV under benchmarks/results with these values."""
    with (ROOT / "benchmarks" / "results" / name).open(newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if wanted.items() <= row.items()]
    return row


def cell(time: str, ratio: str, digits: int = 2) -> str:
    return f"{float(time):.{digits}f} ({float(ratio):.2f} ×)"


def benchmark_rows() -> list[list[str]]:
    """Return the rows of the table in docs/benchmarks.md, from committed measurements."""
    rows = []
    for adapters in ("0", "8", "32"):
        ways = ("peft_multibatch", "vLLM")
        ours, theirs = (measured("continuous_vllm.csv", way=way, layers="32", adapters=adapters) for way in ways)
        rows.append([adapters if adapters != "0" else "none", "", ours["tokens_per_s"], "", theirs["tokens_per_s"]])
    for adapters in ("8", "32"):
        ways = ("base", "peft_multibatch")
        base, ours = (measured("continuous_h200.csv", way=way, adapters=adapters) for way in ways)
        rows.append([adapters, base["tokens_per_s"], cell(ours["tokens_per_s"], ours["× base"], 0), "", ""])
    for adapters in ("1", "8", "32"):
        ways = ["peft_multibatch"] + ["one adapter at a time"] * (adapters != "1")
        base = measured("continuous.csv", way="base", adapters=adapters)
        found = [measured("continuous.csv", way=way, adapters=adapters) for way in ways]
        cells = [cell(row["tokens_per_s"], row["× base"], 0) for row in found]
        rows.append([adapters, base["tokens_per_s"], *cells, *[""] * (3 - len(cells))])
    for suffix in ("", ", compiled"):
        for size in ("32", "64"):
            same = {"batch": size, "adapters": size, "commit": "7097db7"}
            base, ours = (measured("end_to_end.csv", way=way + suffix, **same) for way in ("base", "peft_multibatch"))
            theirs = None if suffix else measured("end_to_end.csv", way="PEFT adapter_names", **same)
            times = [row and cell(row["generate32_s"], row["generate32_s × base"]) for row in (ours, theirs)]
            rows.append([size, f"{float(base['generate32_s']):.2f}", times[0], times[1] or "", ""])
    for adapters in ("1", "4", "16"):
        row = measured("generate_cpu.csv", targets="all", adapters=adapters)
        ours, theirs = cell(row["ours_s"], row["ours_per_base"]), cell(row["peft_s"], row["peft_per_base"])
        rows.append([adapters, f"{float(row['base_s']):.2f}", ours, theirs, ""])
    return rows


def test_the_benchmarks_are_those_measured():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("|")][2:]
    assert [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines] == benchmark_rows()


ONE, ALONE, MIXED = "PEFT, one adapter", "PEFT, one at a time", "peft_multibatch, mixed"


def training_row(row: dict[str, str]) -> list[str]:
    point = row["point"].replace(":", " × ")
    one, alone = f"{row[f'{ONE}, ms']} ({row['× one adapter']})", f"{row[f'{ALONE}, ms']} ({row['× one at a time']})"
    return [point, row["adapter dtype"], row[f"{MIXED}, ms"], one, alone, row[f"{MIXED}, GB"], row[f"{ONE}, GB"]]


def vision_row(row: dict[str, str]) -> list[str]:
    times = [f"{row[f'{way}, ms']} ({row[f'{way} / base']})" for way in (MIXED, ALONE)]
    return [row["samples"], row["adapters"], f"{int(row['patches']):,}", row["base model, ms"], *times]


def whole_model_row(row: dict[str, str]) -> list[str]:
    measures = ("decode_ms", "generate32_s", "prefill512_ms")
    times = [row[each] and f"{float(row[each]):.4g} ({float(row[f'{each} × base']):.2f} ×)" for each in measures]
    return [row["batch"], row["adapters"], row["way"], *times]


def quantized_row(row: dict[str, str]) -> list[str]:
    return [row["base weights"], *whole_model_row(row)[1:]]


def cpu_training_row(row: dict[str, str]) -> list[str]:
    point, _, *times, _, _ = training_row(row | dict.fromkeys((f"{MIXED}, GB", f"{ONE}, GB"), ""))
    return [point, *times, row["base × one at a time"]]


def requests_row(row: dict[str, str]) -> list[str]:
    return [row["adapters"], row["way"], row["tokens_per_s"], row["× base"], f"{float(row['first_s']):.2f}"]


def waiting_row(row: dict[str, str]) -> list[str]:
    return [f"{int(row['waiting']):,}", row["way"], row["choosing_ms"], row["choosing_max_ms"], row["step_ms"]]


@pytest.mark.parametrize(
    ("page", "name", "cells"),
    [
        ("training.md", "training.csv", training_row),
        ("training.md", "training_cpu.csv", cpu_training_row),
        ("vision-language.md", "vision.csv", vision_row),
        ("explanation/benchmarks-log.md", "end_to_end_h200.csv", whole_model_row),
        ("explanation/benchmarks-log.md", "end_to_end_h200_decoding.csv", whole_model_row),
        ("explanation/benchmarks-log.md", "end_to_end_h200_compiled.csv", whole_model_row),
        ("explanation/benchmarks-log.md", "end_to_end_quantized.csv", quantized_row),
        ("explanation/benchmarks-log.md", "continuous_h200.csv", requests_row),
        ("explanation/benchmarks-log.md", "waiting.csv", waiting_row),
    ],
)
def test_tables_are_those_measured(page: str, name: str, cells: Callable[[dict[str, str]], list[str]]):
    with (ROOT / "benchmarks" / "results" / name).open(newline="") as file:
        lines = ["| " + " | ".join(cells(row)) + " |" for row in csv.DictReader(file)]
    assert len(lines) > 2 and "\n".join(lines) in (ROOT / "docs" / page).read_text()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_readme_works_away_from_its_folder():
    """PyPI shows the README, and relative links don't work there; links to this repository must name existing
    files."""
    markdown = pytest.importorskip("markdown", reason="needs mkdocs")
    page = markdown.markdown((ROOT / "README.md").read_text(), extensions=["tables", "fenced_code"])
    assert "][" not in page and "]:" not in page
    targets = re.findall(r'(?:href|src)="(.*?)"', page)
    assert all(target.startswith("https://") for target in targets)
    raw = REPOSITORY.replace("https://github.com", "https://raw.githubusercontent.com")
    own = [target for target in targets if target.startswith((REPOSITORY, raw))]
    assert len(own) > 10
    for target in own:
        path = target.removeprefix(f"{REPOSITORY}/blob/main/").removeprefix(f"{raw}/main/")
        assert (ROOT / path).is_file(), target


def test_addresses_agree():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    settings = (ROOT / "mkdocs.yml").read_text()
    assert f"repo_url: {REPOSITORY}\n" in settings and f"site_url: {urls['Documentation']}\n" in settings
    assert urls["Documentation"] in (ROOT / "README.md").read_text()


def test_figures_beside_vllm_are_those_of_the_csv():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import overview
    finally:
        sys.path.pop(0)
    page = (ROOT / "docs" / "explanation" / "benchmarks-log.md").read_text()
    for layers in (32, 8):
        ours, theirs = overview.throughput(layers).values()
        assert list(ours) == list(theirs) == [0, 8, 32]
        for adapters, rate in ours.items():
            other = theirs[adapters]
            assert f"| {layers} | {adapters or 'none'} | {rate:.0f} | {other:.0f} | {rate / other:.2f} |" in page
    times = overview.times()
    assert set(times) == set(overview.WAYS)
    ours, mixed, alone = (times[way] for way in ("peft_multibatch", "PEFT adapter_names", "PEFT, one at a time"))
    said = f"{ours:.1f} times as long as the base model, and {mixed:.0f} to {alone:.0f} times with PEFT"
    assert said in " ".join((ROOT / "README.md").read_text().split())


def test_pages_name_no_file_that_is_not_there():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert ":" in target or (page.parent / target).exists(), f"{page}: {target}"
