"""A pytest plugin that runs PEFT's own tests of mixed batches through peft_multibatch: `make test-peft`.

Wherever a test passes `adapter_names`, the model is enabled first. A test without a batch that went through
peft_multibatch would prove nothing, and fails.
"""

from __future__ import annotations

import functools
import os
import sys
import weakref
from pathlib import Path
from typing import Any


HOME = Path(os.environ["PEFT_TESTS"])
os.environ |= {"HF_HUB_CACHE": str(HOME / "hub"), "HF_HUB_OFFLINE": "1"}
sys.path.append(str(HOME / "packages"))  # after all others, so that installed packages take precedence

import pytest  # noqa: E402
from deviations import DEVIATIONS  # noqa: E402
from peft import PeftModel, peft_model  # noqa: E402
from peft.tuners.lora import Embedding  # noqa: E402
from tiny_models import MODELS  # noqa: E402

import peft_multibatch  # noqa: E402
from peft_multibatch.calls.router import Router  # noqa: E402


# Substrings of the ids of tests that run mixed batches.
SELECTED = ("TestMixedAdapterBatches", "mixed_adapter_batches", "mixed_batch", "mixed_forward")

batches = 0
models: weakref.WeakSet[PeftModel] = weakref.WeakSet()


def pytest_addoption(parser):
    parser.addoption("--peft-alone", action="store_true", help="run the tests as PEFT runs them, for comparison")


def pytest_configure(config):
    if config.getoption("--peft-alone"):
        return
    kinds = [kind for kind in vars(peft_model).values() if isinstance(kind, type) and issubclass(kind, PeftModel)]
    for kind in kinds:
        for method in ("forward", "generate"):
            if method in vars(kind):
                enable_at(kind, method)
    enable_around(Embedding)
    remember_models()
    count_batches()


def enable_at(kind: type, method: str) -> None:
    """Enable a model at its first call with names, which then runs `enable`'s replacement."""
    original = getattr(kind, method)

    @functools.wraps(original)
    def wrapper(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is None or method in vars(self):
            return original(self, *args, **kwargs)
        peft_multibatch.enable(self)
        return getattr(self, method)(*args, **kwargs)

    setattr(kind, method, wrapper)


def enable_around(kind: type) -> None:
    """One test calls a layer by itself with names: here the names are active around the call."""
    original = kind.forward

    @functools.wraps(original)
    def wrapper(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return original(self, *args, **kwargs)
        owner = next(model for model in models if any(module is self for module in model.modules()))
        with peft_multibatch.enable(owner).batch(adapter_names):
            return self(*args, **kwargs)

    kind.forward = wrapper


def remember_models() -> None:
    original = PeftModel.__init__

    @functools.wraps(original)
    def wrapper(self, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        models.add(self)

    PeftModel.__init__ = wrapper


def count_batches() -> None:
    original = Router.routing

    @functools.wraps(original)
    def wrapper(self, *args: Any, **kwargs: Any) -> Any:
        global batches
        batches += 1
        return original(self, *args, **kwargs)

    Router.routing = wrapper


def pytest_collection_modifyitems(config, items):
    if not items:
        return  # pytest reports files that couldn't be imported
    mixed = [item for item in items if any(name in item.nodeid for name in SELECTED)]
    config.hook.pytest_deselected(items=set(items) - set(mixed))
    items[:] = mixed
    # avoids requests to the hub for models that PEFT's tests assume to be cached
    sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES = dict.fromkeys(MODELS, 1)
    if config.getoption("--peft-alone"):
        return
    for item in items:
        for part in (part for part in DEVIATIONS if part in item.nodeid):
            expected, reason = DEVIATIONS[part]
            item.add_marker(pytest.mark.xfail(raises=expected, reason=reason, strict=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = batches
    try:
        result = yield
    except pytest.fail.Exception:  # a refusal was lifted, unless no batch went through
        check_batches(item, before)
        raise
    check_batches(item, before)
    return result


def check_batches(item, before: int) -> None:
    if batches == before and not item.config.getoption("--peft-alone"):
        raise AssertionError("no batch went through peft_multibatch, so that this test says nothing about it")


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{batches} batches went through peft_multibatch")
