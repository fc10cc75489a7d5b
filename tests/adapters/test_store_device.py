"""Host and device memory of the store, with a fake device on a CPU, and on a GPU."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from models import base_model, left_padded
from peft import LoraConfig
from stored import by_peft, expected, logits, save, save_many
from threads import eventually, in_threads
from tolerances import assert_close

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.adapters.store import source as store_module
from peft_multibatch.adapters.store import streams as store_streams
from peft_multibatch.adapters.store import transfers
from peft_multibatch.adapters.store.arena import Arena, size_class
from peft_multibatch.adapters.store.streams import Streams
from peft_multibatch.adapters.tables import TableBlock
from peft_multibatch.calls.router import Router


COUNT = 12


class Device(Streams):
    """The CPU as a device with separate memory, whose copies are recorded."""

    has_memory = True

    def __init__(self, device):
        super().__init__(device)
        self.copied, self.marks, self.pinned = [], 0, 0

    def mark(self):
        self.marks += 1
        return self.marks

    def pin(self, block):
        self.pinned += len(block)

    def copy(self, target, source, mark):
        self.copied.append((target.data_ptr(), mark))
        target.copy_(source)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    save_many(path, COUNT)
    return path


@pytest.fixture(scope="module")
def rows(folder):
    inputs = {key: value[:1].repeat(COUNT, 1) for key, value in left_padded(1).items()}
    found = expected([f"a{number}" for number in range(COUNT)], folder, logits, inputs)
    return dict(zip((f"a{number}" for number in range(COUNT)), found))


@pytest.fixture
def make(folder, monkeypatch):
    def make(host, device, timeout=5.0, **options):
        monkeypatch.setattr(store_module, "streams_of", Device)
        model = base_model()
        mb = peft_multibatch.enable(model)
        size = size_class(4 * 2 * 2 * 4 * (48 + 36))  # two layers, q and v of rank 4
        store = mb.adapter_store(host * size, device * size, timeout=timeout, **options)
        store.register_folder(folder)
        sizes = {size_class(version.layout.size) for version in store._versions.values()}
        assert sizes == {size}
        return model, store, size

    return make


def ask(model, names):
    inputs = {key: value[:1].repeat(len(names), 1).to(model.device) for key, value in left_padded(1).items()}
    return logits(model, inputs, adapter_ids=names)


def check(model, rows, names):
    for actual, name in zip(ask(model, names), names):
        assert_close(actual.cpu(), rows[name])


def test_one_copy_an_adapter(make, rows):
    model, store, size = make(host=8, device=4)
    check(model, rows, ["a0", "a1", "a0"])
    stats = store.stats()
    assert (stats.host_adapters, stats.device_adapters, stats.device_bytes) == (2, 2, 2 * size)
    assert len(store._streams.copied) == 2 and store._streams.pinned == 2 * size


def test_an_adapter_that_left_the_device_comes_from_the_host(make, rows):
    model, store, _ = make(host=12, device=2)
    for number in range(COUNT):
        check(model, rows, [f"a{number}"])
    read = store.stats().bytes_read
    for number in range(COUNT):
        check(model, rows, [f"a{number}"])
    stats = store.stats()
    assert stats.bytes_read == read and stats.loads == 2 * COUNT and stats.device_adapters == 2


def test_the_host_keeps_those_that_were_used_last(make, rows):
    model, store, _ = make(host=3, device=1)
    for name in ("a0", "a1", "a2", "a0", "a3"):
        check(model, rows, [name])
    read = store.stats().bytes_read
    check(model, rows, ["a0"])
    check(model, rows, ["a2"])
    assert store.stats().bytes_read == read
    check(model, rows, ["a1"])
    assert store.stats().bytes_read > read


def test_reading_ahead_never_holds_up_the_load_itself(make, rows, monkeypatch):
    """What was needed sooner when it began to read ahead may be evicted for a call."""
    model, store, _ = make(host=2, device=2, timeout=20)
    check(model, rows, ["a0", "a1"])
    ids = [store._names.ids[f"a{number}"] for number in range(3)]
    store.look_ahead(ids[2:], ids[:2])
    begin = time.monotonic()
    check(model, rows, ["a2"])
    assert time.monotonic() - begin < 10


def test_bytes_of_adapters_of_many_sizes_are_bounded_at_all_times(make, rows, tmp_path, monkeypatch):
    """Free blocks of other sizes make room on the host and on the device, before new ones are made."""
    model, store, _ = make(host=4, device=3)
    for rank in (1, 2, 3, 6, 8):
        save(tmp_path / f"r{rank}", LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False), seed=rank)
    store.register_folder(tmp_path)
    names = [f"r{rank}" for rank in (1, 2, 3, 6, 8)]
    want = dict(
        zip(names, expected(names, tmp_path, logits, {k: v[:1].repeat(5, 1) for k, v in left_padded(1).items()}))
    )
    made = {}
    for tier in (store._loader.host, store._loader.final):
        arena, blocks = tier.arena, made.setdefault(tier, [])

        def make_block(whole, own=arena._make, arena=arena, blocks=blocks):
            block = own(whole)
            blocks.append(weakref.ref(block))
            alive = sum(len(each) for each in (ref() for ref in blocks) if each is not None)
            assert alive <= arena.limit and arena.used + arena.kept <= arena.limit
            return block

        monkeypatch.setattr(arena, "_make", make_block)
    generator = random.Random(0)
    for _ in range(60):
        batch = [generator.choice([*names, "a0", "a1", "a2", "a3"]) for _ in range(2)]
        check(model, {**rows, **want}, batch)
    assert all(len(blocks) > 5 for blocks in made.values()) and store.stats().evictions > 10


def test_pinned_adapters_leave_room_in_the_host(make, rows):
    model, store, _ = make(host=2, device=6)
    for name in ("a0", "a1", "a2"):
        store.pin(name)
    for number in range(COUNT):
        check(model, rows, [f"a{number}"])
    assert {"a0", "a1", "a2"} <= {each.name for each in store.describe()}


def test_less_room_in_the_host_than_on_the_device(make, rows):
    model, store, _ = make(host=1, device=6)
    check(model, rows, [f"a{number}" for number in range(6)])
    check(model, rows, [f"a{number}" for number in range(6, COUNT)])
    assert store.stats().host_adapters == 1 and store.stats().device_adapters == 6


def test_adapters_in_host_memory_do_not_wait_for_files(make, rows, monkeypatch):
    model, store, _ = make(host=12, device=6)
    check(model, rows, ["a0"])
    check(model, rows, [f"a{number}" for number in range(1, 7)])
    read, go = transfers.read_weights, threading.Event()
    monkeypatch.setattr(transfers, "read_weights", lambda *args: (go.wait(20), read(*args)))
    try:
        store.prefetch(*(f"a{number}" for number in range(7, 7 + transfers.READERS)))
        assert store.stats().device_adapters == 2
        check(model, rows, ["a0"])
        assert store.stats().loads == 8 and not go.is_set()
    finally:
        go.set()


def test_one_copy_at_a_time(make, rows, monkeypatch):
    """Threads that use CUDA at the same time delay the launches of running steps."""
    running, most = [], []

    def copy(target, source, mark):
        running.append(True)
        time.sleep(0.005)
        most.append(len(running))
        running.pop()
        target.copy_(source)

    model, store, _ = make(host=12, device=12)
    monkeypatch.setattr(store._streams, "copy", copy)
    check(model, rows, [f"a{number}" for number in range(COUNT)])
    assert most == [1] * COUNT


def test_a_copy_that_no_thread_can_run(make, rows, monkeypatch):
    """As while the interpreter exits: it runs on the thread that has read the file."""
    model, store, _ = make(host=12, device=2)

    def refuse(*_):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    with monkeypatch.context() as patched:
        patched.setattr(store._loader.transfers._copier, "submit", refuse)
        check(model, rows, ["a0", "a1"])
        check(model, rows, ["a2"])
        with pytest.raises(errors.StoreFullError, match=r"no thread can be started \(cannot schedule"):
            ask(model, ["a0", "a1"])  # one of them is only in host memory
    check(model, rows, ["a0", "a1"])


def test_waiting_for_host_memory_drops_no_plans(make, monkeypatch):
    """Plans hold memory of the device."""
    dropped = []
    monkeypatch.setattr(Router, "let_go", lambda _: dropped.append(True))
    _, store, _ = make(host=1, device=COUNT)
    store.prefetch(*(f"a{number}" for number in range(COUNT)))
    assert eventually(lambda: store.stats().device_adapters == COUNT, 20)
    assert not dropped
    assert not store._loader.final.make_room([COUNT * 10**6], set(), store._loader._let_go) and dropped


def test_closing_ends_reads_that_wait_for_host_memory(make, monkeypatch):
    model, store, _ = make(host=1, device=COUNT, timeout=60)
    begun, go, ended = threading.Event(), threading.Event(), []
    monkeypatch.setattr(store._streams, "copy", lambda *_: (begun.set(), go.wait(20), ended.append(True)))
    store.prefetch("a0", "a1")
    assert begun.wait(20)
    peft_multibatch.disable(model)
    # one of them waits for the memory that is being copied
    store._loader.transfers.readers._threads.shutdown(wait=True)
    assert not ended
    go.set()


def test_closing_keeps_no_memory_of_loads_that_wait(make, monkeypatch):
    """For a thread that reads, and for the one that copies; also of an adapter that was unregistered meanwhile."""
    model, store, _ = make(host=12, device=COUNT)
    read, go, begun = transfers.read_weights, threading.Event(), threading.Event()
    store.prefetch("a0", "a1")
    assert eventually(lambda: store.stats().loads == 2)
    monkeypatch.setattr(transfers, "read_weights", lambda *args: (go.wait(20), read(*args)))
    monkeypatch.setattr(store._streams, "copy", lambda *_: (begun.set(), go.wait(20)))
    loader = store._loader
    with store._lock:
        for name in ("a0", "a1"):
            loader.final.drop(store._versions[store._names.ids[name]])
    store.prefetch("a0", "a1", *(f"a{number}" for number in range(2, 3 + transfers.READERS)))
    assert begun.wait(20)
    waiting = [store._versions[store._names.ids[name]].loading for name in ("a1", f"a{2 + transfers.READERS}")]
    memory = [weakref.ref(load.memory) for load in waiting]
    store.unregister("a1")
    gc.disable()
    try:
        del waiting
        peft_multibatch.disable(model)
        assert eventually(lambda: [each() for each in memory] == [None] * 2)
    finally:
        gc.enable()
        go.set()


@pytest.mark.parametrize("place", ["host", "file"])
def test_ctrl_c_while_a_load_starts(make, rows, monkeypatch, place):
    """Whether its thread has it already or not, it begins again the next time."""
    model, store, size = make(host=12, device=2)
    if place == "host":
        check(model, rows, ["a0", "a1"])
        check(model, rows, ["a2", "a3"])
    loader = store._loader
    workers = loader.transfers._copier if place == "host" else loader.transfers.readers
    assert eventually(lambda: not workers._since)
    ways = itertools.product([workers, workers._threads], [False, True])
    for name, (where, is_submitted) in zip(["a0"] * 4 if place == "host" else ["a4", "a5", "a6", "a7"], ways):

        def interrupt(*job, submit=where.submit, is_submitted=is_submitted):
            if is_submitted:
                submit(*job)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(where, "submit", interrupt)
            store.prefetch(name)
        assert store._versions[store._names.ids[name]].loading is None
        assert eventually(lambda: not workers._since and not workers._waiting)
    check(model, rows, ["a0", "a1"])
    assert eventually(lambda: (store.stats().device_bytes, store.stats().device_adapters) == (2 * size, 2))


def test_a_load_that_was_interrupted_is_not_the_next_one(make, rows, monkeypatch):
    """Its thread reads on, and others that waited for it get an error instead of memory that nobody has filled."""
    model, store, size = make(host=12, device=2)
    read, turns = transfers.read_weights, []

    def slowly(*args):
        turns.append(go := threading.Event())
        assert go.wait(20)
        read(*args)

    monkeypatch.setattr(transfers, "read_weights", slowly)
    readers, waiting = store._loader.transfers.readers, []

    def interrupt(job):
        del readers.submit
        readers.submit(job)
        waiting.append(other.submit(ask, model, ["a0"]))
        while store.stats().misses == 0:
            store._lock.wait(0.01)  # as in a signal handler that waits for something else
        store._lock.wait(0.1)
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as other:
        readers.submit = interrupt
        with pytest.raises(KeyboardInterrupt):
            store.prefetch("a0")
        with pytest.raises(errors.StoreFullError, match=r"'a0' was interrupted \(KeyboardInterrupt\)"):
            waiting[0].result()
    store.prefetch("a0")
    version = store._versions[store._names.ids["a0"]]
    load = version.loading
    assert eventually(lambda: len(turns) == 2)
    turns[0].set()
    assert eventually(lambda: len(readers._since) == 1)
    assert version.loading is load and version.error is None
    turns[1].set()
    check(model, rows, ["a0"])
    assert (store.stats().loads, store.stats().device_bytes, len(turns)) == (1, size, 2)


def test_loads_that_have_ended_hold_no_memory(make, monkeypatch):
    """A thread may have them for a moment, in which others can have their room."""
    _, store, _ = make(host=12, device=2)
    read, go = transfers.read_weights, threading.Event()
    monkeypatch.setattr(transfers, "read_weights", lambda *args: (go.wait(20), read(*args)))
    store.prefetch("a0")
    load = store._versions[store._names.ids["a0"]].loading
    assert load.memory is not None
    go.set()
    assert eventually(lambda: store.stats().loads == 1)
    assert (load.memory, load.source) == (None, None)


@pytest.mark.parametrize("why", ["no thread", "no room"])
def test_an_error_that_is_kept_holds_up_no_others(make, rows, monkeypatch, why):
    """Such as a future's, whose traceback has the place in the queue of the batch that it ended."""
    model, store, _ = make(host=12, device=1, timeout=0.2)
    readers = store._loader.transfers.readers
    with ExitStack() as stack:
        if why == "no thread":
            patched = stack.enter_context(monkeypatch.context())
            patched.setattr(readers, "submit", raising(RuntimeError("can't start new thread")))
        else:
            stack.enter_context(peft_multibatch.enable(model).batch(["a1"]))
        with ThreadPoolExecutor(1) as other:
            kept = other.submit(ask, model, ["a0"]).exception()
        assert isinstance(kept, errors.StoreFullError)
    assert not store._loader._is_awaited()
    check(model, rows, ["a2"])


def raising(error):
    def fail(*_):
        raise error

    return fail


def test_memory_is_written_again_only_after_what_read_it(make, rows):
    model, store, _ = make(host=12, device=1)
    check(model, rows, ["a0"])
    check(model, rows, ["a1"])
    (first, mark), (second, later) = store._streams.copied
    assert first == second and mark is None and later is not None


def test_a_block_that_comes_back_while_others_are_marked():
    """The block may have been read after the mark, so it needs its own mark."""

    class Late(Device):
        def mark(self):
            lent.clear()  # simulates another thread
            return super().mark()

    streams = Late(torch.device("cpu"))
    arena = Arena(4096, torch.device("cpu"), False, streams)
    first, _ = arena.take(64)
    lent = [arena.take(128)[0]]
    del first
    arena.collect()
    assert arena.take(64)[1] == 1
    assert arena.take(128)[1] == 2


def test_host_memory_that_cannot_be_pinned_costs_no_room(make, rows, monkeypatch):
    model, store, size = make(host=2, device=2)

    def refuse(self, block):
        raise RuntimeError("out of memory that can be pinned")

    with monkeypatch.context() as patched:
        patched.setattr(Device, "pin", refuse)
        for _ in range(3):
            with pytest.raises(errors.StoreFullError, match=r"couldn't be allocated on cpu .*out of memory that can"):
                ask(model, ["a0"])
    check(model, rows, ["a0", "a1"])
    assert store.stats().host_bytes == 2 * size


def test_adapters_that_nobody_uses_go_before_plans_that_are_kept(make, rows):
    """Dropping a plan for another adapter's sake would make the next step several times slower."""
    model, store, _ = make(host=12, device=3)
    dropped = []
    let_go = store._loader._let_go
    store._loader._let_go = lambda: (dropped.append(True), let_go())
    for name in ("a0", "a1", "a2", "a3", "a4"):
        check(model, rows, [name])
    assert not dropped
    check(model, rows, ["a5", "a6", "a7"])  # the plan of a4 must be dropped for these
    assert dropped


def test_swaps_and_pins(make, rows, folder):
    model, store, _ = make(host=2, device=2)
    store.pin("a0")
    mb = peft_multibatch.enable(model)
    with mb.batch(["a0", "a1"]):
        store.register("a0", folder / "a5")
        check(model, rows, ["a1"])
    assert_close(ask(model, ["a0"])[0], rows["a5"])
    with pytest.raises(errors.StoreFullError, match="max_device_memory"):
        ask(model, ["a0", "a1", "a2"])


def test_threads_that_want_more_than_half_of_the_room(make, rows):
    model, store, size = make(host=2, device=5, timeout=60)

    def serve(generator):
        for _ in range(10):
            check(model, rows, generator.sample([f"a{number}" for number in range(COUNT)], 3))

    in_threads(serve, count=5)
    stats = store.stats()
    assert stats.host_bytes <= 2 * size and stats.device_bytes <= 5 * size


def test_a_model_on_two_devices():
    model = base_model()
    model.lm_head.to("meta")
    with pytest.raises(errors.UnsupportedError, match=r"on cpu, meta: expected all of them on one"):
        peft_multibatch.enable(model).adapter_store()


def test_a_model_on_a_device_that_is_not_served():
    with pytest.raises(errors.UnsupportedError, match=r"on meta: .* on one device of type cpu or cuda"):
        peft_multibatch.enable(base_model().to("meta")).adapter_store()


def test_a_model_that_was_moved(folder):
    model = base_model()
    store = peft_multibatch.enable(model).adapter_store()
    store.register_folder(folder)
    inputs = left_padded(1)
    model(**inputs, adapter_ids=["a0"])
    model.to("meta")
    with pytest.raises(errors.ModelStateError, match="the model was moved to meta, and its adapter store has"):
        model(**{key: value.to("meta") for key, value in inputs.items()}, adapter_ids=["a0"])


# On a GPU.


@pytest.fixture
def on_gpu(folder):
    def make(device=4, host=8, backend="auto", **options):
        model = base_model().cuda()
        mb = peft_multibatch.enable(model, backend=backend)
        size = size_class(4 * 2 * 2 * 4 * (48 + 36))
        store = mb.adapter_store(host * size, device * size, **options)
        store.register_folder(folder)
        return model, store, size

    return make


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rows_on_a_gpu(on_gpu, rows, backend):
    model, store, size = on_gpu(backend=backend)
    generator = random.Random(0)
    for _ in range(20):
        check(model, rows, generator.sample([f"a{number}" for number in range(COUNT)], 3))
        stats = store.stats()
        assert stats.device_bytes <= 4 * size and stats.host_bytes <= 8 * size
    assert store.stats().device_adapters == 4


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores", "ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generate_on_a_gpu(on_gpu, folder, options):
    """Twelve adapters with room for four, in calls of three."""
    model, _, _ = on_gpu()
    inputs = {key: value[:3].cuda() for key, value in left_padded(3).items()}

    def generate(model, inputs, **ids):
        return model.generate(**inputs, **ids, **options, max_new_tokens=8, do_sample=False, pad_token_id=0).cpu()

    for first in range(0, COUNT, 3):
        names = [f"a{number}" for number in range(first, first + 3)]
        want = []
        for row, name in enumerate(names):
            with by_peft(base_model().cuda(), folder / name) as one:
                want.append(generate(one, {key: value[row : row + 1] for key, value in inputs.items()}))
        assert torch.equal(generate(model, inputs, adapter_ids=names), torch.cat(want))


@pytest.mark.gpu
def test_host_memory_is_pinned(on_gpu):
    model, store, _ = on_gpu()
    ask(model, ["a0"])
    (memory,) = store._loader.host._kept.values()
    assert memory.is_pinned()


@pytest.mark.gpu
def test_kernels_that_run_late_read_their_own_weights(on_gpu, rows):
    """The host is far ahead of the device while memory is reused for other adapters."""
    model, _, _ = on_gpu(device=2, host=12)
    ask(model, ["a0"])
    torch.cuda.synchronize()
    found = []
    for number in range(COUNT):
        torch.cuda._sleep(20_000_000)
        found.append(ask(model, [f"a{number}", f"a{(number + 1) % COUNT}"]))
    for number, actual in enumerate(found):
        assert_close(actual[0].cpu(), rows[f"a{number}"])
        assert_close(actual[1].cpu(), rows[f"a{(number + 1) % COUNT}"])


@pytest.mark.gpu
def test_threads_on_streams_of_their_own(on_gpu, rows):
    model, _, _ = on_gpu(device=7, host=4, timeout=60)

    def serve(generator):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                check(model, rows, generator.sample([f"a{number}" for number in range(COUNT)], 3))

    in_threads(serve)


@pytest.mark.gpu
def test_graphs_are_made_for_all_that_is_registered(on_gpu, rows):
    """A captured graph serves adapters that are loaded later."""
    model, _, _ = on_gpu(device=6, host=12)
    mb = peft_multibatch.enable(model)
    inputs = {key: value[:1].repeat(2, 1).cuda() for key, value in left_padded(1).items()}
    hidden = torch.randn(2, 9, 48, device="cuda")
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad(), mb.batch(["a0", "a1"]):
        expected = layer(hidden).clone()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer(hidden)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            output = layer(hidden)
        graph.replay()
        assert_close(output, expected)
    logits(model, inputs, adapter_ids=["a4", "a5"])
    with torch.no_grad(), mb.batch(["a4", "a5"]):
        eager = layer(hidden).clone()
        graph.replay()
        assert_close(output, eager)


@pytest.mark.gpu
def test_a_captured_graph_reads_what_one_copy_wrote_for_all_layers(on_gpu, monkeypatch):
    """Adapters that are loaded after the capture, while the device is far behind, and slots that are used again."""
    model, _, _ = on_gpu(device=4, host=12)
    mb = peft_multibatch.enable(model)
    hidden = torch.randn(2, 9, 48, device="cuda")
    attention = [layer.self_attn for layer in model.model.layers]
    layers = [each for layer in attention for each in (layer.q_proj, layer.k_proj, layer.v_proj)]

    def run():
        return torch.cat([layer(hidden) for layer in layers], dim=-1)

    names = [f"a{number}" for number in range(COUNT)]
    pairs = list(zip(names, [*names[1:], names[0]]))
    with torch.no_grad():
        expected = {}
        for pair in pairs:
            with mb.batch([*pair]):
                expected[pair] = run().clone()
        with mb.batch([*pairs[0]]):
            with torch.cuda.stream(torch.cuda.Stream()):
                run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = run()
        with mb.batch([*pairs[1]]):  # the first time after the capture, banks are looked at one by one
            graph.replay()
        copies, copy = [], TableBlock._copy
        monkeypatch.setattr(TableBlock, "_copy", lambda self, *args: (copies.append(args[0]), copy(self, *args)))
        found = []
        for pair in pairs[2:]:
            torch.cuda._sleep(20_000_000)
            before = len(copies)
            with mb.batch([*pair]):
                graph.replay()
                found.append(output.clone())
            assert len(copies) - before == len({*copies[before:]}) <= 2  # one for each adapter that is new
        assert copies
    for pair, actual in zip(pairs[2:], found):
        assert_close(actual, expected[pair])


@pytest.fixture
def cuda(monkeypatch):
    """CUDA's streams with a recording of what is done to the one for copies, of tensors on a CPU."""
    done = []

    class Recorded:
        def __init__(self, device):
            pass

        def wait_event(self, event):
            done.append(event)

        def synchronize(self):
            done.append("synchronize")

    monkeypatch.setattr(torch.cuda, "Stream", Recorded)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: done.append("set"))
    monkeypatch.setattr(store_streams, "_relax", lambda: done.append("relax"))
    return store_streams.CudaStreams(torch.device("cuda")), done


def test_each_thread_that_copies_is_prepared_once(cuda):
    streams, done = cuda
    source, target = torch.arange(5, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)
    for _ in range(2):
        in_threads(lambda _: [streams.copy(target, source, None) for _ in range(2)], count=1)
        assert done == ["relax", "set", "synchronize", "synchronize"]
        done.clear()
    assert torch.equal(target, source)


def test_a_mark_is_waited_for_once(cuda):
    streams, done = cuda
    target = source = torch.zeros(5, dtype=torch.uint8)
    first, second = ["a", "b"], ["b", "c"]
    for mark in (first, first, second, first, None, first):
        streams.copy(target, source, mark)
    assert [each for each in done if len(each) == 1] == ["a", "b", "b", "c", "a", "b", "a", "b"]


def test_a_thread_that_cannot_be_prepared(cuda, monkeypatch):
    streams, done = cuda
    target, source = torch.zeros(5, dtype=torch.uint8), torch.ones(5, dtype=torch.uint8)

    def fail(_):
        raise RuntimeError("CUDA error")

    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "set_stream", fail)
        with pytest.raises(RuntimeError, match="CUDA error"):
            streams.copy(target, source, None)
    streams.copy(target, source, None)
    assert done == ["relax", "relax", "set", "synchronize"] and torch.equal(target, source)


def test_a_copy_that_was_submitted_before_its_thread_could_not_be_started(make, rows, monkeypatch):
    """`ThreadPoolExecutor` leaves it in its queue, for a thread that is started later."""
    model, store, _ = make(host=12, device=2)
    threads, queued = store._loader.transfers._copier._threads, []

    def refuse(*item):
        queued.append(item)
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threads, "submit", refuse)
        check(model, rows, ["a0", "a1"])
    for function, worker in queued:
        function(worker)
    check(model, rows, ["a2", "a3"])
    assert len(queued) == 2 and len(store._streams.copied) == store.stats().loads == 4
