"""A sample of `make sweep`, and a check that the published results match it."""

from __future__ import annotations

import csv

import pytest
import transformers
from sweep import sweep

from peft_multibatch.layers.architectures import REFUSED, tried


SAMPLE = [
    "llama", "qwen3", "gemma3_text", "mixtral", "deepseek_v3", "gpt2", "opt", "mamba", "bert", "modernbert", "albert",
    "t5", "bart", "whisper", "wav2vec2", "vit", "swin", "clip", "detr", "llava", "qwen2_vl", "autoformer",
    "fsmt", "xlnet", "led", "deberta-v2", "swinv2", "sew-d", "bros",
]  # fmt: skip


@pytest.fixture(scope="module")
def published():
    with sweep.RESULTS.open(newline="") as file:
        return {(row["model_type"], row["class_name"]): row for row in csv.DictReader(file)}


@pytest.mark.skipif(transformers.__version__ not in sweep.KNOWN.read_text(), reason="swept with another transformers")
@pytest.mark.filterwarnings("ignore")  # warnings about untrained models
@pytest.mark.parametrize("head", [False, True], ids=["base", "head"])
@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_of_the_sweep(published, model_type, head):
    found = sweep.sweep(model_type, head)
    assert found.status != sweep.WRONG, found
    before = published[model_type, found.class_name]
    assert (found.status, found.generates) == (before["status"], before["generates"]), found
    assert all(layer in before["left_out"] for layer in found.left_out), found


def test_nothing_is_published_as_wrong(published):
    assert not [key for key, row in published.items() if row["status"] == sweep.WRONG]
    assert len({row["model_type"] for row in published.values() if row["status"] != sweep.NOT_BUILT}) >= 350
    assert tried() <= {model_type for model_type, _ in published} | REFUSED.keys()


def test_every_refusal_says_which_layers_and_why(published):
    for row in published.values():
        if row["status"] == sweep.REFUSED:
            assert row["left_out"] or row["model_type"] in REFUSED or "patches of all images" in row["reason"], row
