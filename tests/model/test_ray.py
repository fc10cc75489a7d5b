"""The example for Ray Data on a local Ray: every row is right and in its place, even if a worker dies."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from models import alone, base_model, peft_model
from test_pipelines import tokenizer


ray = pytest.importorskip("ray")

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ["three", None, "eight", "four", "three", "eight", None]
PROMPTS = ["w3 w5 w6", "w10 w11", "w20 w31 w2 w3", "w7", "w8 w9", "w4 w7 w9 w31 w31", "w9"]
DYING = """
import os, pathlib, typer, ray_batch_inference as example

class Dying(example.Writer):
    def __call__(self, batch):
        mark = pathlib.Path(os.environ["MARK"])
        if 4 in batch["row"] and ("RETRIES" in os.environ or not mark.exists()):
            mark.touch()
            os._exit(1)
        return super().__call__(batch)

example.Writer, example.RETRIES = Dying, int(os.environ.get("RETRIES", example.RETRIES))
typer.run(example.main)
"""


@pytest.fixture
def environment():
    """A short path for Ray's sockets, removed afterwards."""
    folder = tempfile.mkdtemp(prefix="ray")
    yield {
        **os.environ,
        "HOME": folder,
        "RAY_TMPDIR": folder,
        "RAY_ADDRESS": "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100 * 2**20),
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]),
    }
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def arguments(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    model = peft_model()
    model.save_pretrained(tmp_path)
    adapters = [f"--adapter={name}={tmp_path / name}" for name in model.peft_config]
    files = [f"--input={tmp_path / 'prompts.jsonl'}", f"--out={tmp_path / 'answers.jsonl'}"]
    return [*files, f"--model={tmp_path / 'base'}", *adapters, "--workers=2", "--batch-size=3", "--max-new-tokens=5"]


def write(tmp_path, names):
    rows = [{"prompt": prompt, "adapter": name, "n": n} for n, (prompt, name) in enumerate(zip(PROMPTS, names))]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def completed(name, prompt):
    model, words = peft_model(), tokenizer()
    inputs = words([prompt], return_tensors="pt", return_token_type_ids=False)
    tokens = alone(model, name, lambda: model.generate(**inputs, max_new_tokens=5, do_sample=False))
    return words.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.xdist_group("ray")
def test_a_worker_that_dies_costs_no_row(tmp_path, arguments, environment):
    """Two workers, batches of three, three and one, and Ray's own retries."""
    rows = write(tmp_path, NAMES)
    environment["MARK"] = str(tmp_path / "mark")
    command = [sys.executable, "-c", DYING, *arguments, "--compare"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mark").exists()
    expected = [{**row, "completion": completed(row["adapter"], row["prompt"])} for row in rows]
    assert [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == expected
    assert done.stdout.count("matches PEFT") == len(rows)


@pytest.mark.xdist_group("ray")
def test_a_batch_that_no_worker_survives_ends_the_job(tmp_path, arguments, environment):
    """By default Ray would retry it forever."""
    write(tmp_path, NAMES)
    environment.update(MARK=str(tmp_path / "mark"), RETRIES="1")
    command = [sys.executable, "-c", DYING, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "The actor" in done.stderr, done.stderr
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(ray, "init", lambda: pytest.fail("Ray was started"))
    return importlib.import_module("ray_batch_inference")


def test_an_unknown_adapter_is_refused_before_anything_runs(tmp_path, example):
    write(tmp_path, ["three", "four", None, "four", None, "three", "nobody"])
    with pytest.raises(SystemExit, match="line 7: \"adapter\" is 'nobody': expected one of three, four, or null"):
        example.main(tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl", "base", ["three=a", "four=b"])


@pytest.mark.parametrize(
    "row, out, message",
    [
        ({"completion": "w2"}, "answers.jsonl", 'line 1: has a "completion"'),
        ({"n": "\ud800"}, "answers.jsonl", "line 1: expected one JSON object per line, but .*surrogates"),
        ({}, "nowhere/answers.jsonl", r"nowhere/answers\.jsonl: expected a file in an existing folder"),
    ],
)
def test_what_could_not_be_written_at_the_end_is_refused(tmp_path, example, row, out, message):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "w1", "adapter": None, **row}) + "\n")
    with pytest.raises(SystemExit, match=message):
        example.main(tmp_path / "prompts.jsonl", tmp_path / out, "base", ["three=a"])
