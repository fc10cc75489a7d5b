"""Layers that `backward` runs again use the ids of their first run, whatever checkpointing is used."""

from __future__ import annotations

import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from models import alone, left_padded, lora_configs, peft_model
from tolerances import assert_close
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import _checkpoint_without_reentrant_generator, checkpoint, noop_context_fn

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.calls import replay


pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


ADAPTERS = ["three", "four", "eight"]
NAMES = ["three", "eight", "__base__", "four", "three", "eight"]
OTHERS = ["eight", "eight", "three", "three", "__base__", "four"]


class Rerun(torch.autograd.Function):
    """A reentrant checkpoint, as users write them."""

    @staticmethod
    def forward(own, function, x):
        own.again = function
        own.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(own, grad):
        x = own.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = own.again(x)
        torch.autograd.backward(y, grad)
        return None, x.grad


class Decorated(Rerun):
    forward = staticmethod(torch.amp.custom_fwd(device_type="cpu")(Rerun.forward))


def composable(function, x):
    """Like torch.distributed's `checkpoint`, whose frame isn't on the stack while the function runs."""
    steps = _checkpoint_without_reentrant_generator(function, True, noop_context_fn, "default", False, True, x)
    next(steps)
    try:
        return function(x)
    finally:
        next(steps, None)


CHECKPOINTS = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "without early stop": partial(checkpoint, use_reentrant=False, early_stop=False),
    "composable": composable,
    "a function of one's own": Rerun.apply,
    "decorated": Decorated.apply,
}
every_checkpoint = pytest.mark.parametrize("run", CHECKPOINTS.values(), ids=CHECKPOINTS)
both = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


@pytest.fixture
def model():
    model = peft_model()
    model.enable_input_require_grads()
    model.set_requires_grad(ADAPTERS)
    return model


@pytest.fixture
def layer(model):
    return model.get_base_model().model.layers[0].mlp


def x_of(seed=0):
    return torch.randn(6, 5, 48, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(model):
    found = {key: p.grad for key, p in model.named_parameters() if "lora_" in key and p.grad is not None}
    model.zero_grad()
    assert found
    return found


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for key in found:
        assert_close(found[key], wanted[key])


def by_peft(model, run, *mixes):
    """Compute gradients with PEFT, row by row; `run` takes a slice of rows."""
    for names in mixes:
        for row, name in enumerate(names):
            alone(model, name, lambda row=row: run(slice(row, row + 1)).backward())
            model.set_requires_grad(ADAPTERS)
    return gradients(model)


def loss_of(y):
    return y.square().sum()


@every_checkpoint
def test_by_hand_inside_a_model(model, run):
    """A layer's own forward is checkpointed, and the model is called with ids."""
    want = by_peft(model, lambda rows: logits_loss(model, rows), NAMES)
    layers = model.get_base_model().model.layers
    for each in layers:
        mlp = each.mlp.forward
        each.mlp.forward = partial(run, mlp)
    peft_multibatch.enable(model)
    loss = logits_loss(model, adapter_ids=NAMES)
    loss.backward()
    same(gradients(model), want)


def logits_loss(model, rows=slice(None), **kwargs):
    inputs = {key: value[rows] for key, value in left_padded().items()}
    return loss_of(model(**inputs, use_cache=False, **kwargs).logits)


@both
def test_activation_checkpointing_of_torch_distributed(model, reentrant):
    want = by_peft(model, lambda rows: logits_loss(model, rows), NAMES)
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    layers = type(model.get_base_model().model.layers[0])
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=kind),
        check_fn=lambda module: isinstance(module, layers),
    )
    peft_multibatch.enable(model)
    logits_loss(model, adapter_ids=NAMES).backward()
    same({key.replace("_checkpoint_wrapped_module.", ""): grad for key, grad in gradients(model).items()}, want)


@both
def test_transformers_switch_and_one_by_hand_around_it(model, reentrant):
    """Checkpoints are nested, and the whole model runs again."""
    want = by_peft(model, lambda rows: logits_loss(model, rows), NAMES)
    inner = model.get_base_model().train()
    inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
    mb = peft_multibatch.enable(model)
    logits_loss(model, adapter_ids=NAMES).backward()
    same(gradients(model), want)
    embeds = inner.get_input_embeddings()(left_padded()["input_ids"]).detach().requires_grad_()
    for around in (partial(checkpoint, use_reentrant=True), partial(checkpoint, use_reentrant=False)):
        with mb.batch(NAMES):
            y = around(
                lambda x: (
                    model(inputs_embeds=x, attention_mask=left_padded()["attention_mask"], use_cache=False).logits
                ),
                embeds,
            )
        loss_of(y).backward()
        same(gradients(model), want)


@every_checkpoint
def test_several_calls_before_one_backward(model, layer, run):
    """Some calls have no ids, and other ids are active during backward."""
    x, other = x_of(), x_of(1)
    want = by_peft(model, lambda rows: loss_of(layer(x[rows])), NAMES, OTHERS)
    plain = by_peft(model, lambda rows: loss_of(layer(other[rows])), ["four"] * 6)
    model.set_adapter("four")
    model.set_requires_grad(ADAPTERS)
    mb = peft_multibatch.enable(model)
    losses = []
    for names in (NAMES, OTHERS):
        with mb.batch(names):
            losses.append(loss_of(run(layer, x)))
        losses.append(loss_of(run(layer, other)))
    with mb.batch(["eight"] * 6):
        (losses[0] + losses[2]).backward()
    same(gradients(model), want)
    with mb.batch(["eight"] * 6):
        losses[1].backward()
    same(gradients(model), plain)
    losses[3].backward()
    same(gradients(model), plain)


@pytest.mark.parametrize("outer", ["reentrant", "not reentrant", "composable", "a function of one's own"])
@pytest.mark.parametrize("inner", ["reentrant", "not reentrant", "composable"])
def test_nested(model, layer, outer, inner):
    """All layers run in the inner checkpoints, and calls without ids stay so."""
    x = x_of()
    outer, inner = CHECKPOINTS[outer], CHECKPOINTS[inner]

    def twice(run, x):
        return run(layer, (x + run(layer, x.sin())).tanh())

    want = by_peft(model, lambda rows: loss_of(twice(lambda f, x: f(x), x[rows])), NAMES)
    plain = by_peft(model, lambda rows: loss_of(twice(lambda f, x: f(x), x[rows])), ["four"] * 6)
    model.set_adapter("four")
    model.set_requires_grad(ADAPTERS)
    mb = peft_multibatch.enable(model)
    with mb.batch(NAMES):
        loss = loss_of(outer(partial(twice, inner), x))
    without = loss_of(outer(partial(twice, inner), x))
    loss.backward()
    same(gradients(model), want)
    without.backward()
    same(gradients(model), plain)


@every_checkpoint
def test_ids_inside_of_what_is_run_again(model, layer, run):
    """Layers without ids run next to them."""
    x = x_of()
    want = by_peft(model, lambda rows: loss_of(layer(x[rows])), NAMES, ["four"] * 6)
    model.set_adapter("four")
    model.set_requires_grad(ADAPTERS)
    mb = peft_multibatch.enable(model)

    def function(x):
        before = layer(x[:, :2])
        with mb.batch(NAMES):
            y = layer(x)
        return torch.cat([before, layer(x[:, 2:]), y], dim=1)

    loss_of(run(function, x)).backward()
    same(gradients(model), want)


@every_checkpoint
def test_backward_on_another_thread(model, layer, run):
    x = x_of()
    want = by_peft(model, lambda rows: loss_of(layer(x[rows])), NAMES)
    mb = peft_multibatch.enable(model)
    with mb.batch(NAMES):
        loss = loss_of(run(layer, x))
    with mb.batch(OTHERS):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    same(gradients(model), want)


def test_two_backward_passes_over_one_graph(model, layer):
    x = x_of()
    want = by_peft(model, lambda rows: loss_of(layer(x[rows])), NAMES)
    mb = peft_multibatch.enable(model)
    with mb.batch(NAMES):
        loss = loss_of(checkpoint(layer, x, use_reentrant=False))
    for retain in (True, False):
        loss.backward(retain_graph=retain)
        same(gradients(model), want)


def test_plain_calls_are_never_looked_for(model, layer, monkeypatch):
    monkeypatch.setattr(replay, "functions", None)
    monkeypatch.setattr(replay, "checkpoint_frames", None)
    mb = peft_multibatch.enable(model)
    for run in CHECKPOINTS.values():
        loss_of(run(layer, x_of())).backward()
    with torch.no_grad(), mb.batch(NAMES):
        layer(x_of())
        model.generate(**left_padded(), max_new_tokens=2)
    with torch.inference_mode():
        model(**left_padded(), adapter_ids=NAMES)


class Opaque(Rerun):
    """A checkpoint whose first run can't be observed."""

    @staticmethod
    def forward(function, x):
        return function(x)

    @staticmethod
    def setup_context(own, inputs, output):
        own.again = inputs[0]
        own.save_for_backward(inputs[1])


def by_hook(function, x):
    with torch.no_grad():
        y = function(x)
    y = (x * 0).sum() + y

    def hook(grad):
        with torch.enable_grad():
            function(x.detach().requires_grad_()).backward(grad)

    y.register_hook(hook)
    return y


def by_hooks(function, x):
    def unpack(_):
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            return function(x)

    with torch.autograd.graph.saved_tensors_hooks(lambda _: None, unpack):
        return function(x)


@pytest.mark.parametrize("run", [Opaque.apply, by_hook, by_hooks], ids=["setup_context", "hook", "hooks"])
def test_what_nobody_knows_is_an_error(model, layer, run):
    mb = peft_multibatch.enable(model)
    x = x_of()
    if run is not by_hooks:
        loss_of(run(layer, x)).backward()  # no call had ids so far
    with mb.batch(NAMES):
        loss = loss_of(run(layer, x))
    with pytest.raises(
        errors.ModelStateError, match=r"backward ran .*mlp\.(gate|up)_proj again, and the adapter_ids"
    ) as found:
        loss.backward()
    assert "mb.batch" in str(found.value)
    with mb.batch(NAMES):
        layer(x)


@every_checkpoint
def test_backward_after_disable(model, layer, run):
    mb = peft_multibatch.enable(model)
    with mb.batch(NAMES):
        loss = loss_of(run(layer, x_of()))
    plain = loss_of(run(layer, x_of()))
    mb.disable()
    with pytest.raises(errors.NotEnabledError, match="Call backward first"):
        loss.backward()
    plain.backward()


@every_checkpoint
def test_nothing_is_kept(model, layer, run):
    mb = peft_multibatch.enable(model)
    gc.collect()
    gc.disable()
    try:
        for does_backward in (True, False):
            x = x_of()
            gone = weakref.ref(x)
            with mb.batch(NAMES):
                loss = loss_of(run(layer, x))
            if does_backward:
                loss.backward()
            del loss, x
            assert gone() is None
            gc.collect()
            assert not mb._router.replays._calls
    finally:
        gc.enable()


def test_dora_experts_and_all_that_runs_per_segment(model, layer):
    config = lora_configs()["eight"]
    config.use_dora = True
    model.add_adapter("dora", config)
    model.eval()
    model.set_requires_grad([*ADAPTERS, "dora"])
    names, x = ["dora", *NAMES[1:]], x_of()
    mb = peft_multibatch.enable(model)
    found = []
    for run in (lambda f, x: f(x), *CHECKPOINTS.values()):
        with mb.batch(names):
            loss = loss_of(run(layer, x))
        loss.backward()
        found.append(gradients(model))
    for each in found[1:]:
        same(each, found[0])


@both
def test_compiled_layers_that_are_run_again(model, layer, reentrant):
    x = x_of()
    want = by_peft(model, lambda rows: loss_of(layer(x[rows])), NAMES)
    mb = peft_multibatch.enable(model)
    torch._dynamo.reset()
    fast = torch.compile(layer, backend="aot_eager")
    with mb.batch(NAMES):
        if reentrant:
            with pytest.raises(errors.UnsupportedError, match="use_reentrant=False"):
                checkpoint(fast, x, use_reentrant=True)
            return
        loss = loss_of(checkpoint(fast, x, use_reentrant=False))
    loss.backward()
    same(gradients(model), want)
