"""Models with the Triton kernels, in the interpreter on a CPU and on a GPU."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from models import SIZES, base_model, left_padded, lora_configs, peft_model, row_by_row
from peft import LoraConfig, get_peft_model
from tolerances import assert_close
from torch.utils.checkpoint import checkpoint

import peft_multibatch
from peft_multibatch import Segments
from peft_multibatch.layers import deltas, linear


triton_backend = pytest.importorskip("peft_multibatch.ops.triton_backend", reason="needs triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not triton_backend.INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # tokens are compared in full float32
]
gpu = pytest.mark.gpu

NAMES = ["three", "eight", "__base__", "four", "three", "eight"]
MIXES = [
    [0, 0, 1, 1, 2, 2],
    [0, 0, 0, 0, 0, 1],  # two segments of six samples
    [2, 0, 1, 2, 0, 1],
    [-1, -1, -1, -1, -1, -1],
    [0, -1, 2, -1, 1, -1],
    [1] * 6,
]


def inputs(rows=6, length=4):
    return {key: value.to(DEVICE) for key, value in left_padded(rows, length).items()}


def enabled(fuse=True, layers=1 if DEVICE == "cpu" else 2):
    """A model that uses the kernels; on a CPU of one layer, because the interpreter needs as long for each."""
    model = peft_model(num_hidden_layers=layers).to(DEVICE)
    mb = peft_multibatch.enable(model, backend="triton", fuse=fuse)
    assert mb.report().backend == "triton"
    return model, mb


@pytest.fixture
def launches(monkeypatch):
    """The number of products that ran, without which a test would prove nothing."""
    count = []
    original = triton_backend.Product.__call__

    def counted(self, *args):
        count.append(1)
        return original(self, *args)

    monkeypatch.setattr(triton_backend.Product, "__call__", counted)
    return count


def logits(model, names=NAMES, rows=6, length=4, **kwargs):
    with torch.no_grad():
        ids = {"adapter_ids": names} if names is not None else {}
        return model(**inputs(rows, length), **ids, **kwargs).logits


def expected(model, names=NAMES):
    with torch.no_grad():
        return torch.cat(row_by_row(model, names, inputs(len(names)), lambda row: model(**row).logits))


def test_what_graphs_read_has_no_long_segments():
    """All tokens of one adapter form one segment, and a graph has two programs for each."""
    model, mb = enabled()
    names = ["four"] * 40 + ["three", "four"] * 4
    logits(model, names, len(names))
    ((buffer,),) = mb._router.graph.buffers.values()
    plan = Segments.unpack(buffer.short.packed)
    assert [mb.adapter_names[slot] for slot in plan.slots] == names
    assert (plan.num_segments, plan.longest) == (4, 16)
    assert not buffer.long.packed.any()  # of which nobody reads any


@pytest.mark.parametrize("compiled", [(True, 1)], indirect=True)
def test_what_graphs_of_long_inputs_read_is_cut_into_samples(compiled):
    """A program has the rows of one sample, whichever samples have the same adapter."""
    model, mb, fast, graphs = compiled
    names = ["four"] * 5 + ["three", "four", "three"]
    for length in (9, 11, 4, 12, 3, 4, 9):
        batch = inputs(8, length)
        with mb.batch(names), torch.no_grad():
            actual = fast(**batch, use_cache=False).logits
        assert_close(actual, logits(model, names, 8, length, use_cache=False))
    assert len(graphs) == 2  # of 9 tokens, and of any number
    ((buffer,),) = mb._router.graph.buffers.values()
    plans = [Segments.unpack(each.packed) for each in (buffer.short, buffer.long)]
    assert all([mb.adapter_names[slot] for slot in plan.slots] == names for plan in plans)
    assert [(plan.num_segments, plan.longest) for plan in plans] == [(2, 6), (8, 1)]


def test_compiled_layers_in_continuous_batching_read_pieces():
    """All tokens of a step are in one row of the input, and each is an entry."""
    model, mb = enabled()
    layer = model.get_base_model().model.layers[0].mlp
    torch._dynamo.reset()
    fast = torch.compile(layer, backend="aot_eager" if DEVICE == "cpu" else "inductor", fullgraph=True)
    x = torch.randn(1, 40, SIZES["hidden_size"], device=DEVICE)
    for slots in ([0] * 20 + [1, 2] * 10, [2] * 40):
        with torch.no_grad(), mb._router.routing(slots, expands=False, packed=True):
            assert_close(fast(x), layer(x))
        ((buffer,),) = mb._router.graph.buffers.values()
        plans = [Segments.unpack(each.packed) for each in (buffer.short, buffer.long)]
        assert [plan.slots for plan in plans] == [slots, slots]
        assert plans[0].num_segments == plans[1].num_segments < 6


def test_steps_of_continuous_batching_write_one_plan():
    """Also after longer inputs, whose plan would cost more than that of the step."""
    model, mb = enabled()
    logits(model, length=9)
    ((buffer,),) = mb._router.graph.buffers.values()
    before = buffer.long.packed.clone()
    slots = [mb.adapter_names.index("four")] * 12
    with torch.no_grad(), mb._router.routing(slots, expands=False, packed=True) as call:
        call.inside, call.for_graphs = True, True
        mb._router.graph.prepare(call, buffer.short.packed.device)
        assert Segments.unpack(buffer.short.packed).slots == slots
        assert torch.equal(buffer.long.packed, before)
    logits(model, length=9)
    assert torch.equal(Segments.unpack(buffer.long.packed).pack(), Segments.unpack(before).pack())


@pytest.mark.parametrize("compiled", [(True, 1)], indirect=True)
def test_sizes_of_inputs_are_no_condition_of_graphs(compiled):
    _, mb, fast, graphs = compiled
    for length in (20, 4):
        batch = inputs(6, length)
        for each in batch.values():
            torch._dynamo.mark_dynamic(each, 1, min=2, max=64)
        with mb.batch(NAMES), torch.no_grad():
            fast(**batch, use_cache=False)
    assert len(graphs) == 1


def test_a_capture_of_longer_inputs_than_any_before_reads_what_there_is():
    """Slower, but as right."""
    model, mb = enabled()
    logits(model)
    graph, bank, device = mb._router.graph, mb._groups[0].bank, inputs()["input_ids"].device
    with torch.no_grad(), mb.batch(NAMES):
        logits(model, None)
        before = graph.fixed(mb._router.live(), bank, device, True, is_long=True)[0]
        model(**inputs(6, 9))
        after = graph.fixed(mb._router.live(), bank, device, True, is_long=True)[0]
    (buffer,) = graph.buffers[str(device)]
    assert [each is buffer.short.packed for each in before] == [each is buffer.long.packed for each in after] == [True]


def test_the_first_long_input_on_another_thread_leaves_the_plan_of_a_step(monkeypatch):
    """Between a step's warm-up and its capture."""
    model, mb = enabled()
    logits(model)
    want, has_run, may_end = logits(model, use_cache=False), threading.Event(), threading.Event()

    def beside():
        with torch.no_grad(), mb.batch(["four"] * 6):
            model(**inputs(6, 9), use_cache=False)
            has_run.set()
            may_end.wait(60)

    with before_a_capture(mb), ThreadPoolExecutor(1) as other:
        model(**inputs(), use_cache=False)
        ends = other.submit(beside)
        assert has_run.wait(60)
        monkeypatch.setattr(triton_backend, "is_capturing", lambda: True)
        actual = model(**inputs(), use_cache=False).logits
        may_end.set()
        ends.result()
    assert_close(actual, want)


@contextmanager
def before_a_capture(mb, names=NAMES):
    """A step of continuous batching before its graph is captured."""
    slots = [mb.adapter_names.index(name) if name != "__base__" else -1 for name in names]
    with torch.no_grad(), mb._router.routing(slots, expands=False) as call:
        call.inside, call.for_graphs = True, True
        yield call


def replace_weights(model, name, rank):
    """Replace the weights of one layer by new ones of another rank."""
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    rows, columns = len(layer.lora_B[name].weight), layer.lora_A[name].weight.shape[1]
    layer.lora_A[name].weight = torch.nn.Parameter(torch.randn(rank, columns, device=DEVICE))
    layer.lora_B[name].weight = torch.nn.Parameter(torch.randn(rows, rank, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # the previous dtype of the adapters
def test_what_runs_before_a_capture_is_what_will_be_captured(monkeypatch, dtype):
    """Kernels are compiled and tables created before the capture starts."""
    model, mb = enabled()
    loops = []
    original = triton_backend.Product.__call__

    def run(self, *args):
        loops.append(self._shrink_args[-1])
        return original(self, *args)

    monkeypatch.setattr(triton_backend.Product, "__call__", run)
    logits(model.to(dtype))
    want = logits(model.float())
    assert loops and not any(loops)
    loops.clear()
    with before_a_capture(mb):
        assert_close(model(**inputs(), use_cache=False).logits, want)
    assert loops and all(loops)


def test_what_runs_before_a_capture_while_another_thread_has_ids_in_force():
    """Whichever thread's layers run first."""
    model, mb = enabled()
    for name, module in model.named_modules():
        if name.endswith("q_proj"):  # as in PEFT's compiled hot-swap: every call reads it again
            module.scaling.update({key: torch.tensor(value) for key, value in module.scaling.items()})
    want = logits(model)
    mb.disable()
    mb = peft_multibatch.enable(model, backend="triton")
    entered, done = threading.Event(), threading.Event()

    def other():
        with mb.batch(MIXES[0]):
            entered.set()
            return done.wait(600)

    with before_a_capture(mb), ThreadPoolExecutor(2) as threads:
        result = threads.submit(other)
        assert entered.wait(600)
        assert_close(model(**inputs(), use_cache=False).logits, want)
        assert_close(threads.submit(logits, model).result(), want)
        assert_close(model(**inputs(), use_cache=False).logits, want)
        done.set()
        assert result.result()


def test_what_runs_before_a_capture_makes_room_for_all_adapters_as_they_are():
    model, mb = enabled()
    logits(model)
    replace_weights(model, "eight", 40)
    with before_a_capture(mb, ["three"] * 6):
        model(**inputs(), use_cache=False)
    assert mb._router.graph.captures
    with mb.batch(["eight"] * 6):
        assert max(table.rank for bank in mb._router.graph.banks for table in bank.graph_tables) == 40


def test_a_capture_that_is_refused_leaves_nothing_behind(monkeypatch):
    """Copies during a capture have no contents before the graph is replayed."""
    model, mb = enabled()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    layer.lora_A["three"].double(), layer.lora_B["three"].double()
    for name in ("three", "four"):
        with before_a_capture(mb, [name] * 6):
            model(**inputs(), use_cache=False)

    def refuse(device):
        raise peft_multibatch.UnsupportedError("a CUDA graph is being captured")

    with before_a_capture(mb, ["three"] * 6) as call:
        monkeypatch.setattr(triton_backend, "is_capturing", lambda: True)
        monkeypatch.setattr(deltas, "check_not_capturing", refuse)
        with pytest.raises(peft_multibatch.UnsupportedError):
            model(**inputs(), use_cache=False)
        assert not call.plan.segments._packed


@pytest.mark.parametrize("fuse", [True, "weights"])
def test_every_row_is_its_own_adapters(launches, fuse):
    model, _ = enabled(fuse, layers=2)
    for names in (NAMES, [*NAMES[:2]], ["__base__", "__base__"], ["four", "four", "three"]):
        assert_close(logits(model, names, len(names)), expected(model, names))
    # three calls with adapters: q/k/v, o, gate/up and down of two layers; no launch if no row has an adapter
    assert len(launches) == 3 * 2 * 4
    model.get_base_model().config.use_cache = False
    for _ in range(2):
        logits(model)
    assert len(launches) == 5 * 2 * 4


@pytest.fixture
def base_last(monkeypatch):
    """How deltas reach the outputs of products, which in batches of any size are written before base products."""
    found, original = [], triton_backend.Products.__init__

    def record(self, *args):
        original(self, *args)
        found.append(self.can_run and not args[-1])

    monkeypatch.setattr(triton_backend.Products, "__init__", record)
    monkeypatch.setattr(linear, "BASE_LAST", 1)
    return found


@pytest.mark.parametrize("fuse", [True, "weights"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_base_products_can_be_added_to_deltas(base_last, mode, fuse):
    model, _ = enabled(fuse)
    for names in (NAMES, ["__base__", "three"], ["four", "four", "three"]):
        want = expected(model, names)
        base_last.clear()
        with mode():
            assert_close(logits(model, names, len(names)), want)
        # q/k/v, o, gate/up and down; "three" and "four" have no weights for o
        assert base_last == [True] * 4 or (names is not NAMES and base_last == [True, False, False, True, True])


def test_what_base_products_are_not_added_to(base_last):
    model, _ = enabled()
    want, base = expected(model), model.base_model.model.model.layers[0].mlp.down_proj.base_layer
    calls = []
    with base.register_forward_hook(lambda *_: calls.append(1)):
        assert_close(logits(model), want)
        assert base_last == [True, True, True, False] and calls
    base_last.clear()
    with torch.autocast(DEVICE, torch.bfloat16):
        logits(model)
    mixture = [{"three": 0.5, "eight": -2.0}, *NAMES[1:]]
    assert torch.isfinite(logits(model, mixture)).all()
    with torch.no_grad():
        base.bias = torch.nn.Parameter(torch.ones(len(base.weight), device=DEVICE))
        assert_close(logits(model), expected(model))
    assert base_last[-1] is False and len({*base_last[:-4]} - {False}) == 0


def test_adapters_of_different_dtypes(launches):
    model, _ = enabled()
    for name, parameter in model.named_parameters():
        if ".four." in name:
            parameter.data = parameter.data.half()
    assert_close(logits(model), expected(model), torch.float16)
    assert launches
    for name, parameter in model.named_parameters():
        if ".four." in name:
            parameter.data = parameter.data.float()
    assert_close(logits(model), expected(model))


def test_changes_are_seen():
    model, _ = enabled(layers=2)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = logits(model)

    def truncate():
        layer.lora_A["eight"].weight.data = layer.lora_A["eight"].weight.data[:5]  # at the same address
        layer.lora_B["eight"].weight.data = layer.lora_B["eight"].weight.data[:, :5].contiguous()

    for change in (
        lambda: layer.lora_B["three"].weight.data.mul_(2),
        lambda: layer.set_scale("eight", 5.0),
        lambda: setattr(layer.lora_A["three"].weight, "data", torch.randn_like(layer.lora_A["three"].weight)),
        truncate,
        lambda: setattr(layer.lora_B["eight"], "weight", torch.nn.Parameter(layer.lora_B["eight"].weight * 2)),
    ):
        change()
        after = logits(model)
        assert not torch.allclose(before, after, atol=1e-5)
        assert_close(after, expected(model))
        before = after


def test_more_adapters_than_a_table_holds():
    model, _ = enabled()
    first = logits(model)
    for index in range(20):
        model.add_adapter(f"more{index}", lora_configs()["three"])
    names = [f"more{index}" for index in (0, 19, 7)]
    model = model.to(DEVICE)
    assert_close(logits(model, names, 3), expected(model, names))
    assert_close(logits(model), first)


def add_dora(model):
    config = lora_configs()["eight"]
    config.use_dora = True
    model.add_adapter("dora", config)
    for key, parameter in model.named_parameters():
        if "magnitude" in key and ".dora." in key:
            parameter.data *= torch.rand_like(parameter) + 0.5
    return [*NAMES[:4], "dora", "dora"]


@pytest.mark.parametrize("fuse", [True, "weights"])
def test_dora(launches, fuse):
    model, _ = enabled(fuse)
    names = add_dora(model)
    model.to(DEVICE)
    assert_close(logits(model, names), expected(model, names))
    assert launches


def test_weights_on_another_device_are_refused():
    model, _ = enabled()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    other = torch.device("meta")
    layer.lora_A["three"].to(other)
    with pytest.raises(peft_multibatch.ModelStateError, match="adapter 'three' are on the meta device"):
        logits(model)


def test_generate(launches):
    model, _ = enabled(layers=2)
    options = {"max_new_tokens": 4, "do_sample": False}
    tokens = model.generate(**inputs(), adapter_ids=NAMES, **options)
    rows = row_by_row(model, NAMES, inputs(), lambda row: model.generate(**row, **options))
    assert torch.equal(tokens, torch.cat(rows))
    assert launches


@pytest.fixture
def compiled(request):
    """A model, its handle, the model compiled as one graph, and the list of graphs made so far."""
    torch._dynamo.reset()
    model, mb = enabled(*getattr(request, "param", ()))
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        if DEVICE == "cuda":
            return torch._dynamo.lookup_backend("inductor")(graph, example_inputs)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    return model, mb, torch.compile(model.get_base_model(), fullgraph=True, backend=backend), graphs


@pytest.mark.parametrize("compiled", [(True, 2), ("weights", 2)], indirect=True, ids=["True", "weights"])
def test_one_graph_for_any_mix(compiled, launches):
    model, mb, fast, graphs = compiled
    for mix in MIXES:
        with mb.batch(mix):
            actual = logits(fast, None, use_cache=False)
        assert_close(actual, logits(model, mix, use_cache=False))
    assert len(graphs) == 1
    assert sum("add_" in str(node.target) and "multibatch" in str(node.target) for node in graphs[0].graph.nodes) == 8
    assert launches


def test_a_graph_sees_changes(compiled):
    model, mb, fast, graphs = compiled
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    for change in (
        lambda: None,
        lambda: layer.lora_B["three"].weight.data.mul_(2),
        lambda: layer.set_scale("eight", 5.0),
        lambda: setattr(layer.lora_A["three"].weight, "data", torch.randn_like(layer.lora_A["three"].weight)),
    ):
        change()
        with mb.batch(MIXES[2]):
            actual = logits(fast, None, use_cache=False)
        assert_close(actual, logits(model, MIXES[2], use_cache=False))
    assert len(graphs) == 1
    model.add_adapter("new", lora_configs()["eight"])
    for index in range(20):  # more than the tables can hold
        model.add_adapter(f"more{index}", lora_configs()["three"])
    model.to(DEVICE)
    with mb.batch([3, 22, 3, 1, 2, -1]):
        actual = logits(fast, None, use_cache=False)
    assert_close(actual, logits(model, [3, 22, 3, 1, 2, -1], use_cache=False))


def test_a_graph_reads_what_a_call_began_with_after_others_failed_or_ran_on_other_threads(compiled):
    """A block that was opened before weights were replaced keeps the old ones; a new call uses the new ones, or
    fails."""
    model, mb, fast, _ = compiled
    graph = mb._router.graph
    for mix in ([0] * 6, [1] * 6, [0] * 6):
        with mb.batch(mix):
            want = logits(fast, None, use_cache=False)
    refused = pytest.raises(peft_multibatch.ModelStateError, match="larger rank")
    for fails in (False, True):
        if fails:
            graph.captures.note(is_users=True, components=1)  # sizes are fixed from now on
        with mb.batch([0] * 6):
            assert_close(logits(fast, None, use_cache=False), want)
            layer = model.base_model.model.model.layers[0].self_attn.q_proj
            kept = layer.lora_A["three"].weight, layer.lora_B["three"].weight
            replace_weights(model, "three", 40)
            if fails:
                with mb.batch([1] * 6), refused, mb.batch([0] * 6):
                    pass
                with ThreadPoolExecutor(1) as other, refused:
                    other.submit(logits, model, [0] * 6).result()
            else:
                with ThreadPoolExecutor(1) as other:
                    other.submit(logits, model, [0] * 6).result()
                with mb.batch([1] * 6):
                    pass
            assert_close(logits(fast, None, use_cache=False), want)
        layer.lora_A["three"].weight, layer.lora_B["three"].weight = kept


def test_deleted_adapters_are_let_go_of(compiled):
    model, mb, fast, _ = compiled
    for mix in MIXES[0], [0] * 6, MIXES[0], [0] * 6:
        with mb.batch(mix):
            logits(fast, None, use_cache=False)
    weights = [weakref.ref(weight) for name, weight in model.named_parameters() if ".eight." in name]
    model.delete_adapter("eight")
    mb.report()
    gc.collect()
    assert weights and [weight() for weight in weights] == [None] * len(weights)


def test_a_batch_of_another_size_is_not_served_by_the_same_plan(compiled):
    _, mb, fast, _ = compiled
    with mb.batch([0, 1, 2]):
        logits(fast, None, rows=3, use_cache=False)
        with pytest.raises(Exception, match="adapter_ids has 3 entries for a batch of 6 samples"):
            logits(fast, None, rows=6, use_cache=False)


def test_larger_batches(compiled):
    model, mb, fast, _ = compiled
    for rows in (2, 6, 20, 6):
        ids = [row % 4 - 1 for row in range(rows)]
        with mb.batch(ids):
            actual = logits(fast, None, rows, use_cache=False)
        assert_close(actual, logits(model, ids, rows, use_cache=False))


def test_threads_with_different_ids_never_share_a_plan(compiled):
    model, mb, fast, _ = compiled
    both, done = threading.Barrier(2), threading.Event()
    wants = {index: logits(model, MIXES[index], use_cache=False) for index in (0, 2)}
    with mb.batch(MIXES[0]):
        logits(fast, None, use_cache=False)
    outcomes = {}

    def work(index):
        with mb.batch(MIXES[index]):
            both.wait(60)
            if index == 0:
                try:
                    outcomes[0] = logits(fast, None, use_cache=False)
                except Exception as error:
                    outcomes[0] = error
                done.set()
            done.wait(60)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "on another thread" in str(outcomes[0]), outcomes
    for index in (0, 2):
        with mb.batch(MIXES[index]):
            assert_close(logits(fast, None, use_cache=False), wants[index])


def test_a_thread_without_ids_never_runs_under_those_of_another(compiled):
    model, mb, fast, _ = compiled
    plain = logits(fast, None, use_cache=False)
    want = logits(model, MIXES[0], use_cache=False)

    def work():
        with pytest.raises(Exception, match="adapter_ids are active on another thread"):
            logits(fast, None, use_cache=False)
        return True

    with ThreadPoolExecutor(1) as other:
        with mb.batch(MIXES[0]):
            assert_close(logits(fast, None, use_cache=False), want)
            assert other.submit(work).result()
            assert_close(logits(fast, None, use_cache=False), want)
        assert_close(other.submit(logits, fast, None, use_cache=False).result(), plain)


def test_dora_in_a_graph_is_refused(compiled):
    model, mb, fast, _ = compiled
    names = add_dora(model)
    with mb.batch(names), pytest.raises(Exception, match="a model was compiled, and a DoRA adapter is used"):
        logits(fast, None, use_cache=False)


def test_what_no_captured_graph_can_hold_is_refused_when_a_call_begins(compiled):
    """A replay runs no code that could notice it."""
    model, mb, fast, _ = compiled
    with mb.batch([0] * 6):
        logits(fast, None, use_cache=False)
    names = add_dora(model)
    model.to(DEVICE)
    mb._router.graph.captures.note(is_users=True, components=1)
    with (
        pytest.raises(peft_multibatch.ModelStateError, match="was captured, and a DoRA adapter is used"),
        mb.batch(names),
    ):
        pass
    with mb.batch([0] * 6):
        logits(fast, None, use_cache=False)
    mb.disable()
    peft_multibatch.enable(model, backend="triton")
    assert_close(logits(model, names), expected(model, names))


def test_graphs_of_continuous_batching_do_not_limit_other_calls():
    """Graphs that a manager captured are captured again after others' calls needed larger tables."""
    model, mb = enabled()
    graph = mb._router.graph

    def step():
        with before_a_capture(mb):
            return model(**inputs(), use_cache=False).logits

    want = step()
    assert graph.captures.of_steps and not graph.captures.of_users
    plan = mb._router.plan([mb.adapter_names.index(name) if name != "__base__" else -1 for name in NAMES])
    assert not graph.outgrown_by(plan)
    names = add_dora(model)
    large = lora_configs()["eight"]
    large.r = 64
    model.add_adapter("large", large)
    for index in range(20):  # more than the tables can hold
        model.add_adapter(f"more{index}", lora_configs()["three"])
    model.add_adapter("wide", LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    model.to(DEVICE)
    for mix in (names, ["large", "large", "eight", "three", "more19", "__base__"], ["wide", *NAMES[1:]]):
        assert_close(logits(model, mix, use_cache=False), expected(model, mix))
    assert graph.outgrown_by(plan)
    graph.captures.discard()
    assert_close(step(), want)
    assert not graph.outgrown_by(plan)


@pytest.fixture
def little_shared_memory(monkeypatch):
    """Kernels fit into the GPU's shared memory only with the smallest ranks."""
    limits = triton_backend.limits_of(torch.device(DEVICE))._replace(shared=20_000)
    monkeypatch.setattr(triton_backend, "limits_of", lambda device: limits)
    assert triton_backend.can_run(torch.float32, 16, torch.device(DEVICE))
    assert not triton_backend.can_run(torch.float32, 32, torch.device(DEVICE))


def add_what_no_kernel_supports(model):
    """Adapters of too large a rank, of float64, and of weights that aren't contiguous."""
    model.add_adapter("large", LoraConfig(r=32, target_modules=["q_proj"], init_lora_weights=False))
    for name in ("float64", "strided"):
        model.add_adapter(name, LoraConfig(r=8, target_modules=["v_proj"], init_lora_weights=False))
    for layer in model.base_model.model.model.layers:
        layer.self_attn.v_proj.lora_A["float64"].double()
        layer.self_attn.v_proj.lora_B["float64"].double()
        weight = layer.self_attn.v_proj.lora_A["strided"].weight
        weight.data = weight.data.t().contiguous().t()
    model.to(DEVICE)
    return "large", "float64", "strided"


def test_adapters_that_no_kernel_supports_do_not_keep_others_out_of_graphs(little_shared_memory, monkeypatch):
    model, mb = enabled()
    wrong = add_what_no_kernel_supports(model)
    want = logits(model, use_cache=False)
    monkeypatch.setattr(triton_backend, "is_capturing", lambda: True)

    def capture(names):
        with before_a_capture(mb, names):
            return model(**inputs(), use_cache=False).logits

    with monkeypatch.context() as before:
        before.setattr(triton_backend, "is_capturing", lambda: False)
        capture(NAMES)
    refused = AssertionError("not captured")
    monkeypatch.setattr(deltas, "check_not_capturing", lambda device: (_ for _ in ()).throw(refused))
    assert_close(capture(NAMES), want)
    for name in wrong:
        with monkeypatch.context() as before:
            before.setattr(triton_backend, "is_capturing", lambda: False)
            before.setattr(deltas, "check_not_capturing", lambda device: None)
            capture([name, *NAMES[1:]])
        with pytest.raises(AssertionError, match="not captured"):
            capture([name, *NAMES[1:]])
    assert_close(capture(NAMES), want)
    assert not mb._router.graph.outgrown_by(mb._router.plan([0, -1, 1, 2, 1, 0]))


@pytest.mark.parametrize("compiled", [(True, 1)], indirect=True)
def test_compiled_code_refuses_adapters_that_no_kernel_supports(little_shared_memory, compiled):
    model, mb, fast, _ = compiled
    wrong = add_what_no_kernel_supports(model)
    for names in (NAMES, *([name, *NAMES[1:]] for name in wrong), NAMES):
        with mb.batch(names):
            if names is NAMES:
                assert_close(logits(fast, None, use_cache=False), logits(model, NAMES, use_cache=False))
            else:
                with pytest.raises(Exception, match=rf"{names[0]}.* which no kernel supports"):
                    logits(fast, None, use_cache=False)
        assert_close(logits(model, names, use_cache=False), expected(model, names))


@pytest.mark.parametrize("compiled", [(True, 1)], indirect=True)
def test_compiled_training_runs_adapters_that_no_kernel_supports(little_shared_memory, compiled):
    model, mb, _, _ = compiled
    names = [add_what_no_kernel_supports(model)[2], *NAMES[1:]]
    weight = model.base_model.model.model.layers[0].self_attn.v_proj.lora_A["strided"].weight.requires_grad_()
    found = []
    for run in (model.get_base_model(), torch.compile(model.get_base_model(), backend="aot_eager")):
        model.zero_grad()
        with mb.batch(names):
            run(**inputs(), use_cache=False).logits.square().mean().backward()
        found.append(weight.grad.clone())
    assert_close(found[1], found[0])


def test_graphs_of_a_part_of_the_model_do_not_let_others_run_what_no_kernel_supports(little_shared_memory):
    model, mb = enabled()
    model.add_adapter("wide", LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    for layer in model.base_model.model.model.layers:
        layer.self_attn.v_proj.lora_A["wide"].double()
        layer.self_attn.v_proj.lora_B["wide"].double()
    captures = mb._router.graph.captures
    plan = mb._router.plan([mb.adapter_names.index("wide")])
    captures.note(is_users=True, components=1)  # of no layer so far
    for _ in range(2):
        with pytest.raises(peft_multibatch.ModelStateError, match="which no kernel supports"):
            mb._router.graph._tables.bring_up_to_date(plan, captures)
        assert "which no kernel supports" in captures.why_no_kernels(plan)


HALVES = [{"three": 0.5, "eight": 0.5}] * 6


def test_graphs_of_continuous_batching_are_captured_again_for_more_adapters_per_sample():
    """Another call's mixture allocates plans that graphs captured before don't read."""
    model, mb = enabled()
    graph, names = mb._router.graph, mb.adapter_names
    with before_a_capture(mb):
        model(**inputs(), use_cache=False)
    want = logits(model, HALVES, use_cache=False)
    entry = tuple((names.index(name), 0.5) for name in ("three", "eight"))
    plans = [mb._router.plan([each] * 6) for each in (names.index("three"), entry)]
    assert [graph.outgrown_by(plan) for plan in plans] == [False, True]
    graph.discard_captures()
    with torch.no_grad(), mb._router.routing([entry] * 6, expands=False) as call:
        call.inside, call.for_graphs = True, True
        assert_close(model(**inputs(), use_cache=False).logits, want)
    assert [graph.outgrown_by(plan) for plan in plans] == [False, False]


@contextmanager
def captured_by_the_user():
    """An enabled model whose graph reads the tables and one plan."""
    model, mb = enabled()
    with before_a_capture(mb):
        model(**inputs(), use_cache=False)
    mb._router.graph.discard_captures()
    mb._router.graph.captures.note(is_users=True, components=1)
    yield model, mb
    mb.disable()


def test_more_adapters_per_sample_than_at_the_capture_are_refused_whatever_ran_in_between():
    refused = pytest.raises(peft_multibatch.ModelStateError, match=r"at most 1 adapters per sample, and now .* has 2")
    with captured_by_the_user() as (model, mb):
        for _ in range(2):
            with refused, mb.batch(HALVES):
                pass
            logits(model, ["three"] * 40, 40)  # allocates larger plans
            mb._router.graph.expect(2)


def test_a_call_that_a_captured_graph_cannot_run_is_refused_at_once_beside_others():
    """Not when the other thread's call ends, and by no means in that thread."""
    with captured_by_the_user() as (model, mb), ThreadPoolExecutor(1) as threads:
        large = lora_configs()["eight"]
        large.r = 64
        model.add_adapter("large", large)
        model.to(DEVICE)
        entered, done = threading.Event(), threading.Event()

        def other():
            with mb.batch([0] * 6):
                entered.set()
                return done.wait(600)

        result = threads.submit(other)
        assert entered.wait(600)
        try:
            for mix in (["large"] * 6, HALVES):
                with pytest.raises(peft_multibatch.ModelStateError, match="CUDA graph was captured"), mb.batch(mix):
                    pass
            want = logits(model, MIXES[2])
        finally:
            done.set()
        assert result.result()
        assert_close(logits(model, MIXES[2]), want)
        assert not mb._router.graph.active


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_call_that_was_refused_leaves_nothing_behind(by_hand):
    """Its plan would keep stored adapters in memory, and its entry would disturb other threads."""
    with captured_by_the_user() as (model, mb):
        large = lora_configs()["eight"]
        large.r = 64
        model.add_adapter("large", large)
        model.to(DEVICE)
        gc.collect()
        gc.disable()
        try:
            refused = pytest.raises(peft_multibatch.ModelStateError, match="larger rank")
            if by_hand:
                with ExitStack() as stack, refused:
                    stack.enter_context(mb.batch(["large"] * 6))
            else:
                with refused, mb.batch(["large"] * 6):
                    pass
            del refused
            mb._router.let_go()
            assert not mb._router.graph.active and mb._router.call.get() is None
            with mb.batch([0] * 6):
                assert not mb._router.graph.contended
        finally:
            gc.enable()


@pytest.mark.parametrize("is_users", [True, False])
def test_base_weights_that_a_captured_graph_reads_stay_in_memory(is_users):
    """A new adapter may change which base weights are concatenated."""
    options = {"r": 4, "init_lora_weights": False}
    model = get_peft_model(base_model(), LoraConfig(target_modules=["q_proj", "v_proj"], **options), "three")
    model.to(DEVICE).eval()
    mb = peft_multibatch.enable(model, backend="triton", fuse="weights")
    logits(model, ["three"] * 6)
    graph = mb._router.graph
    before = {module.weight.data_ptr() for module in model.modules() if isinstance(module, torch.nn.Linear)}
    graph.captures.note(is_users=is_users, components=1)
    model.add_adapter("all", LoraConfig(target_modules=["q_proj", "k_proj", "gate_proj", "up_proj"], **options))
    model.to(DEVICE)
    assert_close(logits(model, ["three"] * 6), expected(model, ["three"] * 6))
    plan = mb._router.plan([0] * 6)
    now = {module.weight.data_ptr() for module in model.modules() if isinstance(module, torch.nn.Linear)}
    moved = before - now
    kept = graph.captures._kept if is_users else graph.captures._outdated
    assert moved and all(any(_inside(address, each) for memory in kept for each in memory) for address in moved)
    assert graph.outgrown_by(plan) != is_users


def _inside(address, tensor):
    storage = tensor.untyped_storage()
    return storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes()


def test_layers_that_no_captured_graph_has_are_refused_when_a_call_begins(compiled):
    """A replay would leave the adapter's weights there out; adapters without weights there go on."""
    model, mb, fast, _ = compiled
    with mb.batch([0] * 6):
        want = logits(fast, None, use_cache=False)
    mb._router.graph.captures.note(is_users=True, components=1)
    model.add_adapter("wide", LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    model.to(DEVICE)
    names = ["three", "wide", "wide", "three", "eight", "__base__"]
    for _ in range(2):
        with (
            pytest.raises(peft_multibatch.ModelStateError, match=r"weights in .*lm_head, where 'wide' has some"),
            mb.batch(names),
        ):
            pass
    with mb.batch([0] * 6):
        assert_close(logits(fast, None, use_cache=False), want)
    mb.disable()
    peft_multibatch.enable(model)
    assert_close(logits(model, names), expected(model, names))


def test_gradients_in_a_graph(compiled):
    model, mb, fast, _ = compiled
    model.set_requires_grad(["three", "four", "eight"])
    weights = [p for name, p in model.named_parameters() if "lora_" in name]

    def gradients(run):
        grads = torch.autograd.grad(run().logits.square().mean(), weights)
        return torch.cat([grad.flatten() for grad in grads])

    def compiled_run():
        with mb.batch(MIXES[0]):
            return fast(**inputs(), use_cache=False)

    assert_close(gradients(compiled_run), gradients(lambda: model(**inputs(), use_cache=False, adapter_ids=MIXES[0])))


@gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch first captures an empty one
@pytest.mark.parametrize("fuse", [True, "weights"])
def test_static_cache_with_one_graph_for_twenty_mixes(launches, fuse):
    """transformers compiles the decode step with CUDA graphs; tokens match PEFT's, one adapter at a time."""
    torch._dynamo.reset()
    model, _ = enabled(fuse)
    options = {"max_new_tokens": 6, "do_sample": False}
    torch._dynamo.utils.counters.clear()
    for index in range(20):
        names = [["three", "four", "eight", "__base__"][(index * row + row // 2) % 4] for row in range(6)]
        tokens = model.generate(**inputs(), adapter_ids=names, cache_implementation="static", **options)
        rows = row_by_row(model, names, inputs(), lambda row: model.generate(**row, **options))
        assert torch.equal(tokens, torch.cat(rows)), names
        if index == 0:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs and torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@gpu
@pytest.mark.parametrize("length", [4, 40])  # of which a sample's rows are a piece
def test_a_graph_captured_by_the_user(length):
    model, mb = enabled()
    batch = inputs(6, length)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), mb.batch([0] * 6):
        model(**batch, use_cache=False)
        with torch.cuda.graph(graph):
            out = model(**batch, use_cache=False).logits
    for mix in MIXES:
        with mb.batch(mix):
            graph.replay()
            actual = out.clone()
        assert_close(actual, logits(model, mix, length=length, use_cache=False))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_B["three"].weight.data = torch.randn_like(layer.lora_B["three"].weight)
    with mb.batch(MIXES[0]):
        graph.replay()
        assert_close(out, logits(model, MIXES[0], length=length, use_cache=False))
    config = lora_configs()["eight"]
    config.r = 64
    model.add_adapter("large", config)
    model.add_adapter("wide", LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    model.to(DEVICE)
    for adapter, match in {3: "of a larger rank", 4: r"before any adapter had weights in .*lm_head"}.items():
        for _ in range(2):  # the second attempt is refused as well
            with pytest.raises(peft_multibatch.ModelStateError, match=match), mb.batch([adapter] * 6):
                pass
    with mb.batch(MIXES[2]):
        graph.replay()
        assert_close(out, logits(model, MIXES[2], length=length, use_cache=False))


@gpu
def test_a_plan_is_not_written_while_graphs_on_another_stream_read_the_last_one():
    """A step of continuous batching may still run after its call has ended, when another thread's call begins."""
    model, mb = enabled()
    batch, graph, stream = inputs(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad(), mb.batch(MIXES[0]):
        model(**batch, use_cache=False)
        with torch.cuda.graph(graph):
            out = model(**batch, use_cache=False).logits
    want = logits(model, MIXES[0], use_cache=False)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), mb.batch(MIXES[2]):
        pass
    with torch.cuda.stream(stream), mb.batch(MIXES[0]):
        torch.cuda._sleep(1_000_000_000)
        graph.replay()
    with mb.batch(MIXES[2]):
        pass
    torch.cuda.synchronize()
    assert_close(out, want)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_compiled_kernels_inside_of_a_reentrant_checkpoint_are_refused(device):
    """Its forward pass runs without gradients, on kernels, and backward would run PEFT's active adapter."""
    if device != DEVICE:
        pytest.skip("the other device's turn")
    model, mb = enabled()
    model.set_requires_grad(["three", "four", "eight"])
    layer = model.get_base_model().model.layers[0].mlp
    torch._dynamo.reset()
    fast = torch.compile(layer, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    x = torch.randn(6, 4, SIZES["hidden_size"], device=DEVICE, requires_grad=True)
    with mb.batch(NAMES):
        want = layer(x)
        with torch.no_grad():
            assert_close(fast(x), want)
        with pytest.raises(peft_multibatch.UnsupportedError, match="use_reentrant=False"):
            checkpoint(fast, x, use_reentrant=True)
        assert_close(checkpoint(fast, x, use_reentrant=False), want)
        with torch.inference_mode():
            assert_close(fast(x.detach()), want)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_compiled_training_may_run_kernels_without_gradients(device):
    """This is also an autograd.Function, but backward doesn't run it again: for example, a reference pass in one
    graph."""
    if device != DEVICE:
        pytest.skip("the other device's turn")
    model, mb = enabled()
    model.set_requires_grad(["three", "four", "eight"])
    layer = model.get_base_model().model.layers[0].mlp

    def step(x):
        with torch.no_grad():
            reference = layer(x)
        return layer(x) - 2 * reference

    torch._dynamo.reset()
    fast = torch.compile(step, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    x = torch.randn(6, 4, SIZES["hidden_size"], device=DEVICE, requires_grad=True)
    with mb.batch(NAMES):
        assert_close(fast(x), step(x))
        fast(x).square().sum().backward()
        found, x.grad = x.grad, None
        step(x).square().sum().backward()
        assert_close(found, x.grad)


@gpu
def test_a_plan_is_read_after_it_was_written_on_the_stream_of_a_call_that_ended():
    """A step begins next to another thread's call, which ends and leaves the fixed location to the step's plan."""
    model, mb = enabled()
    batch, graph, stream = inputs(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad(), mb.batch(MIXES[0]):
        model(**batch, use_cache=False)
        with torch.cuda.graph(graph):
            out = model(**batch, use_cache=False).logits
    want = logits(model, MIXES[0], use_cache=False)
    has_begun, may_end = threading.Event(), threading.Event()

    def beside():
        with torch.cuda.stream(stream), mb.batch(MIXES[2]):
            has_begun.set()
            may_end.wait()
            torch.cuda._sleep(1_000_000_000)

    thread = threading.Thread(target=beside)
    thread.start()
    has_begun.wait()
    torch.cuda.synchronize()
    with mb.batch(MIXES[0]):
        may_end.set()
        thread.join()
        mb._router.graph.prepare(mb._router.live(), out.device)
        graph.replay()
    torch.cuda.synchronize()
    assert_close(out, want)


@gpu
def test_a_capture_without_a_call_before_is_refused():
    model, mb = enabled()
    batch = inputs()
    with torch.no_grad():
        model(**batch, use_cache=False)
        refused = pytest.raises(peft_multibatch.ModelStateError, match="a call of the model")
        with mb.batch([0] * 6), refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(**batch, use_cache=False)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("place", ["input", "output"])
def test_a_contiguous_tensor_with_odd_strides(device, place, launches):
    """One token of every sample, transposed, as in Mamba's mixers during decoding: strides of 1 in the middle."""
    if device != DEVICE:
        pytest.skip("the other device's turn")

    def odd(x):
        return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)

    class Mixer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(16, 24), torch.nn.Linear(24, 8)

        def forward(self, x):
            if place == "input":
                x = odd(x)
                assert x.is_contiguous() and x.stride(1) == 1
            return self.second(odd(self.first(x)))

    config = LoraConfig(r=3, target_modules=["first", "second"], init_lora_weights=False)
    model = get_peft_model(Mixer(), config, "a").to(device).eval()
    model.add_adapter("b", config)
    peft_multibatch.enable(model, backend="triton")
    x, names = torch.randn(4, 1, 16, device=device), ["a", "b", "__base__", "b"]
    with torch.no_grad():
        mixed = model(x, adapter_ids=names)
        assert launches
        for row, name in enumerate(names):
            with model.disable_adapter() if name == "__base__" else nullcontext():
                if name != "__base__":
                    model.set_adapter(name)
                assert_close(mixed[row], model(x)[row])
