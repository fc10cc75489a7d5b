"""A tokenizer, a tiny model with three adapters, and a server that most tests share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from asynchronous import asynchronous
from peft import PeftModel


pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from serving import save_adapters, save_tokenizer, serving, tiny_model

from peft_multibatch.serve import core, process


__all__ = ["asynchronous"]


@pytest.fixture(scope="session", autouse=True)
def _stays_frozen():
    """Keep engines in this process from collecting, freezing and thawing everything, which takes seconds for each.

    The libraries are frozen already, and thawed objects would slow down all tests that follow. Servers in processes of
    their own, as in `test_command.py`, do it.
    """
    nothing = SimpleNamespace(collect=lambda: None, freeze=lambda: None, unfreeze=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        for each in (core, process):
            patch.setattr(each, "gc", nothing)
        yield


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    return save_adapters(tmp_path_factory.mktemp("adapters"), tokenizer)


@pytest.fixture(scope="session")
def alone(tokenizer, folder):
    """The model alone, and PEFT with each adapter alone."""
    models = {"base": tiny_model(tokenizer)}
    for name in ("red", "green", "blue"):
        models[name] = PeftModel.from_pretrained(tiny_model(tokenizer), str(folder / name)).eval()
    return models


@pytest.fixture(scope="module")
def served(tokenizer, folder):
    with serving(tiny_model(tokenizer), tokenizer, folder) as found:
        yield found


@pytest.fixture
def client(served):
    with served.client() as found:
        yield found
