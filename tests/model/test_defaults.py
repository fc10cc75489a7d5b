"""Rows match PEFT's for any default dtype and default device of torch."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path

import pytest
import torch
from mixtures import MIXTURES, expected
from models import left_padded, lora_configs, peft_model
from tolerances import assert_close

import peft_multibatch


PACKAGE = Path(peft_multibatch.__file__).parent


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = {
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
}
MIXES = {
    "two segments": ["three", "three", "eight", "eight", "eight", "eight"],
    "interleaved": ["three", "eight", -1, "four", "three", "eight"],
    "mixtures": MIXTURES,
    "dora": ["dora", "eight", -1, "four", "three", "four"],
    "per segment": ["bias", "eight", -1, "four", "three", "bias"],
}

CASES = [(default, kind) for default in DEFAULTS for kind in ("torch", "triton", "gradients")]
CASES += [
    ("float16", "compiled gradients"),
    ("float64", "compiled"),
    ("device", "compiled gradients"),
]  # slow ones


def build(layers):
    model = peft_model(num_hidden_layers=layers)
    for name, option in {"dora": "use_dora", "bias": "lora_bias"}.items():
        config = lora_configs()["eight"]
        setattr(config, option, True)
        model.add_adapter(name, config)
    return model.eval()


def logits(model, **kwargs):
    return model(**kwargs, use_cache=False).logits


def trained(model):
    model.set_requires_grad(["three", "four", "eight"])
    return [p for key, p in model.named_parameters() if "lora_" in key and p.requires_grad]


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(("default", "kind"), CASES)
def test_rows_under_any_default(default, kind):
    # torch.compile and Triton's interpreter take as long for each layer; with "torch" and "gradients" they are two
    model, inputs = build(1 if "compiled" in kind or kind == "triton" else 2), left_padded()
    mixes = list(MIXES)[:3] if "compiled" in kind else list(MIXES)
    with torch.no_grad():
        want = [expected(model, MIXES[mix], inputs, lambda row: logits(model, **row)) for mix in mixes]
    weights = trained(model)
    mb = peft_multibatch.enable(model, backend="triton" if kind == "triton" else "torch")
    run, trains = model.get_base_model(), "gradients" in kind
    want_grads = [grads(model, weights, inputs, MIXES[mix]) if trains else None for mix in mixes]
    mb.disable()
    torch._dynamo.reset()
    if "compiled" in kind:
        run = torch.compile(run, fullgraph=True, backend="aot_eager" if trains else "eager")
    with DEFAULTS[default]():
        mb = peft_multibatch.enable(model, backend="triton" if kind == "triton" else "torch")
        for mix, rows, own in zip(mixes, want, want_grads):
            with torch.set_grad_enabled(trains), mb.batch(MIXES[mix]):
                actual = logits(run, **inputs)
            assert_close(actual, rows)
            if own is not None:
                found = torch.autograd.grad(actual.square().mean(), weights, allow_unused=True)
                for each, gradient in zip(found, own):
                    if gradient is not None:
                        assert_close(each, gradient)
        mb.disable()


def grads(model, weights, inputs, mix):
    """Compute gradients with torch's own defaults; many tests compare these with PEFT."""
    loss = logits(model, **inputs, adapter_ids=mix).square().mean()
    return torch.autograd.grad(loss, weights, allow_unused=True)


@pytest.mark.parametrize("default", DEFAULTS)
def test_layers_by_themselves_under_any_default(default):
    model = peft_model()
    layer = model.get_base_model().model.layers[0].self_attn.o_proj
    x = torch.randn(6, 5, 48)
    with torch.no_grad():
        want = expected(model, MIXTURES, {"x": x}, lambda row: layer(row["x"]))
    mb = peft_multibatch.enable(model)
    with DEFAULTS[default](), torch.no_grad(), mb.batch(MIXTURES):
        assert_close(layer(x), want)


FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "tensor", "zeros",
}  # fmt: skip


def test_no_tensor_is_made_of_a_default_dtype_or_on_a_default_device():
    found = []
    for path in PACKAGE.rglob("*.py"):
        if "demo" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            is_factory = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            is_factory = is_factory and ast.unparse(node.func.value) == "torch" and node.func.attr in FACTORIES
            if is_factory and not {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node)}")
    assert found == []
