"""Compiled graphs: one graph serves any mix of adapters, is correct after every change, and is never reused
wrongly."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from models import left_padded, lora_configs, peft_model
from tolerances import assert_close
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor import constant_folding

import peft_multibatch
from peft_multibatch import ModelStateError, Segments
from peft_multibatch.calls.threads import current_task


MIXES = [
    [0, 0, 1, 1, 2, 2],
    [0, 0, 0, 0, 0, 1],  # two segments of six samples
    [2, 0, 1, 2, 0, 1],
    [-1, -1, -1, -1, -1, -1],
    [0, -1, 2, -1, 1, -1],
    [1] * 6,
]


def logits(model, rows=6, **kwargs):
    with torch.no_grad():
        return model(**left_padded(rows), use_cache=False, **kwargs).logits


@pytest.mark.parametrize("compiled", [2], indirect=True, ids=["2 layers"])
def test_one_graph_for_any_mix(compiled):
    model, mb, fast, graphs = compiled
    for mix in MIXES:
        with mb.batch(mix):
            actual = logits(fast)
        assert_close(actual, logits(model, adapter_ids=mix))
    assert len(graphs) == 1
    assert sum("shrink" in str(node.target) for node in graphs[0].graph.nodes) == 2 * 4


def test_plain_calls_have_a_graph_of_their_own(compiled):
    model, mb, fast, graphs = compiled
    plain = logits(model)
    for _ in range(2):
        assert_close(logits(fast), plain)
        with mb.batch(MIXES[0]):
            assert_close(logits(fast), logits(model, adapter_ids=MIXES[0]))
    assert len(graphs) == 2


def test_changes_are_seen_without_a_new_graph(compiled):
    model, mb, fast, graphs = compiled
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    for change in (
        lambda: None,
        lambda: layer.lora_B["three"].weight.data.mul_(2),
        lambda: layer.set_scale("eight", 5.0),
    ):
        change()
        with mb.batch(MIXES[2]):
            actual = logits(fast)
        assert_close(actual, logits(model, adapter_ids=MIXES[2]))
    assert len(graphs) == 1


def test_an_adapter_added_later_is_seen(compiled):
    model, mb, fast, _ = compiled
    with mb.batch(MIXES[0]):
        logits(fast)
    model.add_adapter("new", lora_configs()["eight"])
    with mb.batch([3, 0, 3, 1, 2, -1]):
        actual = logits(fast)
    assert_close(actual, logits(model, adapter_ids=[3, 0, 3, 1, 2, -1]))


def test_larger_batches(compiled):
    model, mb, fast, graphs = compiled
    for rows in (2, 6, 20, 6, 100):
        ids = [row % 4 - 1 for row in range(rows)]
        with mb.batch(ids):
            actual = logits(fast, rows)
        assert_close(actual, logits(model, rows, adapter_ids=ids))
    assert len(graphs) == 4  # one per size, because the number of ids is guarded


def test_ids_passed_to_a_compiled_model_are_not_ignored(compiled):
    _, _, fast, _ = compiled
    with pytest.raises(Exception, match=r"with mb.batch\(adapter_ids\): compiled_model"):
        logits(fast, adapter_ids=MIXES[0])


def test_threads_share_one_graph(compiled):
    model, mb, fast, graphs = compiled
    with mb.batch(MIXES[0]):
        logits(fast)
    expected = [logits(model, adapter_ids=mix) for mix in MIXES]

    def work(index):
        for _ in range(5):
            with mb.batch(MIXES[index]):
                assert_close(logits(fast), expected[index])

    with ThreadPoolExecutor(len(MIXES)) as threads:
        list(threads.map(work, range(len(MIXES))))
    assert len(graphs) == 1


def test_adapters_that_another_thread_disabled(compiled):
    model, mb, fast, _ = compiled
    expected, plain = logits(model, adapter_ids=MIXES[0]), logits(model, adapter_ids=MIXES[3])
    block = model.disable_adapter()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(block.__enter__).result()
        with mb.batch(MIXES[0]):
            assert_close(logits(fast), expected)
        thread.submit(block.__exit__, None, None, None).result()
    with mb.batch(MIXES[0]):
        with model.disable_adapter():
            assert_close(logits(fast), plain)
        assert_close(logits(fast), expected)


@pytest.mark.parametrize("own", [None, MIXES[0]], ids=["plain", "ids"])
@pytest.mark.parametrize("ids", [MIXES[2], [0, 1] * 50, [{0: 0.5, 1: 0.5}, 2]], ids=["same size", "larger", "mixture"])
def test_a_call_begins_on_another_thread_while_one_is_compiled(own, ids):
    """It would change the state that the graph is compiled for, and leave wrong guards."""
    model = peft_model(num_hidden_layers=1)
    mb = peft_multibatch.enable(model)
    want, want_other = logits(model, adapter_ids=own), logits(model, rows=len(ids), adapter_ids=ids)
    mb.disable()
    mb = peft_multibatch.enable(model)  # a handle that hasn't seen ids yet
    began, compiled = threading.Event(), threading.Event()

    def other():
        with mb.batch(ids):
            began.set()
            assert compiled.wait(60)
            return logits(fast, rows=len(ids))

    def backend(graph, _):
        if not tasks:
            tasks.append(threads.submit(other))
            began.wait(0.2)
        return graph.forward

    torch._dynamo.reset()
    tasks, fast = [], torch.compile(model.get_base_model(), fullgraph=True, backend=backend)
    with ThreadPoolExecutor(1) as threads, mb.batch(own) if own else contextlib.nullcontext():
        try:
            actual = logits(fast)
        finally:
            compiled.set()
        assert_close(tasks[0].result(), want_other)
        assert_close(actual, want)


def test_a_call_ends_on_another_thread_while_one_is_compiled():
    model = peft_model(num_hidden_layers=1)
    mb = peft_multibatch.enable(model)
    want = logits(model, adapter_ids=MIXES[0])
    began, ends = threading.Event(), threading.Event()

    def other():
        with mb.batch(MIXES[1]):
            began.set()
            assert ends.wait(60)

    def backend(graph, _):
        ends.set()
        wait([task], 0.2)
        assert mb._router.graph.contended  # as during tracing
        return graph.forward

    torch._dynamo.reset()
    fast = torch.compile(model.get_base_model(), fullgraph=True, backend=backend)
    with ThreadPoolExecutor(1) as threads, mb.batch(MIXES[0]):
        task = threads.submit(other)
        assert began.wait(60)
        assert_close(logits(fast), want)
        task.result()
        assert not mb._router.graph.contended


def test_a_thread_runs_under_its_own_ids_or_under_none(compiled):
    model, mb, fast, _ = compiled
    plain, want = logits(model), logits(model, adapter_ids=MIXES[0])
    assert_close(logits(fast), plain)
    with ThreadPoolExecutor(1) as other:
        with mb.batch(MIXES[0]):
            assert_close(logits(fast), want)
            with pytest.raises(ModelStateError, match="without ids on one thread"):
                other.submit(logits, fast).result()
            assert_close(other.submit(contextvars.copy_context().run, logits, fast).result(), want)
            assert_close(logits(fast), want)
        assert_close(other.submit(logits, fast).result(), plain)


def test_a_block_that_another_task_opens_inside_of_one(compiled):
    """The inner block continues meanwhile, with a different number of samples."""
    model, mb, fast, _ = compiled
    want = logits(model, adapter_ids=MIXES[0])

    async def inner(opened, ended):
        with mb.batch([0, 1]):
            assert_close(logits(fast, 2), logits(model, 2, adapter_ids=[0, 1]))
            opened.set()
            await ended.wait()

    async def main():
        opened, ended = asyncio.Event(), asyncio.Event()
        with mb.batch(MIXES[0]):
            task = asyncio.create_task(inner(opened, ended))
            await opened.wait()
            assert mb._router.graph.contended  # so a GPU, which has one location for a plan, refuses it
            assert_close(logits(fast), want)
            ended.set()
            await task
            assert not mb._router.graph.contended
            assert_close(logits(fast), want)

    asyncio.run(main())


def test_a_task_never_gets_the_number_of_one_that_has_ended():
    async def number():
        return current_task()

    async def main():  # new tasks get the memory of old ones, and so their ids
        return [await asyncio.create_task(number()) for _ in range(20)]

    assert len({*asyncio.run(main())}) == 20
    assert current_task() == 0


def test_enabling_and_disabling_a_model_that_was_compiled_before():
    torch._dynamo.reset()
    model = peft_model(num_hidden_layers=1)
    fast = torch.compile(model.get_base_model(), fullgraph=True, backend="eager")
    plain = logits(model)
    assert_close(logits(fast), plain)
    for _ in range(2):
        mb = peft_multibatch.enable(model)
        want = logits(model, adapter_ids=MIXES[2])
        assert_close(logits(fast), plain)
        with mb.batch(MIXES[2]):
            assert_close(logits(fast), want)
        mb.disable()
        assert_close(logits(fast), plain)


def test_training_through_aot_autograd():
    torch._dynamo.reset()
    model = peft_model()
    model.set_requires_grad(["three", "four", "eight"])
    mb = peft_multibatch.enable(model)
    fast = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    weights = [p for name, p in model.named_parameters() if "lora_" in name]

    def gradients(run):
        grads = torch.autograd.grad(run().logits.square().mean(), weights)
        return torch.cat([grad.flatten() for grad in grads])

    def compiled_run():
        with mb.batch(MIXES[0]):
            return fast(**left_padded(), use_cache=False)

    assert_close(gradients(compiled_run), gradients(lambda: model(**left_padded(), adapter_ids=MIXES[0])))


@pytest.mark.parametrize(
    ("optimizer", "dtype"), [(torch.optim.AdamW, torch.float64), (torch.optim.SGD, torch.float32)]
)
def test_compiled_training_leaves_alone_whom_a_batch_does_not_name(optimizer, dtype):
    """Gradients are None if they are None in eager training, whatever came before, so weight decay affects no other
    adapter.

    AdamW amplifies rounding, and so does float64, for which absent weights have another dtype in a graph.
    """
    mixes = [[0] * 6, [1, 1, 1, -1, -1, -1], [-1] * 6, [{"three": 0.5, "eight": 0.5}, 2, 2, 0, 0, -1], [2, 1, 0] * 2]

    def train(compiles):
        torch.manual_seed(0)
        model = peft_model(dtype=dtype, autocast_adapter_dtype=False, num_hidden_layers=1)
        model.set_requires_grad(["three", "four", "eight"])
        inner, mb, graphs = model.get_base_model(), peft_multibatch.enable(model), []

        def backend(graph, inputs):
            graphs.append(graph)
            return aot_eager(graph, inputs)

        run = torch.compile(inner, fullgraph=True, backend=backend) if compiles else inner
        weights = {key: p for key, p in model.named_parameters() if "lora_" in key}
        steps = optimizer(weights.values(), lr=0.01, weight_decay=0.1)
        found = []
        for number, mix in enumerate([*mixes, *mixes[:2]]):
            with mb.batch([{"four": 0.1, "three": 0.9}] * 6), mb.batch(mix):  # outer blocks don't matter
                loss = run(**left_padded(), use_cache=False).logits.square().mean()
            if loss.requires_grad:
                loss.backward()
            found.append({key: p.grad.clone() for key, p in weights.items() if p.grad is not None})
            if number != 3:  # otherwise gradients accumulate
                steps.step()
                steps.zero_grad()
        return found, {key: p.detach() for key, p in weights.items()}, len(graphs)

    torch._dynamo.reset()
    wanted, weights, _ = train(False)
    found, trained, graphs = train(True)
    for each, want in zip(found, wanted):
        assert each.keys() == want.keys()
        for key in want:
            assert_close(each[key], want[key])
    for key, want in weights.items():
        assert_close(trained[key], want)
    assert graphs == (1 if dtype == torch.float32 else 2)


def test_an_outer_block_that_goes_on_trains_again(layer):
    layer, mb, x, _ = layer
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (fast, layer, fast):
        with mb.batch([2] * 6):
            run(x)
            with mb.batch([1] * 6):
                run(x)
            run(x).square().mean().backward()
        found = {key: p.grad for key, p in layer.named_parameters() if p.grad is not None}
        layer.zero_grad()
        assert found and all("eight" in key for key in found)
    for frozen in (True, False, True, False):
        for p in (layer.lora_A["eight"].weight, layer.lora_B["eight"].weight):
            p.requires_grad_(not frozen)
        with mb.batch([2, 1] * 3):
            fast(x).square().mean().backward()
        names = {name for name in ("eight", "four") if layer.lora_A[name].weight.grad is not None}
        layer.zero_grad()
        assert names == ({"four"} if frozen else {"eight", "four"})


@pytest.fixture
def layer(compiled):
    """A trainable layer, its handle, an input, and a function that returns the gradients of its adapters."""
    model, mb, _, _ = compiled
    model.set_requires_grad(["three", "four", "eight"])
    layer = model.get_base_model().model.layers[0].self_attn.o_proj
    weights = [p for name, p in layer.named_parameters() if "lora_" in name]

    def gradients(loss):
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, weights)])

    return layer, mb, torch.randn(6, 5, 48), gradients


def test_backward_after_other_ids_were_in_force(layer):
    """As in a loss of two passes with different ids."""
    layer, mb, x, gradients = layer
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def loss(run):
        product = 1
        for mix in MIXES[:2]:
            with mb.batch(mix):
                product = product * run(x)
        return product.mean()

    assert_close(gradients(loss(fast)), gradients(loss(layer)))


def test_a_plan_that_backward_asks_for_again_is_the_same_or_an_error(layer):
    layer, mb, x, gradients = layer
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")

    def loss():
        with mb.batch(MIXES[0]):
            return fast(x).square().mean()

    with torch._functorch.config.patch(activation_memory_budget=0.0):  # keeps only inputs
        with mb.batch(MIXES[0]):
            assert_close(gradients(fast(x).square().mean()), gradients(layer(x).square().mean()))
        with pytest.raises(ModelStateError, match="without ids"):
            gradients(loss())
        before = loss()
        with mb.batch(MIXES[1]), pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(before)
        with mb.batch(MIXES[1]), pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(loss())


def test_plans_are_no_constants_where_weights_are(compiled):
    """As with inductor's ``freezing``, which evaluates everything that depends only on constants."""
    _, mb, _, _ = compiled
    known, graph = mb._router.graph, torch.fx.Graph()
    take_plan = torch.ops.peft_multibatch.take_plan.default
    graph.output(graph.call_function(take_plan, (graph.get_attr("plans"), [6, 5, 48], known.key, 0, False)))
    module = torch.fx.GraphModule({"plans": known.plans}, graph)
    with mb.batch(MIXES[0]):
        known.arm()  # as during capture
        constant_folding.constant_fold(module)
    for mix in MIXES:
        with mb.batch(mix):
            assert Segments.unpack(module()).slots == mix


def test_no_rows_at_all(layer):
    layer, mb, _, _ = layer
    fast = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad(), mb.batch(MIXES[0]):
        for shape in ((6, 0, 48), (0, 48)):
            assert fast(torch.randn(shape)).shape == shape
