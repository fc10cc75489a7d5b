"""What the garbage collector runs while something else is being traced."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._C import DispatchKey, _IncludeDispatchKeyGuard
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from peft_multibatch import streams


class Subclass(torch.Tensor):
    """A tensor that passes operations on to another one, as those of quantized weights do."""

    @staticmethod
    def __new__(cls, tensor):
        found = torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype, device=tensor.device)
        found.inner = tensor
        return found

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*[getattr(each, "inner", each) for each in args], **(kwargs or {}))


@pytest.fixture(params=["cpu", "subclass", pytest.param("cuda", marks=pytest.mark.gpu)])
def freed(request, monkeypatch):
    """A tensor that kernels may still read, and the calls of `record_stream`; on a CPU, a stand-in."""
    tensor = torch.zeros(4, device="cuda" if request.param == "cuda" else "cpu")
    if request.param == "subclass":
        tensor = Subclass(tensor)
    calls = []

    def record_stream(stream):
        calls.append(stream)
        if tensor.is_cuda:
            tensor.record_stream(stream)
        else:  # an operation that modes see, which no CPU has
            with pytest.raises(NotImplementedError, match="from the 'CPU' backend"):
                tensor.record_stream(torch._C.Stream(stream_id=0, device_index=0, device_type=1))

    device = tensor.device if tensor.is_cuda else torch.device("cuda", 99)
    if tensor.is_cuda:
        streams.note(device)
    else:
        known = streams._Device()
        known.streams[0] = None
        monkeypatch.setitem(streams._devices, device, known)
    return SimpleNamespace(is_cuda=True, device=device, record_stream=record_stream), calls


def test_memory_is_freed_while_torch_traces_a_graph(freed):
    tensor, calls = freed

    def step(x):
        streams.keep_for_all([tensor])  # as a finalizer does
        return x + 1

    with FakeTensorMode() as mode:
        found = step(mode.from_tensor(torch.zeros(3)))
    graph = make_fx(step, tracing_mode="fake")(torch.zeros(3)).graph
    assert found.shape == (3,)
    assert calls
    assert [node.op for node in graph.nodes] == ["placeholder", "call_function", "output"]


class Refused(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        raise AssertionError(function)


class RefusedByDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(function)


def inside(block):
    """Run a function inside a block."""

    def run(function):
        with block():
            function()

    return run


def by(transform):
    """Run a function while another one is transformed."""
    return lambda function: transform(lambda x: (function(), x.sum())[1])(torch.ones(2))


STATES = {
    "functions": inside(Refused),
    "dispatch": inside(RefusedByDispatch),
    "functional tensors": inside(FunctionalTensorMode),
    "in a functional operation": inside(lambda: _IncludeDispatchKeyGuard(DispatchKey.Functionalize)),
    "functionalize": by(torch.func.functionalize),
    "grad": by(torch.func.grad),
    "vmap": by(torch.vmap),
    "inference": inside(torch.inference_mode),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_memory_is_freed_in_any_state_of_a_thread(state, freed):
    tensor, calls = freed
    state(lambda: streams.keep_for_all([tensor]))
    assert calls


def test_tensors_of_traced_code_have_no_memory_to_keep(monkeypatch):
    device = torch.device("cuda", 0)
    known = streams._Device()
    known.streams[1] = None  # an error if it is used
    monkeypatch.setitem(streams._devices, device, known)
    with FakeTensorMode():
        fake = torch.empty(2, device=device)
    streams.keep_for_all([fake])
