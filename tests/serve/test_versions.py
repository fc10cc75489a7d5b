"""transformers' internals that the server uses are checked before it starts, and missing ones are named."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from peft_multibatch import compat


def test_the_installed_version_has_all_of_it():
    compat.check_serving()
    assert version("transformers").startswith(compat.SERVING_TESTED)


@pytest.mark.parametrize("place", compat.SERVING)
@pytest.mark.parametrize("what", ["the method", "what it reads"])
def test_what_is_not_there_is_named(monkeypatch, place, what):
    module, owner, method = place.split(".")
    kind = getattr(import_module(f"transformers.generation.continuous_batching.{module}"), owner)
    names = compat.SERVING[place]
    if what == "the method":
        monkeypatch.setattr(kind, method, None)
        why = f"{owner}.{method} is not there"
    elif names:
        monkeypatch.setattr(kind, method, lambda self: None)
        why = f"{owner}.{method} has no {', '.join(names)}"
    else:
        return
    with pytest.raises(ImportError, match=re.escape(why)) as caught:
        compat.check_serving()
    assert f"expected transformers {compat.SERVING_TESTED}" in str(caught.value)


def test_a_module_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(compat, "SERVING", {"nothing.Here.at_all": ()})
    with pytest.raises(ImportError, match=r"Here\.at_all is not there"):
        compat.check_serving()


def test_the_docs_say_which_versions():
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    assert f"transformers {compat.SERVING_TESTED}" in page
