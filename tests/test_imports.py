"""Imports: their cost, what they load, their direction, and the public names."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import peft_multibatch
from peft_multibatch import compat


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_optional_is_loaded():
    dependencies = "import json, sys; import torch, transformers; from peft import PeftModel"
    code = f"{dependencies}; before = set(sys.modules); import peft_multibatch; peft_multibatch.enable"
    loaded = set(run(f"{code}; print(json.dumps(sorted(set(sys.modules) - before)))"))
    assert "peft_multibatch.api" in loaded
    optional = ("triton", "typer", "rich", "gguf", "matplotlib", "peft_multibatch.demo", "peft_multibatch.ops.triton")
    optional += ("peft_multibatch.commands",)
    optional += ("fastapi", "uvicorn", "starlette", "prometheus_client", "openai", "peft_multibatch.serve")
    optional += ("peft_multibatch.training", "transformers.trainer")
    assert [name for name in loaded if name.startswith(optional)] == []


def test_import_time_beyond_the_dependencies():
    code = (
        "import json, time; import torch, transformers; from peft import PeftModel; from transformers import "
        "PreTrainedModel; begin = time.perf_counter(); import peft_multibatch; peft_multibatch.enable; "
        "print(json.dumps(time.perf_counter() - begin))"
    )
    assert min(run(code) for _ in range(3)) < 1.0


@pytest.mark.parametrize("code", [
    "import peft_multibatch; assert peft_multibatch.MultibatchError",
    "import typer.main; from peft_multibatch.commands.app import app; typer.main.get_command(app)",
    "from typer.testing import CliRunner; from peft_multibatch.commands.app import app; "
    "assert 'serve' in CliRunner().invoke(app, ['--help']).output",
    "from typer.testing import CliRunner; from peft_multibatch.commands.app import app; "
    "outputs = [CliRunner().invoke(app, [each, '--help']).output for each in ('demo', 'verify', 'inspect', 'serve')]; "
    "assert all('Usage' in each for each in outputs)",
    "from typer.testing import CliRunner; from peft_multibatch.commands.app import app; "
    "assert CliRunner().invoke(app, ['--version']).exit_code == 0",
], ids=["import", "commands", "help", "help of commands", "version"])  # fmt: skip
def test_what_needs_no_torch_imports_none(code):
    loaded = set(run(f"import json, sys; {code}; print(json.dumps(sorted(sys.modules)))"))
    assert "peft_multibatch.errors" in loaded
    assert loaded & {"torch", "transformers", "peft", "numpy"} == set()


def test_public_names():
    assert peft_multibatch.__all__ == sorted(peft_multibatch.__all__)
    assert {name for name in peft_multibatch.__all__ if not name.endswith("Error")} == {
        "AdapterBatchingManager", "AdapterId", "AdapterIds", "AdapterReport", "AdapterStore", "LayerCheck",
        "LayerReport", "Multibatch", "OutputCheck", "Registered", "Report", "SegmentBuffer", "Segments", "StoreStats",
        "Verification", "disable", "enable",
    }  # fmt: skip
    for name in {*peft_multibatch.__all__} - {"AdapterId", "AdapterIds"}:  # type aliases have no docstrings
        assert getattr(peft_multibatch, name).__doc__


def test_dir_shows_the_public_names_alone():
    code = "import json, peft_multibatch; peft_multibatch.enable; print(json.dumps(dir(peft_multibatch)))"
    assert sorted(run(code)) == sorted([*peft_multibatch.__all__, "__version__"])
    with pytest.raises(AttributeError, match="module 'peft_multibatch' has no attribute 'enabled'"):
        peft_multibatch.enabled  # noqa: B018


def test_names_are_imported_from_where_type_checkers_find_them():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    known = {alias.name: node.module for node in block.body for alias in node.names}
    assert known == {name: f"peft_multibatch.{place}" for name, place in peft_multibatch._LAZY.items()}
    assert known.keys() <= {*peft_multibatch.__all__}


@pytest.mark.parametrize(
    ("installed", "warned"), [("0.20.9", True), ("0.21.0", False), ("0.21.7", False), ("0.22.0.dev0", True)]
)
def test_versions_outside_of_what_was_tested(monkeypatch, installed, warned):
    warnings = []
    found = {"peft": installed, "transformers": "5.17.0", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(compat, "version", found.get)
    monkeypatch.setattr(compat.logger, "warning", warnings.append)
    compat.check.__wrapped__()
    assert [f"and {installed} is installed" in warning for warning in warnings] == [True] * warned


def test_a_peft_whose_layers_changed_is_named(monkeypatch):
    monkeypatch.setattr(compat, "ATTRIBUTES", ("lora_A", "lora_C"))
    with pytest.raises(ImportError, match="whose layers have no lora_C: expected peft"):
        compat.check.__wrapped__()


def test_untested_versions_are_one_warning_of_the_first_model_alone():
    code = """
import importlib.metadata, sys
version = importlib.metadata.version
importlib.metadata.version = lambda name: {"peft": "9.0", "torch": "9.0"}.get(name) or version(name)
import peft_multibatch, torch
from peft import LoraConfig, get_peft_model
models = [get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"])) for _ in "ab"]
print("imported", file=sys.stderr)
for model in models:
    peft_multibatch.enable(model)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, _, after = done.stderr.partition("imported")
    assert "was tested with" not in before
    assert after.count("was tested with") == 1
    assert after.count("9.0 is installed") == 2


def test_the_version_option_prints_the_version_alone():
    done = subprocess.run(
        [sys.executable, "-m", "peft_multibatch", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == peft_multibatch.__version__


ROOT = Path(peft_multibatch.__file__).parent
WINGS = [
    "errors",
    "compat",
    "streams",
    "report",
    "plan",
    "adapters",
    "ops",
    "calls",
    "layers",
    "model",
    "continuous",
    "training",
    "api",
    "serve",
    "commands",
]


def imports_of(path: Path) -> Iterator[str]:
    """Return the package's modules that a module imports anywhere, including for type checkers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft_multibatch."):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "peft_multibatch":
            yield from (f"peft_multibatch.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("peft_multibatch."))


def test_every_module_stands_in_a_wing():
    found = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert found - {"__init__", "__main__", "demo"} == set(WINGS)


def test_wings_import_only_from_those_before_them():
    for path in ROOT.rglob("*.py"):
        wing = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if wing in WINGS:
            later = [name for name in imports_of(path) if name.split(".")[1] in WINGS[WINGS.index(wing) + 1 :]]
            assert later == [], f"{path.relative_to(ROOT)} imports from a later wing"


def test_no_import_circles():
    paths = {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }

    def module_of(imported: str) -> str:  # maps an attribute to its module
        return imported if imported in paths else imported.rpartition(".")[0]

    edges = {name: set(map(module_of, imports_of(path))) for name, path in paths.items()}
    while edges:  # removes modules without remaining imports
        free = {name for name, found in edges.items() if not (found - {name}) & edges.keys()}
        assert free, f"these import each other in a circle: {sorted(edges)}"
        edges = {name: found for name, found in edges.items() if name not in free}


def test_every_module_is_one_idea():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > 350} == {}
