"""Every Python snippet of the README and of the docs runs, in the order in which it is read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PAGES = [
    page.relative_to(ROOT)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if "```python" in page.read_text()
]


@pytest.mark.xdist_group("real model")
# transformers 5.17 says so of offloaded models
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device type")
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_snippets_run(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        exec(compile(snippet, str(page), "exec"), names)


# train_adapters.py downloads texts and trains for minutes; test_ray.py runs ray_batch_inference.py with a small model
ELSEWHERE = ("train_adapters", "ray_batch_inference")
OPTIONS = {
    "accelerate_generate": ["--max-new-tokens", "4"],  # which test_accelerate.py runs with a small model
    "thousands_of_adapters": ["--adapters", "40", "--requests", "16", "--new-tokens", "3", "--room", "3MB"],
    "train_many": ["--steps", "3", "--rows", "1", "--length", "32"],
    "sweep": ["--steps", "2", "--length", "16"],
}
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem not in ELSEWHERE]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path, tmp_path):
    """Each compares with PEFT and fails where they differ."""
    command = [sys.executable, path, *OPTIONS.get(path.stem, [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "as PEFT says" in done.stdout


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_pages_name_no_file_that_is_not_there():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)[^)]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
