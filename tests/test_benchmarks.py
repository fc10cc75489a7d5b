"""The benchmarks for GPUs on a CPU, with tiny models: a change of the package that breaks one fails here."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tolerances import RELATIVE_ERROR

from peft_multibatch.compat import SPLITS_ADAPTERS


for package in ("matplotlib", "rich", "typer", "triton"):
    pytest.importorskip(package, reason="needs the extra 'bench' and Triton")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(*command, **environment):
    """Run a script in a process of its own, on the CPU."""
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("for_any_plan", [False, True])
@pytest.mark.parametrize("options", [{"rows": 5}, {"rows": 60, "spread": "half", "per_entry": 3}], ids=str)
def test_kernels_are_checked(for_any_plan, options, load):
    kernels = load("lora_kernels")
    point = kernels.Point(adapters=2, inputs=64, widths=(64, 32), rank=8, **options)
    case = kernels.Case(point, torch.float32, copies=1, for_any_plan=for_any_plan)
    launch = kernels.choose(case, kernels.cutting.Limits(132, 227 * 1024))
    assert case.check(launch) <= RELATIVE_ERROR[torch.float32]
    parts = case.parts[0][1]
    parts[1] = parts[1]._replace(scaling=parts[1].scaling * 1.01)
    assert case.check(launch) > RELATIVE_ERROR[torch.float32]


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # transformers 5.17 needs it
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("end_to_end", {"tiny": True, "points": "4:2", "slow": "4:2", "alone": "4:2", "compiled": "4:2"}),
        ("continuous", {"tiny": True, "stored": True, "adapters": "1,2", "alone": "2", "requests": 4}),
        ("training", {"device": "cpu", "points": "2:1:8", "repeats": 1}),
        ("vision", {"device": "cpu", "points": "2:2", "depth": 2, "side": 4, "tokens": 4}),
    ],
)
def test_they_run(name, options, load, tmp_path):
    out = tmp_path / "found.csv"
    benchmark = load(name)
    benchmark.main(layers=2, rounds=1, out=out, **options)
    assert rows(out)
    assert {row["commit"] for row in rows(out)} == {rows(out)[0]["commit"]}


def test_store_serving(load, tmp_path):
    load("store_serving").main("4", 1, True, "", "Zipf", tmp_path, tmp_path / "found.csv", "")
    assert {row["what"] for row in rows(tmp_path / "found.csv")} == {"throughput", "first token", "step"}


def test_waiting(load, tmp_path):
    load("waiting").main("30", 0.5, tmp_path / "found.csv", "")
    assert len(rows(tmp_path / "found.csv")) == 4
    assert all(int(row["steps"]) > 0 for row in rows(tmp_path / "found.csv"))


def test_store(load, tmp_path):
    out = tmp_path / "found.csv"
    load("store").main(count=60, configurations=30, rounds=1, samples=8, present="1", loads=1, commit="", out=out)
    found = {row["what"]: row for row in rows(out)}
    assert found.keys() == {"register", "enter", "cold", "load_adapter", "register_different", "memory"}
    assert found["register_different"]["configurations"] == "30"
    memory = found["memory"]
    assert int(memory["evictions"]) > 0 and 0.5 < float(memory["largest_of_limit"]) <= 1
    assert float(memory["largest_of_limit"]) < float(memory["allocated_of_limit"]) < 1.2


JOB = {
    "begin": time.time(), "commit": "", "tiny": True, "adapters": [2], "rows": 2, "batch": 2, "rounds": 1, "rank": 4,
    "layers": 2, "prompt_tokens": 4, "training_tokens": 4, "new_tokens": 2,
}  # fmt: skip


def test_scaling_out_keeps_what_it_has_measured(tmp_path):
    """One process, after others have measured with more tokens per second; it fails at its third workload."""
    known = {"processes": 1, "workload": "training step", "adapters": 2, "way": "mixed", "tokens_per_s": 1e9}
    paths = {"out": str(tmp_path / "found.csv"), "found": str(tmp_path / "found.json")}
    workloads = ["generate, dynamic cache", "training step", "unknown"]
    job = JOB | paths | {"workloads": workloads, "records": [known]}
    done = run(BENCHMARKS / "scaling_out.py", SCALING_OUT_JOB=json.dumps(job))
    assert done.returncode == 1 and "KeyError: 'unknown'" in done.stderr, done.stderr[-3000:]
    assert [row["efficiency"] for row in rows(tmp_path / "found.csv")] == ["1.0"] * 4 + ["0.0"]
    assert len(json.loads((tmp_path / "found.json").read_text())) == 5
    for what in ("generate, dynamic cache, adapters: 2", "round 1 of 1: mixed", "training step", "5 steps", "unknown"):
        assert what in done.stdout
    assert "requires_grad=True to a scalar" not in done.stderr


def test_tensor_parallel_names_the_peft_that_it_needs(load, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    benchmark = load("tensor_parallel")
    monkeypatch.setattr(benchmark, "SPLITS_ADAPTERS", False)
    with pytest.raises(
        SystemExit, match=r"peft 0\.\S+ can't run adapters of a split model: expected 0\.21\.1 or newer"
    ):
        benchmark.main()


@pytest.mark.skipif(not SPLITS_ADAPTERS, reason="this PEFT doesn't split adapters with transformers' plans")
def test_tensor_parallel(tmp_path):
    sizes = ["--hidden-size", 64, "--intermediate-size", 64, "--vocab-size", 64, "--layers", 1]
    options = ["--batch", 2, "--adapters", 2, "--rounds", 1, "--out", tmp_path / "found.csv"]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    done = run(*ranks, BENCHMARKS / "tensor_parallel.py", *sizes, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["ranks"] for row in rows(tmp_path / "found.csv")] == ["2", "2"]
