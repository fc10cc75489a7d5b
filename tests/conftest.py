"""Settings for all tests: fixed seeds, poisoned memory, no network."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import os
import sys
import warnings


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # xdist runs one worker per core, and tests start other processes

import pytest
import torch


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; read when they are defined

from transformers.utils.logging import disable_progress_bar


disable_progress_bar()
torch.set_num_threads(1)  # in case torch was imported before
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch 2.9 and newer also have settings per operation
    # with TF32 in its convolutions, a base model's rows depend on the size of their batch
    torch.backends.cudnn.allow_tf32 = False

# pytest's handlers go to all loggers that don't propagate, and with one torch.compile describes each of its steps
trace = logging.getLogger("torch.__trace")
trace.propagate = True
trace.handlers.clear()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    """Make `torch.empty` and its relatives return NaN, so that unwritten elements can't pass for zeros."""

    def poison(function):
        def poisoned(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if tensor.is_floating_point() and not tensor.is_meta:
                with torch.no_grad():  # the tensor may be a parameter
                    tensor.fill_(float("nan"))
            return tensor

        return poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


def pytest_collection_finish():
    """Take what has been imported out of the garbage collector's sight.

    `enable` asks it for the holders of a dictionary, which takes 50 ms for the half a million objects of torch and
    transformers, and every full collection visits them too.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None:
        _remember_builtins(interpreter)
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or Triton's bindings report what is left at exit as leaks


def _remember_builtins(interpreter):
    """Make Triton's interpreter search its language for built-in functions once, not at every call of a function."""
    is_builtin, patch_attr = interpreter.tl.core.is_builtin, interpreter._patch_attr

    @functools.cache
    def builtins(package):
        return [each for each in inspect.getmembers(package) if is_builtin(each[1])]

    def patch_builtin(package, *args):
        for name, member in builtins(package):
            if getattr(package, name) is member:  # otherwise it is patched already
                patch_attr(package, name, member, *args)

    interpreter._patch_builtin = patch_builtin


def pytest_collection_modifyitems(items):
    devices = torch.cuda.device_count()
    for item in items:
        for marker, needed in (("gpu", 1), ("multi_gpu", 2)):
            if item.get_closest_marker(marker) and devices < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA devices, found {devices}"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """From transformers 5.24 on, adapters of models without a `PeftModel` need peft 0.22, which isn't released."""
    try:
        return (yield)
    except ValueError as error:
        if "PEFT you are using is not compatible, please use a version >= 0.22" in str(error):
            pytest.skip("the transformers model's own add_adapter asks for peft 0.22, see docs/support.md")
        raise


@pytest.fixture
def compiled(request):
    """A model, its handle, the model compiled as one graph, and the list of graphs made so far.

    The model has one layer, because torch traces each by itself; a test asks for more by `indirect` parameters.
    """
    from models import peft_model

    import peft_multibatch

    torch._dynamo.reset()
    model = peft_model(num_hidden_layers=getattr(request, "param", 1))
    mb = peft_multibatch.enable(model)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    inner = model.get_base_model()
    return model, mb, torch.compile(inner, fullgraph=True, backend=backend), graphs
