"""Type checkers on a user's script outside the package, and signatures, docstrings and reprs."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import lora_configs, peft_model
from stored import save_many
from transformers import Trainer, TrainingArguments

import peft_multibatch


ROOT = Path(peft_multibatch.__file__).parents[1]
SCRIPT = Path(__file__).parent / "data" / "user_script.py"
WRONG = {number for number, line in enumerate(SCRIPT.read_text().splitlines(), 1) if line.endswith("# wrong")}
MYPY = f"""
[mypy]
strict = true
mypy_path = {ROOT}
follow_imports = silent
[mypy-accelerate.*,peft.*,transformers.*]
follow_imports = skip
"""
PYRIGHT = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT)], "include": ["script.py"]}


@pytest.fixture
def script(tmp_path):
    assert (ROOT / "peft_multibatch" / "py.typed").exists()
    shutil.copy(SCRIPT, tmp_path / "script.py")
    (tmp_path / "mypy.ini").write_text(MYPY)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(PYRIGHT))
    return tmp_path


def run(folder, *command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy")
def test_mypy_finds_what_is_wrong_in_a_users_script(script):
    said = run(script, "mypy", "--config-file", "mypy.ini", "--cache-dir", os.devnull, "script.py")
    assert {int(line) for line in re.findall(r"^script.py:(\d+): error", said, re.MULTILINE)} == WRONG, said


@pytest.mark.skipif(importlib.util.find_spec("basedpyright") is None, reason="needs basedpyright")
def test_pyright_finds_what_is_wrong_in_a_users_script(script):
    said = run(script, "basedpyright", "--outputjson", "--pythonpath", sys.executable)
    found = [each for each in json.loads(said)["generalDiagnostics"] if each["severity"] == "error"]
    assert {each["range"]["start"]["line"] + 1 for each in found} == WRONG, said


def test_signatures_and_help_say_what_adapter_ids_are():
    model = peft_model()
    methods = [model.forward, model.generate, model.get_base_model().forward, model.get_base_model().generate]
    before = [(inspect.signature(each), inspect.getdoc(each)) for each in methods]
    mb = peft_multibatch.enable(model)
    methods = [model.forward, model.generate, model.get_base_model().forward, model.get_base_model().generate]
    for method, (signature, doc) in zip(methods, before):
        shown = inspect.signature(method)
        assert "adapter_ids: 'AdapterIds | None' = None" in str(shown)
        assert [each for each in shown.parameters if each != "adapter_ids"] == [*signature.parameters]
        text = inspect.getdoc(method)
        assert text.startswith(doc or "With peft_multibatch:")
        assert "adapter_ids (`AdapterIds`, *optional*):" in text and "of each sample: a list, tuple" in text
    batch = model.get_base_model().generate_batch
    assert [*inspect.signature(batch).parameters][-2:] == ["max_new_tokens", "adapter_ids"]
    assert "kwargs" not in inspect.signature(batch).parameters and "each prompt" in inspect.getdoc(batch)
    mb.disable()
    methods = [model.forward, model.generate, model.get_base_model().forward, model.get_base_model().generate]
    assert [(inspect.signature(each), inspect.getdoc(each)) for each in methods] == before


def test_checks_of_signatures_in_transformers_still_work(tmp_path):
    """Trainer keeps the column and drops others; generate rejects arguments that the model doesn't read."""
    model = peft_model()
    peft_multibatch.enable(model)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    trainer._set_signature_columns_if_needed()
    assert "adapter_ids" in trainer._signature_columns and "input_ids" in trainer._signature_columns
    assert "texts" not in trainer._signature_columns
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(input_ids=torch.ones(1, 3, dtype=torch.long), adapter_ids=[0], attention_musk=1)


def test_reprs_are_short_and_read_nothing(tmp_path, monkeypatch):
    model = peft_model()
    for number in range(6):
        model.add_adapter(f"more<{number}", lora_configs()["eight"])
    mb = peft_multibatch.enable(model)
    save_many(tmp_path, 30)
    store = mb.adapter_store(max_host_memory="8MB")
    store.register_folder(tmp_path)
    report, verified = mb.report(), mb.verify([0, 1], input_ids=torch.randint(3, 100, (2, 4)))
    with monkeypatch.context() as patch:  # avoids reading the model and its weights, and waiting
        patch.setattr(type(mb), "_refresh", None)
        patch.setattr(torch.Tensor, "tolist", None)
        with store._lock:
            texts = [repr(mb), repr(store), repr(report), repr(verified)]
        page = mb._repr_html_()
    count = len(lora_configs()) + 6
    shown = ", ".join(map(repr, [*lora_configs(), "more<0", "more<1"][:5]))
    assert texts == [
        f"Multibatch(LlamaForCausalLM, backend={report.backend!r}, layers={len(report)}, adapters=[{shown}, "
        f"… {count + 30 - 5} more])",
        "AdapterStore(registered=30, in_memory=0, 0.0 of 8.0 MB on cpu)",
        f"Report(backend={report.backend!r}, layers={len(report)}, adapters={count}, store=30 registered)",
        f"Verification(ok=True, outputs=1, layers={len(verified.layers)}, tolerance=0.0001)",
    ]
    assert page.count("<tr>") == 1 + 20 and f"… {count + 30 - 20} more" in page
    assert "more&lt;0" in page and "more<0" not in page
    mb.disable()
    assert repr(mb) == "Multibatch(disabled)" and mb._repr_html_() == "<p>Multibatch(disabled)</p>"
    assert repr(store) == "AdapterStore(closed)"
    half = object.__new__(peft_multibatch.Multibatch), object.__new__(peft_multibatch.AdapterStore)
    assert [repr(each) for each in half] == ["Multibatch(disabled)", "AdapterStore(closed)"]


def test_a_report_gives_layers_and_slices():
    mb = peft_multibatch.enable(peft_model())
    report = mb.report()
    assert report[:2] == report.layers[:2] and report[-1] is report.layers[-1]
    assert [each.name for each in report.adapters] == [*lora_configs()]
