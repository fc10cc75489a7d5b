"""`peft-multibatch inspect`: the contents of adapters, and whether they fit a model."""

from __future__ import annotations

import math

import pytest
import torch
from models import base_model
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors import safe_open
from stored import CONFIG, WEIGHTS, edit_config, save
from typer.testing import CliRunner

import peft_multibatch
from peft_multibatch.adapters.store import contents, files
from peft_multibatch.commands.app import app


TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    base_model().save_pretrained(folder)
    return folder


def plain(folder, **options):
    options = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    return save(folder, LoraConfig(**options))


def other_kind(folder, architecture="llama", targets=("k_proj",)):
    config = IA3Config(target_modules=list(targets), feedforward_modules=[], fan_in_fan_out=architecture == "gpt2")
    get_peft_model(base_model(architecture), config).save_pretrained(str(folder))
    return folder


def run(*arguments):
    done = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def shown(output):
    return dict(line.strip().split(None, 1) for line in output.splitlines() if line.startswith("  "))


def test_what_is_in_an_adapter(tmp_path):
    folder = plain(tmp_path / "sql", rank_pattern={"v_proj": 2})
    with safe_open(folder / WEIGHTS, "pt") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    count = sum(map(math.prod, shapes))
    code, output = run(folder)
    assert code == 0
    assert output.splitlines()[0] == str(folder)
    assert shown(output) == {
        "kind": "LORA",
        "rank": "2, 4",
        "alpha": "16",
        "targets": "q_proj, v_proj",
        "modules": "4 in 2 layers",
        "dtype": "float32",
        "size": f"{count:,} parameters, {4 * count / 1e6:.2f} MB",
        "task": "CAUSAL_LM",
        "store": "yes",
    }


def test_no_weights_are_read(tmp_path, base, monkeypatch):
    """Only the header of the weights' file is read; the rest may be anything."""
    folder = plain(tmp_path / "sql")
    size = (folder / WEIGHTS).stat().st_size
    header = int.from_bytes((folder / WEIGHTS).read_bytes()[:8], "little") + 8
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(header)
        file.truncate(size)  # zeros
    monkeypatch.setattr(files, "read_weights", None)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    monkeypatch.setattr(torch, "load", None)
    code, output = run(folder, "--model", base)
    assert code == 0 and shown(output)["size"] and "fits model  yes" in output


def test_kinds_that_a_store_does_not_take_are_shown_and_say_why(tmp_path, base):
    folders = plain(tmp_path / "dora", use_dora=True), other_kind(tmp_path / "ia3")
    code, output = run(*folders, "--model", base)
    dora, ia3 = (shown(part) for part in output.strip().split("\n\n"))
    assert code == 0  # both fit
    assert (dora["kind"], dora["rank"], dora["store"][:3]) == ("LORA DoRA", "4", "no:")
    assert "use_dora=True" in dora["store"] and "load_adapter" in dora["store"]
    assert (ia3["kind"], ia3["rank"], ia3["alpha"], ia3["modules"]) == ("IA3", "-", "-", "2 in 2 layers")
    assert "peft_type='IA3'" in ia3["store"]
    assert output.count("fits model  yes") == 2


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: save(path, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True), "gpt2"), "c_attn"),
        (lambda path: other_kind(path, "gpt2", ["c_attn"]), "Target modules {'c_attn'} not found"),
        (lambda path: edit_config(plain(path), r=8), "where its configuration has rank 8: expected"),
        (lambda path: edit_config(plain(path, use_dora=True), r=8), "of shape [4, 48]: expected [8, 48]"),
        (lambda path: edit_config(plain(path, use_dora=True), target_modules=[*TARGETS, "k_proj"]), "has no base_m"),
        (lambda path: edit_config(plain(path, use_dora=True), target_modules=["q_proj"]), "has base_model.model.mod"),
    ],
    ids=["another model", "another kind for another model", "rank", "rank of DoRA", "missing", "too many"],
)
def test_what_does_not_fit_says_why(tmp_path, base, make, why):
    make(tmp_path / "odd")
    assert run(tmp_path / "odd")[0] == 0  # fine on its own
    code, output = run(tmp_path / "odd", plain(tmp_path / "good"), "--model", base)
    odd, good = output.strip().split("\n\n")
    assert code == 1
    assert "fits model  no: " in odd and why in odd
    assert "fits model  yes" in good and "store       yes" in good


def test_the_verdict_is_that_of_a_store_and_of_peft(tmp_path, base):
    """An adapter that is said to fit can be registered and loaded; others can't."""
    good, odd = plain(tmp_path / "good"), plain(tmp_path / "odd")
    edit_config(odd, r=8)
    model = base_model()
    mb = peft_multibatch.enable(model)
    store = mb.adapter_store()
    for folder, fits in ((good, True), (odd, False)):
        assert run(folder, "--model", base)[0] == (not fits)
        if fits:
            store.register(folder.name, folder)
        else:
            with pytest.raises(peft_multibatch.AdapterMismatchError):
                store.register(folder.name, folder)


def test_what_cannot_be_read_stops_no_other(tmp_path):
    good, torn = plain(tmp_path / "good"), plain(tmp_path / "torn")
    (torn / WEIGHTS).write_bytes((torn / WEIGHTS).read_bytes()[:-1])
    (no_config := plain(tmp_path / "bare")).joinpath(CONFIG).unlink()
    code, output = run(torn, no_config, tmp_path / "nowhere", good)
    assert code == 1
    assert output.count("can't be read: ") == 3 and "store       yes" in output
    code, output = run(good, "--model", tmp_path / "nowhere")
    assert code == 2 and "can't be read" in output


def test_parameters_belong_to_modules():
    keys = {
        "base_model.model.layers.0.q_proj.lora_A.weight": "layers.0.q_proj",
        "base_model.model.layers.0.q_proj.lora_magnitude_vector": "layers.0.q_proj",
        "base_model.model.embed.lora_embedding_A": "embed",
        "base_model.model.layers.0.k_proj.ia3_l": "layers.0.k_proj",
        "base_model.model.score.weight": "score",
    }
    assert {key: contents.PARAMETER.sub("", key.removeprefix(contents.PREFIX)) for key in keys} == keys
