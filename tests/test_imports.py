"""What importing costs, what it loads, what it offers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import peft_multibatch
from peft_multibatch import compat


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_optional_is_loaded():
    dependencies = "import json, sys; import torch, transformers; from peft import PeftModel"
    code = f"{dependencies}; before = set(sys.modules); import peft_multibatch"
    loaded = set(run(f"{code}; print(json.dumps(sorted(set(sys.modules) - before)))"))
    assert "peft_multibatch.api" in loaded
    optional = ("triton", "typer", "rich", "gguf", "matplotlib", "peft_multibatch.demo", "peft_multibatch.ops.triton")
    assert [name for name in loaded if name.startswith(optional)] == []


def test_import_time_beyond_the_dependencies():
    code = (
        "import json, time; import torch, transformers; from peft import PeftModel; from transformers import "
        "PreTrainedModel; begin = time.perf_counter(); import peft_multibatch; "
        "print(json.dumps(time.perf_counter() - begin))"
    )
    assert min(run(code) for _ in range(3)) < 1.0


def test_public_names():
    assert peft_multibatch.__all__ == sorted(peft_multibatch.__all__)
    assert {name for name in peft_multibatch.__all__ if not name.endswith("Error")} == {
        "LayerReport", "Multibatch", "Report", "SegmentBuffer", "Segments", "disable", "enable",
    }  # fmt: skip
    for name in peft_multibatch.__all__:
        assert getattr(peft_multibatch, name).__doc__


@pytest.mark.parametrize(
    ("installed", "warned"), [("0.20.9", True), ("0.21.0", False), ("0.21.7", False), ("0.22.0.dev0", True)]
)
def test_versions_outside_of_what_was_tested(monkeypatch, installed, warned):
    warnings = []
    found = {"peft": installed, "transformers": "5.17.0", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(compat, "version", found.get)
    monkeypatch.setattr(compat.logger, "warning", warnings.append)
    compat.check()
    assert [f"and {installed} is installed" in warning for warning in warnings] == [True] * warned


def test_a_peft_whose_layers_changed_is_named(monkeypatch):
    monkeypatch.setattr(compat, "ATTRIBUTES", ("lora_A", "lora_C"))
    with pytest.raises(ImportError, match="whose layers have no lora_C: expected peft"):
        compat.check()
