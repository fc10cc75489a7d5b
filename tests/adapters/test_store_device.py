"""Host and device memory of the store, with a fake device on a CPU, and on a GPU."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from devices import Device
from models import base_model, left_padded
from peft import LoraConfig
from stored import by_peft, expected, logits, save, save_many
from threads import eventually, in_threads
from tolerances import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.adapters.store import source as store_module
from peft_multibatch.adapters.store import streams as store_streams
from peft_multibatch.adapters.store import transfers
from peft_multibatch.adapters.store.arena import Arena, size_class
from peft_multibatch.adapters.store.loading import Turn
from peft_multibatch.adapters.tables import TableBlock
from peft_multibatch.calls.router import Router


COUNT = 12


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


def test_one_thread_at_a_time_launches_copies(make, rows, monkeypatch):
    """Threads that use CUDA at the same time delay the launches of running steps."""
    running, most, launch = [], [], Device.copy

    def copy(*args):
        running.append(True)
        time.sleep(0.005)
        most.append(len(running))
        running.pop()
        return launch(*args)

    model, *_ = make(host=12, device=12)
    monkeypatch.setattr(Device, "copy", copy)
    check(model, rows, [f"a{number}" for number in range(COUNT)])
    assert most == [1] * COUNT


@pytest.fixture
def late(monkeypatch):
    """Copies that wait to be finished, in the order in which they were launched."""
    monkeypatch.setattr(Device, "late", found := [])
    return found


def test_an_adapter_is_in_memory_once_its_copy_has_finished(make, rows, late):
    model, store, size = make(host=12, device=2)
    store.prefetch("a0", "a1")
    assert eventually(lambda: len(late) == 2)  # no other thread copies, and none has to wait for a copy
    for _ in range(3):
        stats = store.stats()
        assert (stats.loads, stats.device_adapters, stats.device_bytes) == (0, 0, 2 * size)
    with ThreadPoolExecutor(1) as other:
        call = other.submit(check, model, rows, ["a0", "a1"])
        assert eventually(lambda: store.stats().misses == 2)
        late[0].finish()
        assert eventually(lambda: store.stats().device_adapters == 1)
        assert not call.done()
        late[1].finish()
        call.result()
    stats = store.stats()
    assert (stats.loads, stats.device_adapters, stats.hits) == (2, 2, 0) and stats.load_seconds >= 2 * 0.5
    check(model, rows, ["a1", "a0"])
    assert store.stats().hits == 2 and len(late) == 2


def test_memory_that_is_copied_from_or_to_is_not_used_for_others(make, rows, late, folder):
    """Not even if the adapter was replaced meanwhile."""
    model, store, size = make(host=1, device=1, timeout=0.5)
    store.prefetch("a0")
    assert eventually(lambda: late)
    for _ in range(2):
        with pytest.raises(errors.StoreFullError, match=r"waited 0.5 s"):
            ask(model, ["a1"])
        store.register("a0", folder / "a0")
    assert (store.stats().host_bytes, store.stats().device_bytes) == (size, size)
    late.pop().finish()
    assert (store.stats().loads, store.stats().device_adapters) == (1, 0)  # nobody uses the old version
    with ThreadPoolExecutor(1) as other:
        call = other.submit(check, model, rows, ["a1"])
        assert eventually(lambda: late)
        late.pop().finish()
        call.result()


def test_a_copy_that_fails(make, rows, late, monkeypatch):
    """On the device, or when it is launched."""
    model, store, size = make(host=12, device=2)

    def refuse(*_):
        raise RuntimeError("CUDA error: out of events")

    with ThreadPoolExecutor(1) as other:
        call = other.submit(check, model, rows, ["a0"])
        assert eventually(lambda: late)
        late.pop().failure = "CUDA error: uncorrectable"
        with pytest.raises(errors.AdapterFileError, match=r"'a0' can't be loaded .*CUDA error: uncorrectable"):
            call.result()
        with monkeypatch.context() as patched:
            patched.setattr(Device, "copy", refuse)
            with pytest.raises(errors.AdapterFileError, match=r"'a0' can't be loaded .*CUDA error: out of events"):
                ask(model, ["a0"])
        call = other.submit(check, model, rows, ["a0"])
        assert eventually(lambda: late)
        late.pop().finish()
        call.result()
    stats = store.stats()
    assert (stats.loads, stats.device_adapters, stats.device_bytes) == (1, 1, size)


def test_copies_that_finish_or_fail_while_others_of_their_batch_begin(make, rows, late, monkeypatch):
    model, store, _ = make(host=12, device=3)
    store.prefetch("a0")
    assert eventually(lambda: len(late) == 1)
    store.prefetch("a1")
    assert eventually(lambda: len(late) == 2)
    launch = Device.copy

    def launch_later(*args):
        late[0].finish()
        late[1].failure = "CUDA error: uncorrectable"
        store.stats()  # as by a signal handler
        return launch(*args)

    with monkeypatch.context() as patched, pytest.raises(errors.AdapterFileError, match=r"'a1' can't be loaded"):
        patched.setattr(Device, "copy", launch_later)
        ask(model, ["a0", "a1", "a2"])
    late[-1].finish()
    del late[:]
    with ThreadPoolExecutor(1) as other:
        call = other.submit(check, model, rows, ["a0", "a1"])
        assert eventually(lambda: late)
        late.pop().finish()
        call.result()


def test_a_signal_handler_looks_while_a_batch_begins(make, rows, monkeypatch):
    """At the store, so that loads of the same batch end."""
    model, store, _ = make(host=12, device=3)
    check(model, rows, ["a0", "a1", "a2"])
    check(model, rows, ["a3", "a4", "a5"])
    launch = Device.copy
    monkeypatch.setattr(Device, "copy", lambda *args: (store.stats(), launch(*args), store.stats())[1])
    check(model, rows, ["a0", "a1", "a2"])
    assert store.stats().loads == 9


@pytest.mark.parametrize("name", ["copy", "_copy", "_try", "_end"])
def test_ctrl_c_while_a_copy_begins_or_is_collected(make, rows, monkeypatch, name):
    """And a signal handler that looks at the store before that."""
    model, store, _ = make(host=12, device=3)
    check(model, rows, ["a0", "a1", "a2"])
    check(model, rows, ["a3", "a4", "a5"])
    before, transfers = store.stats(), store._loader.transfers
    place = store._streams if name == "copy" else transfers
    work = getattr(place, name)

    def interrupt(*args):
        monkeypatch.setattr(place, name, work)
        work(*args)
        store.stats()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Device, "late", late := [])
        if "copy" in name:
            patched.setattr(place, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                store.prefetch("a0", "a1")
        store.prefetch("a0", "a1")
        for copy in late:
            copy.finish()
        if "copy" not in name:
            patched.setattr(place, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                store.stats()
    stats = store.stats()
    assert stats.loads - before.loads == 2 and not transfers.is_copying
    assert stats.load_seconds - before.load_seconds == pytest.approx(2 * 0.5, abs=0.1)
    check(model, rows, ["a0", "a1", "a2"])
    check(model, rows, ["a3", "a4", "a5"])
    assert store.stats().loads - before.loads == 6


def test_a_finished_copy_leaves_its_room_to_others(make, late, folder):
    """Though nobody has looked at it."""
    _, store, _ = make(host=12, device=1)
    for name in ("a0", "a1"):
        store.prefetch(name)
        assert eventually(lambda: late)
        late.pop().finish()
    assert [each.name for each in store.describe()] == ["a1"]
    with ThreadPoolExecutor(1) as other:
        for _ in range(3):
            registered = other.submit(store.register, "a2", folder / "a2", pin=True)
            assert eventually(lambda: late)
            late.pop().finish()
            registered.result()
    assert [each.name for each in store.describe()] == ["a2"]


def test_a_request_that_has_waited_for_a_finished_copy_for_long(make, late):
    """As while all places of a batch were taken, and nobody looked."""
    _, store, _ = make(host=12, device=2, timeout=0.1)
    store.prefetch("a0")
    assert eventually(lambda: late)
    late.pop().finish()
    begin = time.monotonic()
    time.sleep(0.2)
    assert store.lease([store._names.ids["a0"]], Turn(), begin) is not None


def test_only_those_that_wait_for_a_copy_look_often(make, rows, late, monkeypatch):
    model, store, _ = make(host=12, device=2)
    store.prefetch("a0")
    assert eventually(lambda: late)
    read, go, pauses, wait = transfers.read_weights, threading.Event(), [], store._lock.wait
    monkeypatch.setattr(transfers, "read_weights", lambda *args: (go.wait(20), read(*args)))
    monkeypatch.setattr(store._lock, "wait", lambda seconds: (pauses.append(seconds), wait(seconds)))
    with ThreadPoolExecutor(1) as other:
        call = other.submit(check, model, rows, ["a0", "a1"])
        assert eventually(lambda: len(pauses) > 5)
        assert pauses[:3] == [transfers.COPY_POLL * 2**each for each in range(3)] and pauses[-1] == transfers.POLL
        late.pop().finish()
        del pauses[:]
        assert eventually(lambda: len(pauses) > 2) and {*pauses} == {transfers.POLL}
        go.set()
        assert eventually(lambda: late)
        late.pop().finish()
        call.result()


def test_closing_keeps_no_memory_of_loads(make, late, monkeypatch):
    """Of one that is being copied, and of one that waits to be read."""
    model, store, _ = make(host=12, device=COUNT)
    store.prefetch("a0")
    assert eventually(lambda: late)
    late.clear()
    read, go = transfers.read_weights, threading.Event()
    monkeypatch.setattr(transfers, "read_weights", lambda *args: (go.wait(20), read(*args)))
    store.prefetch(*(f"a{number}" for number in range(1, 2 + transfers.READERS)))
    loads = [store._versions[store._names.ids[name]].loading for name in ("a0", f"a{1 + transfers.READERS}")]
    memory = [weakref.ref(loads[0].memory), weakref.ref(loads[0].source), weakref.ref(loads[1].memory)]
    gc.disable()
    try:
        del loads
        peft_multibatch.disable(model)
        assert eventually(lambda: [each() for each in memory] == [None] * 3)
    finally:
        gc.enable()
        go.set()


def test_adapters_in_host_memory_need_no_thread(make, rows, monkeypatch):
    """As while the interpreter exits."""
    model, store, _ = make(host=12, device=2)
    check(model, rows, ["a0", "a1"])
    check(model, rows, ["a2", "a3"])

    def refuse(*_):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    with monkeypatch.context() as patched:
        patched.setattr(store._loader.transfers.readers, "submit", refuse)
        check(model, rows, ["a0", "a1"])
        with pytest.raises(errors.StoreFullError, match=r"no thread can be started \(cannot schedule"):
            ask(model, ["a0", "a4"])
    check(model, rows, ["a0", "a4"])


def test_waiting_for_host_memory_drops_no_plans(make, monkeypatch):
    """Plans hold memory of the device."""
    dropped = []
    monkeypatch.setattr(Router, "let_go", lambda _: dropped.append(True))
    _, store, _ = make(host=1, device=COUNT)
    store.prefetch(*(f"a{number}" for number in range(COUNT)))
    assert eventually(lambda: store.stats().device_adapters == COUNT, 20)
    assert not dropped
    assert not store._loader.final.make_room([COUNT * 10**6], set(), store._loader._let_go) and dropped


def test_closing_ends_reads_that_wait_for_host_memory(make, late):
    model, store, _ = make(host=1, device=COUNT, timeout=60)
    store.prefetch("a0", "a1")
    assert eventually(lambda: late)
    begin = time.monotonic()
    peft_multibatch.disable(model)
    # one of them waits for the memory that is being copied
    store._loader.transfers.readers._threads.shutdown(wait=True)
    assert len(late) == 1 and time.monotonic() - begin < 20


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
        def __init__(self, *_, **__):
            pass

        def wait_event(self, event):
            done.append(event)

        def record(self):
            done.append("record")

    @contextlib.contextmanager
    def block(name):
        done.append(name)
        yield
        done.append(f"end {name}")

    monkeypatch.setattr(torch.cuda, "Stream", Recorded)
    monkeypatch.setattr(torch.cuda, "Event", Recorded)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: block("stream"))
    monkeypatch.setattr(store_streams, "_relaxed", lambda: block("relaxed"))
    return store_streams.CudaStreams(torch.device("cuda")), done


def test_a_copy_is_launched_on_its_stream(cuda):
    """Also inside modes of torch that see all operations, such as one that counts them."""
    streams, done = cuda
    source, target = torch.arange(5, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)
    with FlopCounterMode(display=False), FakeTensorMode():
        streams.copy(target, source, None)
    assert done == ["relaxed", "stream", "record", "record", "end stream", "end relaxed"]
    assert torch.equal(target, source)


def test_a_mark_is_waited_for_once(cuda):
    streams, done = cuda
    target = source = torch.zeros(5, dtype=torch.uint8)
    first, second = ["a", "b"], ["b", "c"]
    for mark in (first, first, second, first, None, first):
        streams.copy(target, source, mark)
    assert [each for each in done if len(each) == 1] == ["a", "b", "b", "c", "a", "b", "a", "b"]


@pytest.mark.parametrize("has_failed", [False, True], ids=["", "of a device that has failed"])
def test_host_memory_is_unpinned_once_nothing_reads_it(cuda, monkeypatch, has_failed):
    streams, done = cuda

    def synchronize(event):
        done.append("synchronize")
        if has_failed:
            raise RuntimeError("CUDA error")

    runtime = SimpleNamespace(
        cudaHostRegister=lambda *_: done.append("register"), cudaHostUnregister=lambda *_: done.append("unregister")
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda _: None)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", synchronize, raising=False)
    blocks = [np.zeros(5, dtype=np.uint8) for _ in range(2)]
    for block in blocks:
        streams.pin(block)
    streams.copy(torch.zeros(5, dtype=torch.uint8), torch.from_numpy(blocks[0]), None)
    done.clear()
    del block
    blocks.pop(0)
    assert done == ["relaxed", "synchronize", "unregister", "end relaxed"]
    done.clear()
    blocks.clear()
    assert done == ["relaxed", "unregister", "end relaxed"]
