"""`peft-multibatch verify`: its table and its exit codes."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_multibatch.commands.app import app
from peft_multibatch.model import handle


pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from serving import save_adapters, save_tokenizer, tiny_model


ADAPTERS = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = save_tokenizer(folder / "tokenizer")
    tiny_model(tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base", save_adapters(folder / "adapters", tokenizer)


def run(*arguments):
    done = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def rows(output):
    """Return the adapter and verdict of every sample in the table."""
    cells = [line.split() for line in output.splitlines()]
    return [(each[1], each[-1]) for each in cells if len(each) > 3 and each[0].isdigit()]


def test_right_rows(base):
    model, folder = base
    code, output = run(model, *(folder / name for name in ADAPTERS))
    assert code == 0, output
    assert rows(output) == [*((name, "yes") for name in ADAPTERS), ("__base__", "yes")]
    assert "right, tolerance 1e-04" in output and "logits [4, " in output


def test_own_names_and_prompts(base):
    model, folder = base
    code, output = run(
        model, f"warm={folder / 'red'}", f"cold={folder / 'blue'}", "--prompt", "hello", "--prompt", "a b"
    )
    assert code == 0, output
    assert rows(output) == [("warm", "yes"), ("cold", "yes"), ("__base__", "yes")]
    assert output.count("hello") == 2 and output.count("a b") == 1


def test_rows_that_differ_are_an_error(base, monkeypatch):
    """Mixed batches run the first sample with the second one's adapter."""
    model, folder = base
    resolve = handle.resolve
    monkeypatch.setattr(handle, "resolve", lambda *args: [1 if each == 0 else each for each in resolve(*args)])
    code, output = run(model, *(folder / name for name in ADAPTERS))
    assert code == 1
    assert rows(output) == [("red", "NO"), ("green", "yes"), ("blue", "yes"), ("__base__", "yes")]
    assert "NOT VERIFIED" in output and "wrong for samples 0" in output and "first layer that differs" in output


def test_adapters_that_change_nothing_are_not_verified(base, tmp_path):
    model, _ = base
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")  # its lora_B is zero
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(str(tmp_path / "new"))
    code, output = run(model, tmp_path / "new")
    assert code == 1
    assert rows(output) == [("new", "?"), ("__base__", "?")] and "nothing to compare" in output


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["/nowhere"], "there is no folder /nowhere"),
        (["{red}", "{red}"], "two adapters are called 'red'"),
        (["__base__={red}"], "'__base__'"),
        (["{base}"], "adapter_config.json"),
    ],
)
def test_what_it_does_not_start_with(base, arguments, why):
    model, folder = base
    code, output = run(model, *(each.format(red=folder / "red", base=model) for each in arguments))
    assert code == 2
    assert "verify can't run: " in output and why in " ".join(output.split())


def test_a_model_that_is_not_there(tmp_path, base):
    code, output = run(tmp_path / "nowhere", base[1] / "red")
    assert code == 2 and "verify can't run" in output
