"""The store's memory: limits hold, memory in use isn't overwritten, and no batch waits forever."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import shutil
import threading
import time
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
from models import base_model, left_padded
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from stored import WEIGHTS, by_peft, edit_config, edit_tensors, expected, logits, save, save_many
from threads import eventually
from tolerances import assert_close
from tqdm.auto import tqdm

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.adapters.store import files, loading, progress, transfers, workers
from peft_multibatch.adapters.store.arena import Arena, parse_size, size_class
from peft_multibatch.adapters.store.loading import Turn
from peft_multibatch.adapters.store.streams import Streams
from peft_multibatch.adapters.store.tier import Tier
from peft_multibatch.adapters.store.version import StoredAdapter


COUNT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    save_many(path, COUNT)
    return path


@pytest.fixture(scope="module")
def size(folder):
    model = base_model()
    store = peft_multibatch.enable(model).adapter_store()
    store.register("a0", folder / "a0")
    return size_class(next(iter(store._versions.values())).layout.size)


@pytest.fixture(scope="module")
def rows(folder):
    """PEFT's logits of a prompt for every adapter."""
    inputs = {key: value[:1].repeat(COUNT, 1) for key, value in left_padded(1).items()}
    found = expected([f"a{number}" for number in range(COUNT)], folder, logits, inputs)
    return dict(zip((f"a{number}" for number in range(COUNT)), found))


def make(folder, size, room, timeout=5.0):
    """Build a model and a store with room for ``room`` adapters."""
    model = base_model()
    store = peft_multibatch.enable(model).adapter_store(max_host_memory=room * size, timeout=timeout)
    store.register_folder(folder)
    return model, store


def ask(model, names):
    inputs = {key: value[:1].repeat(len(names), 1) for key, value in left_padded(1).items()}
    return logits(model, inputs, adapter_ids=names)


def check(model, rows, names):
    for actual, name in zip(ask(model, names), names):
        assert_close(actual, rows[name])


def in_memory(store):
    return {each.name for each in store.describe()}


def test_nothing_is_read_before_it_is_needed(folder, size, rows):
    model, store = make(folder, size, 4)
    assert store.stats().bytes_read == store.stats().host_bytes == 0
    check(model, rows, ["a1", "a2", "a1"])
    stats = store.stats()
    assert (stats.registered, stats.host_adapters, stats.loads, stats.misses) == (COUNT, 2, 2, 2)
    assert stats.host_bytes == 2 * size
    check(model, rows, ["a2", "a1"])
    assert (store.stats().loads, store.stats().hits) == (2, 2)


def test_those_that_were_used_last_stay(folder, size, rows):
    model, store = make(folder, size, 3)
    for names in (["a0"], ["a1"], ["a2"], ["a0"], ["a3"]):
        check(model, rows, names)
    assert in_memory(store) == {"a0", "a2", "a3"}
    assert store.stats().evictions == 1


def test_pinned_ones_stay(folder, size, rows):
    model, store = make(folder, size, 3)
    store.pin("a0")
    for number in range(1, COUNT):
        check(model, rows, [f"a{number}"])
    assert "a0" in in_memory(store)
    store.pin("a0", False)
    check(model, rows, ["a1", "a2", "a3"])
    assert in_memory(store) == {"a1", "a2", "a3"}


def test_pins_that_leave_no_room(folder, size, rows):
    model, store = make(folder, size, 3)
    store.register("p", folder / "a0", pin=True)
    store.pin("a1")
    with pytest.raises(errors.StoreFullError, match=r"a batch names 2 stored adapters .* pinned .*: expected fewer"):
        ask(model, ["a2", "a3"])
    store.pin("a2")
    with pytest.raises(errors.StoreFullError, match=r"'a3' can't be pinned along with 3 others.*: expected room"):
        store.pin("a3")
    with pytest.raises(errors.StoreFullError, match=r"be pinned along with"):
        store.register("q", folder / "a0", pin=True)
    assert "q" not in store
    store.register("p", folder / "a4", pin=True)  # it replaces its own memory
    check(model, rows, ["a1", "a2"])
    assert_close(ask(model, ["p"])[0], rows["a4"])


def test_a_batch_that_never_has_room(folder, size, rows):
    model, _ = make(folder, size, 3)
    begin = time.perf_counter()
    with pytest.raises(errors.StoreFullError, match=r"names 4 stored adapters.*: expected fewer .*max_host_memory"):
        ask(model, ["a0", "a1", "a2", "a3"])
    assert time.perf_counter() - begin < 1
    check(model, rows, ["a0", "a1", "a2"])


def test_an_adapter_larger_than_all_memory(folder, size):
    store = peft_multibatch.enable(base_model()).adapter_store(max_host_memory=size - 1)
    with pytest.raises(errors.StoreFullError, match=r"'a0' needs .* bytes, and the store has .*: expected a smaller"):
        store.register("a0", folder / "a0")


def test_bytes_are_bounded_at_all_times(folder, size, rows, monkeypatch):
    seen = []
    model, store = make(folder, size, 3)
    arena = store._loader.final.arena
    take = arena.take
    monkeypatch.setattr(arena, "take", lambda size: (take(size), seen.append(arena.used + arena.kept))[0])
    generator = random.Random(0)
    for _ in range(40):
        check(model, rows, [f"a{generator.randrange(COUNT)}" for _ in range(3)])
    assert len(seen) > 20 and max(seen) <= 3 * size


# Memory that is being read.


def test_a_call_keeps_the_version_that_it_began_with(folder, size, rows):
    """Even if the adapter is replaced or unregistered, or others need all of the memory."""
    model, store = make(folder, size, 3)
    mb = peft_multibatch.enable(model)
    with mb.batch(["a1", "a2"]):
        store.register("a1", folder / "a5")
        store.unregister("a2")
        inputs = {key: value[:1].repeat(2, 1) for key, value in left_padded(1).items()}
        layer = model.model.layers[0].self_attn.q_proj
        call = mb._router.active()
        check(model, rows, ["a0"])  # one more adapter fits
        check(model, rows, ["a3"])
        parts = [adapter.parts([layer._multibatch.module])[0] for adapter in call.plan.adapters.values()]
        for name, part in zip(("a1", "a2"), parts):
            file = load_file(folder / name / WEIGHTS)
            key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
            assert torch.equal(part.lora_a, file[key])
        with pytest.raises(errors.UnknownAdapterError):
            logits(model, inputs)  # a block that names a removed adapter starts no more calls
    assert_close(ask(model, ["a1"])[0], rows["a5"])
    with pytest.raises(errors.UnknownAdapterError):
        ask(model, ["a2"])


def test_generate_ends_with_the_version_that_it_began_with(folder, size, rows):
    model, store = make(folder, size, 2)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def generate(name):
        return model.generate(**left_padded(1), adapter_ids=[name], **options)

    before, other = generate("a1"), generate("a2")
    assert not torch.equal(before, other)

    def swap(module, args):
        if not swapped:
            swapped.append(True)
            store.register("a1", folder / "a2")

    swapped = []
    with model.model.layers[1].register_forward_pre_hook(swap):
        assert torch.equal(generate("a1"), before)
    assert torch.equal(generate("a1"), other)


def test_no_room_while_calls_hold_it(folder, size, rows):
    model, _ = make(folder, size, 2, timeout=0.2)
    mb = peft_multibatch.enable(model)
    with mb.batch(["a0", "a1"]):
        with pytest.raises(
            errors.StoreFullError, match=r"waited 0.2 s for 1 stored adapters \('a2'.*: expected memory"
        ):
            ask(model, ["a2"])
        check(model, rows, ["a1"])  # it is in memory
    check(model, rows, ["a2"])


def test_memory_comes_back_when_a_call_ends(folder, size, rows):
    model, _ = make(folder, size, 2)
    mb = peft_multibatch.enable(model)
    entered, leave, found = threading.Event(), threading.Event(), []

    def hold():
        with mb.batch(["a0", "a1"]):
            entered.set()
            leave.wait()

    def want():
        found.extend(ask(model, ["a2"]))

    threads = [threading.Thread(target=hold), threading.Thread(target=want)]
    threads[0].start()
    entered.wait()
    threads[1].start()
    time.sleep(0.1)
    assert not found
    leave.set()
    for thread in threads:
        thread.join()
    assert_close(found[0], rows["a2"])


def test_gradients_read_what_they_were_made_of(folder, size):
    """Autograd keeps the weights of a finished call; other adapters get other memory, or an error."""
    model, _ = make(folder, size, 2, timeout=0.2)
    model.requires_grad_(False)
    weight = model.get_input_embeddings().weight.requires_grad_(True)

    def loss(name):
        return model(**left_padded(1), adapter_ids=[name]).logits.square().mean()

    loss("a0").backward()
    wanted, weight.grad = weight.grad, None
    first = loss("a0")
    ask(model, ["a1"])
    ask(model, ["a2"])  # replaces a1 in memory
    with pytest.raises(errors.StoreFullError):
        ask(model, ["a3", "a4"])
    first.backward()
    assert torch.equal(weight.grad, wanted)
    del first
    ask(model, ["a3", "a4"])


def test_an_exception_that_is_kept_costs_nothing_once_it_is_gone(folder, size, rows):
    model, _ = make(folder, size, 2, timeout=0.5)

    def fail(*_):
        raise ZeroDivisionError

    with model.model.layers[1].register_forward_pre_hook(fail), contextlib.suppress(ZeroDivisionError):
        ask(model, ["a0", "a1"])
    check(model, rows, ["a2", "a3"])


def test_weights_are_released_when_nobody_needs_them(folder, size):
    model, store = make(folder, size, 2)
    ask(model, ["a0"])
    memory = weakref.ref(store.adapters([store._names.ids["a0"]])[store._names.ids["a0"]])
    ask(model, ["a1", "a2"])
    gc.collect()
    assert memory() is None


# Files that change.


def copy(folder, tmp_path, name="a0"):
    return shutil.copytree(folder / name, tmp_path / name)


def test_files_that_changed_since_they_were_registered(folder, size, tmp_path, rows):
    model, store = make(folder, size, 4)
    own = copy(folder, tmp_path)
    store.register("own", own)
    edit_tensors(own, lambda tensors: {key: value * 2 for key, value in tensors.items()})
    for _ in range(2):
        with pytest.raises(errors.AdapterFileError, match=r"'own' .* changed since .*: expected the same file"):
            ask(model, ["own"])
    check(model, rows, ["a0"])
    store.register("own", own)
    ask(model, ["own"])


@pytest.mark.parametrize("spoil", ["cut", "gone", "a link", "another of the same size and time"])
def test_files_that_went(folder, size, tmp_path, rows, spoil):
    model, store = make(folder, size, 4)
    own = copy(folder, tmp_path, "a2")
    store.register("own", own)
    path = own / WEIGHTS
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif spoil.startswith("another"):
        then = path.stat()
        shutil.copy(folder / "a1" / WEIGHTS, own / "other")
        os.utime(own / "other", ns=(then.st_atime_ns, then.st_mtime_ns))
        os.replace(own / "other", path)
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (then.st_size, then.st_mtime_ns)
    else:
        path.unlink()
    if spoil == "a link":
        path.symlink_to(folder / "a1" / WEIGHTS)
    with pytest.raises(errors.AdapterFileError, match=r"'own'.*: expected"):
        ask(model, ["a0", "own"])
    check(model, rows, ["a0", "a1"])
    assert eventually(lambda: store.stats().host_bytes == store.stats().host_adapters * size)


def test_a_file_that_is_cut_while_it_is_read(folder, size, tmp_path, monkeypatch):
    model, store = make(folder, size, 4)
    own = copy(folder, tmp_path)
    store.register("own", own)
    preadv = files.os.preadv

    def cutting(descriptor, buffers, offset):
        (own / WEIGHTS).write_bytes((own / WEIGHTS).read_bytes()[: offset + 8])
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(files.os, "preadv", cutting)
    with pytest.raises(errors.AdapterFileError, match=r"changed since"):
        ask(model, ["own"])


def test_short_reads(folder, size, rows, monkeypatch):
    model, _ = make(folder, size, 4)
    preadv = files.os.preadv
    monkeypatch.setattr(files.os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:1000]], offset))
    check(model, rows, ["a0", "a3"])


def test_whatever_reading_raises_is_the_error_of_its_own_adapter(folder, size, rows, monkeypatch):
    model, _ = make(folder, size, 4)
    read = transfers.read_weights

    def failing(name, *args):
        if name == "a1":
            raise MemoryError("no memory")
        read(name, *args)

    monkeypatch.setattr(transfers, "read_weights", failing)
    with pytest.raises(errors.AdapterFileError, match=r"'a1' can't be loaded .*MemoryError.*: expected"):
        ask(model, ["a0", "a1"])
    check(model, rows, ["a0", "a2"])


def test_the_same_name_again_is_a_new_version(folder, size, rows):
    model, store = make(folder, size, 4)
    number = store._names.ids["a0"]
    registry = peft_multibatch.enable(model)._registry
    versions = {registry.version(number)}
    for other in ("a1", "a2", "a2"):
        store.register("a0", folder / other)
        versions.add(registry.version(number))
        assert_close(ask(model, ["a0"])[0], rows[other])
    assert len(versions) == 4
    ask(model, ["a3", "a4", "a5", "a6"])  # evicts it
    before = registry.version(number)
    ask(model, ["a0"])
    assert registry.version(number) == before  # loaded again, unchanged


def test_an_adapter_that_cannot_be_registered_leaves_the_one_of_its_name(folder, size, rows, tmp_path):
    model, store = make(folder, size, 4)
    own = copy(folder, tmp_path)
    edit_config(own, use_dora=True)
    with pytest.raises(errors.AdapterUnsupportedError):
        store.register("a0", own)
    check(model, rows, ["a0"])


WEIRD = {
    "one NaN in lora_B": lambda tensors: {
        key: value.index_fill(0, torch.tensor([0]), float("nan"))
        if "layers.0.self_attn.q_proj.lora_B" in key
        else value
        for key, value in tensors.items()
    },
    "infinite": lambda tensors: {key: value * float("inf") for key, value in tensors.items()},
    "values that overflow": lambda tensors: {key: value * 1e30 for key, value in tensors.items()},
    "float64 that float32 can't hold": lambda tensors: {key: value.double() * 1e300 for key, value in tensors.items()},
    "zeros": lambda tensors: {key: value * 0 for key, value in tensors.items()},
}


@pytest.mark.parametrize("change", WEIRD.values(), ids=WEIRD)
def test_numbers_that_are_none_stay_in_their_rows(folder, size, tmp_path, rows, change):
    """In those rows they match PEFT's."""
    model, store = make(folder, size, 4)
    own = copy(folder, tmp_path)
    edit_tensors(own, change)
    store.register("own", own)
    names = ["a1", "own", "__base__", "own", "a2"]
    actual = ask(model, names)
    wanted = expected(names, {"own": own, "a1": folder / "a1", "a2": folder / "a2"}, logits, {
        key: value[:1].repeat(len(names), 1) for key, value in left_padded(1).items()
    })  # fmt: skip
    for row in (0, 2, 4):
        assert_close(actual[row], wanted[row])
    assert torch.equal(actual[1].isfinite(), wanted[1].isfinite())
    assert_close(actual[1].nan_to_num(0, 0, 0), wanted[1].nan_to_num(0, 0, 0))


# Threads.


def test_prefetching(folder, size, rows):
    model, store = make(folder, size, 4)
    store.prefetch("a0", "a1")
    deadline = time.monotonic() + 5
    while store.stats().host_adapters < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    check(model, rows, ["a0", "a1"])
    assert (store.stats().misses, store.stats().loads) == (0, 2)
    mb = peft_multibatch.enable(model)
    with mb.batch(["a0", "a1", "a2", "a3"]):
        store.prefetch("a4", "a5")  # there is no room, so nothing is loaded and nothing waits
        assert in_memory(store) == {"a0", "a1", "a2", "a3"}
        assert not any(version.loading for version in store._versions.values())


def test_pinning_waits_for_room(folder, size, rows):
    model, store = make(folder, size, 2, timeout=0.3)
    mb = peft_multibatch.enable(model)
    with mb.batch(["a0", "a1"]):
        for pin in (lambda: store.pin("a2"), lambda: store.register("p", folder / "a2", pin=True)):
            with pytest.raises(errors.StoreFullError, match=r"a batch waited 0.3 s for 1 stored adapters"):
                pin()
        assert store.stats().pinned == 0 and "p" in store
    store._loader._timeout = 20
    with ThreadPoolExecutor(1) as other:
        with mb.batch(["a0", "a1"]):
            pinned = other.submit(store.pin, "a2")
            time.sleep(0.1)
            assert not pinned.done()
        pinned.result(10)
    assert "a2" in in_memory(store) and store.stats().pinned == 1


def test_an_adapter_that_cannot_be_loaded_is_not_pinned(folder, size, rows, tmp_path):
    model, store = make(folder, size, 2)
    own = copy(folder, tmp_path)
    store.register("own", own)
    (own / WEIGHTS).unlink()
    with pytest.raises(errors.AdapterFileError, match="can't be opened any more"):
        store.pin("own")
    assert store.stats().pinned == 0
    check(model, rows, ["a0", "a1"])


def test_an_error_of_a_load_is_not_that_of_a_later_request(folder, size, tmp_path):
    model, store = make(folder, size, 2)
    own = copy(folder, tmp_path)
    store.register("own", own)
    number = store._names.ids["own"]
    os.rename(own / WEIGHTS, own / "away")
    with pytest.raises(errors.AdapterFileError):
        ask(model, ["own"])
    os.rename(own / "away", own / WEIGHTS)
    assert store.lease([number], Turn(), since=None) is None
    assert eventually(lambda: store.lease([number], Turn(), since=time.monotonic()))


def test_the_first_two_versions_at_once(folder, size, monkeypatch):
    """The second waits for requests that run with the first, although there was none when it began."""
    _, store = make(folder, size, 2)
    guarded, is_between = [], [True]
    monkeypatch.setattr(store, "_guard", lambda number: guarded.append(number) or nullcontext())

    class Lock:  # registers another version just before the first is entered
        def __enter__(self):
            if is_between.pop() if is_between else False:
                store.register("new", folder / "a1")
            lock.__enter__()

        def __exit__(self, *args):
            lock.__exit__(*args)

    lock = store._lock
    monkeypatch.setattr(store, "_lock", Lock())
    store.register("new", folder / "a0")
    number = store._names.ids["new"]
    assert guarded == [number] and store._versions[number].path == str(folder / "a0" / WEIGHTS)


def test_one_that_is_being_loaded_is_waited_for(folder, size, rows, monkeypatch):
    model, store = make(folder, size, 4)
    begun, go = threading.Event(), threading.Event()
    read = transfers.read_weights

    def slow(*args):
        begun.set()
        go.wait(5)
        read(*args)

    monkeypatch.setattr(transfers, "read_weights", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(ask(model, ["a0"]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.wait()
    time.sleep(0.05)
    go.set()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and store.stats().loads == 1
    for each in found:
        assert_close(each[0], rows["a0"])


def test_files_that_hang_hold_up_no_others(folder, size, rows, monkeypatch):
    monkeypatch.setattr(workers, "HANGING", 0.2)
    model, store = make(folder, size, COUNT, timeout=20)
    go, read, reading = threading.Event(), transfers.read_weights, []

    def hang(name, *args):
        reading.append(name)
        if name in names:
            go.wait(20)
        read(name, *args)

    names = [f"a{number}" for number in range(transfers.READERS)]
    monkeypatch.setattr(transfers, "read_weights", hang)
    store.prefetch(*names)
    assert eventually(lambda: sorted(reading) == names)
    begin = time.monotonic()
    check(model, rows, [f"a{number}" for number in range(transfers.READERS, COUNT)])
    assert time.monotonic() - begin < 10
    go.set()
    check(model, rows, names)
    assert eventually(lambda: not store._loader.transfers.readers._since)


def test_batches_that_each_want_more_than_half_of_the_room(folder, size, rows):
    """Many threads run batches, with swaps, prefetches and pins in between; all finish with the right rows."""
    model, store = make(folder, size, 5, timeout=60)
    failures = []

    def serve(seed):
        generator = random.Random(seed)
        try:
            for _ in range(12):
                names = generator.sample([f"a{number}" for number in range(COUNT)], 3)
                check(model, rows, names)
        except BaseException as error:
            failures.append(error)

    def change():
        generator = random.Random(7)
        while any(thread.is_alive() for thread in threads):
            name = f"a{generator.randrange(COUNT)}"
            store.register(name, folder / name)
            store.prefetch(f"a{generator.randrange(COUNT)}")
            store.stats()
            time.sleep(0.001)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    changing = threading.Thread(target=change)
    changing.start()
    for thread in [*threads, changing]:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    assert store.stats().host_bytes <= 5 * size


def test_a_batch_that_wants_most_of_the_room_beside_many_small_ones(folder, size, rows):
    """They find room again and again before there is enough for it, and wait behind it after a second."""
    model, _ = make(folder, size, 6, timeout=8)
    mb = model._multibatch
    is_over, failures = threading.Event(), []

    def ask_for_one(number):
        try:
            for name in itertools.cycle(f"a{each}" for each in range(5 + number, COUNT, 3)):
                if is_over.is_set():
                    return
                with mb.batch([name]):
                    time.sleep(0.05)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask_for_one, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.2)
        for _ in range(3):
            check(model, rows, [f"a{number}" for number in range(5)])
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_batch_inside_another_one_does_not_wait_for_those_that_want_its_room(folder, size, rows, monkeypatch):
    monkeypatch.setattr(loading, "STARVED", 0)
    model, store = make(folder, size, 3, timeout=8)
    mb = model._multibatch
    with ThreadPoolExecutor(1) as thread:
        with mb.batch(["a0"]):
            waiting = thread.submit(ask, model, ["a1", "a2", "a3"])
            assert eventually(lambda: len(store._loader._queue) == 1)
            check(model, rows, ["a4"])
        waiting.result(20)


def test_each_output_is_wholly_one_version(folder, size, rows):
    model, store = make(folder, size, 4)
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            for other in ("a1", "a2"):
                store.register("a0", folder / other)
                time.sleep(0.002)

    store.register("a0", folder / "a1")
    thread = threading.Thread(target=swap)
    thread.start()
    versions = set()
    try:
        for _ in range(40):
            actual = ask(model, ["a0", "a3"])
            errors_ = [float((actual[0] - rows[name]).norm() / rows[name].norm()) for name in ("a1", "a2")]
            assert min(errors_) < 1e-5
            versions.add(errors_.index(min(errors_)))
            assert_close(actual[1], rows["a3"])
    finally:
        stop.set()
        thread.join()
    assert versions == {0, 1}


def test_memory_inside_of_other_memory(folder, size, rows):
    """Views of weights begin where the adapter's memory does, and not where its storage does."""
    _, store = make(folder, size, 2)
    number = store._names.ids["a1"]
    found = store.adapters([number])[number]
    storage = torch.zeros(len(found.memory) + 128, dtype=torch.uint8)
    storage[64:-64] = found.memory
    inside = StoredAdapter(found.version, storage[64:-64], store._slots, store._model.names)
    layers = list(store._model.names)
    for expected_part, part in zip(found.parts(layers), inside.parts(layers)):
        assert torch.equal(part.lora_a, expected_part.lora_a) and torch.equal(part.lora_b, expected_part.lora_b)


def test_a_model_that_changed_so_that_an_adapter_no_longer_fits(folder, size, rows):
    model, store = make(folder, size, 4)
    save(folder.parent / "keys", LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    store.register("keys", folder.parent / "keys")
    want = ask(model, ["keys"])[0]
    attention = model.model.layers[0].self_attn
    before, attention.k_proj = attention.k_proj, torch.nn.Linear(attention.k_proj.in_features, 20, bias=False)
    with pytest.raises(errors.AdapterMismatchError, match="'keys' has lora_A of shape"):
        ask(model, ["keys"])
    attention.k_proj = before
    assert_close(ask(model, ["keys"])[0], want)
    check(model, rows, ["a0", "a1"])


def test_an_interrupt_while_a_batch_waits(folder, size, rows, monkeypatch):
    model, store = make(folder, size, 2)
    mb = peft_multibatch.enable(model)
    calls = []

    def interrupted(*args):
        calls.append(args)
        raise KeyboardInterrupt

    with mb.batch(["a0", "a1"]), monkeypatch.context() as patch:
        patch.setattr(store._lock, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(model, ["a2"])
    gc.collect()
    assert calls
    check(model, rows, ["a2", "a3"])


# Progress.


@pytest.fixture
def bars():
    transformers.utils.logging.enable_progress_bar()
    yield
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def slowly(monkeypatch):
    """Delay reading until there is a progress bar, or could have been one."""
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    read = transfers.read_weights

    def slow(*args):
        deadline = time.monotonic() + 0.5
        while not tqdm._instances and time.monotonic() < deadline:
            time.sleep(0.01)
        read(*args)

    monkeypatch.setattr(transfers, "read_weights", slow)


def test_a_batch_that_waits_shows_how_many_are_there(folder, size, rows, bars, slowly, capsys):
    model, _ = make(folder, size, 12)
    capsys.readouterr()
    check(model, rows, [f"a{number}" for number in range(12)])
    shown = capsys.readouterr().err
    assert "loading adapters" in shown and "/12" in shown
    check(model, rows, ["a0", "a1"])  # both are in memory
    assert capsys.readouterr().err == ""


def test_bars_are_hidden_where_those_of_transformers_are(folder, size, rows, bars, slowly, capsys):
    transformers.utils.logging.disable_progress_bar()
    model, _ = make(folder, size, 12)
    check(model, rows, [f"a{number}" for number in range(12)])
    assert capsys.readouterr().err == ""


def test_bars_end_when_loading_fails(folder, size, bars, slowly, capsys):
    model, _ = make(folder, size, 2, timeout=1.5)
    capsys.readouterr()
    with peft_multibatch.enable(model).batch(["a0", "a1"]), pytest.raises(errors.StoreFullError):
        ask(model, ["a2"])
    assert "loading adapters" in capsys.readouterr().err and len(tqdm._instances) == 0


def test_what_is_quick_shows_nothing(folder, size, rows, bars, capsys):
    model, _ = make(folder, size, 12)
    check(model, rows, ["a0", "a1"])
    assert capsys.readouterr().err == ""


def test_registering_many_shows_how_many(folder, size, bars, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    _, store = make(folder, size, 12)
    assert len(store) == COUNT
    shown = capsys.readouterr().err
    assert "registering adapters" in shown and f"{COUNT}/{COUNT}" in shown


# Components.


def test_size_classes():
    for size in (1, 63, 64, 65, 1000, 46080, 10**6, 84 * 10**6):
        found = size_class(size)
        assert size <= found <= max(size * 1.13, size + 64) and size_class(found) == found


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("512MiB", 2**29), ("1.5 kb", 1500), (17, 17), ("17", 17), ("3 B", 3)]
)
def test_sizes(text, size):
    assert parse_size("max_host_memory", text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", 0, "0", None, True, "8 pounds", "1e9", float("nan")])
def test_sizes_that_are_none(text):
    with pytest.raises(errors.StoreFullError, match=r"max_host_memory=.*: expected a positive number"):
        peft_multibatch.enable(base_model()).adapter_store(max_host_memory=text)


def test_a_block_lives_as_long_as_any_view_of_it():
    arena = Arena(1024, torch.device("cpu"), False, Streams(torch.device("cpu")))
    memory, _ = arena.take(1000)
    view = memory[16:80].view(torch.float32).view(4, 4)
    product = view.detach().requires_grad_(True).matmul(torch.ones(4, 4, requires_grad=True)).sum()  # keeps the view
    address = memory.data_ptr()
    del memory, view
    assert arena.missing([1000]) > 0
    del product
    assert arena.missing([1000]) <= 0
    again, _ = arena.take(1000)
    assert again.data_ptr() == address  # it was used before
    del again
    other, _ = arena.take(500)
    assert arena.used + arena.kept <= 1024 and len(other) == 500


def test_blocks_taken_in_inference_mode_are_plain_tensors():
    arena = Arena(1024, torch.device("cpu"), False, Streams(torch.device("cpu")))
    with torch.inference_mode():
        memory, _ = arena.take(64)
    assert not memory.is_inference()


def test_first_use_in_inference_mode_and_then_with_gradients(folder, size, rows):
    model, _ = make(folder, size, 4)
    with torch.inference_mode():
        check(model, rows, ["a0"])
    model(**left_padded(1), adapter_ids=["a0"]).logits.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_default_dtypes(folder, size, rows, dtype):
    model, _ = make(folder, size, 4)
    torch.set_default_dtype(dtype)
    try:
        actual = ask(model, ["a0", "a1"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(actual[0], rows["a0"])
    assert_close(actual[1], rows["a1"])


def test_matrices_that_do_not_lie_at_multiples_of_sixteen_bytes(tmp_path):
    """Ranks of one and three, files of 16 bits, and a layout with gaps."""
    config = LoraConfig(
        r=3, rank_pattern={"v_proj": 1}, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False
    )
    folder = save(tmp_path / "odd", config)
    save_file({key: value.half() for key, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    for dtype in (None, "file"):
        model = base_model()
        store = peft_multibatch.enable(model).adapter_store(dtype=dtype)
        store.register("odd", folder)
        layer_names = store.adapters([0])[0].version.layout.layers
        for name, stored in layer_names.items():
            assert stored.lora_a.start % 16 == stored.lora_b.start % 16 == 0
            layer = next(each for each in store._model.names if store._model.names[each] == name)
            part = store.adapters([0])[0].parts([layer])[0]
            file = load_file(folder / WEIGHTS)[f"base_model.model.{name}.lora_B.weight"]
            assert torch.equal(part.lora_b, file.to(part.lora_b.dtype))
            assert part.lora_b.data_ptr() % 16 == 0
        if dtype is None:
            with by_peft(base_model(), folder) as reference:
                wanted = logits(reference, left_padded(2))
            assert_close(logits(model, left_padded(2), adapter_ids=["odd", "odd"]), wanted)


def test_disable_ends_calls_that_wait_for_adapters(folder, size, monkeypatch):
    """Loads that haven't begun are cancelled, so that waiting for them would take until the timeout."""
    model, _ = make(folder, size, COUNT, timeout=60.0)
    go, read = threading.Event(), transfers.read_weights
    monkeypatch.setattr(transfers, "read_weights", lambda *args: (go.wait(60), read(*args)))
    count, caught = transfers.READERS + 2, []
    inputs = {key: value[:1].repeat(count, 1) for key, value in left_padded(1).items()}

    def call():
        try:
            logits(model, inputs, adapter_ids=[f"a{number}" for number in range(count)])
        except errors.NotEnabledError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        time.sleep(0.3)
        assert thread.is_alive()
        peft_multibatch.disable(model)
        thread.join(10)
        assert not thread.is_alive() and "disabled while a call waited" in str(caught[0])
    finally:
        go.set()


def test_memory_that_runs_out_before_the_limit(folder, size, rows, monkeypatch):
    """The limit is the user's, and other things may have taken the memory."""
    model, store = make(folder, size, COUNT)
    inputs = left_padded(1)

    def fails(self, size):
        raise MemoryError("Unable to allocate")

    with monkeypatch.context() as patch:
        patch.setattr(Arena, "_make", fails)
        for _ in range(2):
            with pytest.raises(errors.StoreFullError, match=r"couldn't be allocated on cpu \(MemoryError: Unable"):
                logits(model, inputs, adapter_ids=["a1"])
            assert store.stats().host_bytes == 0
    assert_close(logits(model, inputs, adapter_ids=["a1"])[0], rows["a1"])


def test_the_cost_of_a_lease_does_not_grow_with_the_adapters_in_memory(folder, size, rows):
    """Continuous batching leases adapters in every step."""

    class NotIterated(OrderedDict):
        def __iter__(self):
            raise AssertionError("all adapters in memory were looked at")

    model, store = make(folder, size, COUNT)
    check(model, rows, ["a0", "a1"])
    tier = store._loader.final
    tier._kept = NotIterated(tier._kept.items())
    (adapter,) = store.lease([store._names.ids["a0"]], Turn(), since=None)
    assert adapter.name == "a0"


def arena_for(count):
    return Arena(count * size_class(4096), torch.device("cpu"), False, Streams(torch.device("cpu")))


class Fake:
    """A version that isn't in use."""

    adapter = None
    layout = SimpleNamespace(size=4096)

    def __init__(self, is_pinned=False):
        self.is_pinned = is_pinned


def test_the_cost_of_an_eviction_does_not_grow_with_the_adapters_in_memory(monkeypatch):
    looked, is_used = [], Tier._is_used
    monkeypatch.setattr(Tier, "_is_used", lambda tier, version: looked.append(version) or is_used(tier, version))
    tier = Tier(arena_for(100))
    pinned, others = [Fake(True) for _ in range(3)], [Fake() for _ in range(297)]
    for each in [*pinned, *others]:
        assert tier.make_room([4096], set(), lambda: None)
        tier.put(each, tier.take(4096)[0])
    assert tier.evictions == 200 and tier.versions() == [*pinned, *others[200:]]
    assert len(looked) <= 200 * 4


def test_nothing_is_evicted_where_that_would_not_make_enough_room(folder, size, rows, tmp_path):
    model, store = make(folder, size, 4)
    save(tmp_path / "big", LoraConfig(r=12, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    store.register("big", tmp_path / "big")
    check(model, rows, ["a1", "a2", "a3", "a4"])
    running = store.adapters([store._names.ids[name] for name in ("a1", "a2")])
    store.prefetch("big")
    assert in_memory(store) == {"a1", "a2", "a3", "a4"} and store.stats().evictions == 0
    del running
    ask(model, ["big"])
    assert "big" in in_memory(store)


def test_an_adapter_that_is_unpinned_was_used_when_it_was(folder, size, rows):
    model, store = make(folder, size, 4)
    store.pin("a0")
    for number in range(1, 5):  # evicts a1
        check(model, rows, [f"a{number}"])
    store.pin("a0", False)
    check(model, rows, ["a5"])
    assert in_memory(store) == {"a2", "a3", "a4", "a5"}


def test_a_version_that_is_replaced_while_it_is_pinned(folder, size, rows, monkeypatch):
    model, store = make(folder, size, 4, timeout=20)
    begun, go, read = threading.Event(), threading.Event(), transfers.read_weights
    monkeypatch.setattr(transfers, "read_weights", lambda *args: (begun.set(), go.wait(20), read(*args)))
    with ThreadPoolExecutor(1) as thread:
        pinning = thread.submit(store.pin, "a0")
        assert begun.wait(20)
        store.register("a0", folder / "a1")
        go.set()
        pinning.result(20)
    assert store.stats().pinned == 1 and store.is_loaded(store._names.ids["a0"])
    store.register("a0", folder / "a2")
    assert store.stats().pinned == 1
    store.register("a0", folder / "a2", pin=False)
    assert store.stats().pinned == 0
    assert_close(ask(model, ["a0"])[0], rows["a2"])


def test_threads_that_cannot_be_started(folder, size, rows, monkeypatch):
    model, store = make(folder, size, COUNT, timeout=20)
    start, left = threading.Thread.start, [3]

    def fail(thread):
        if thread.name.startswith("peft_multibatch_store") and left[0]:
            left[0] -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    for _ in range(3):
        with pytest.raises(errors.StoreFullError, match=r"'a0' can't be loaded, because no thread can be started"):
            ask(model, ["a0"])
    gc.collect()
    assert store.stats().host_bytes == 0
    check(model, rows, ["a0", "a1", "a2"])
    assert store.stats().loads == 3


@pytest.mark.parametrize("name", [None, 1, ["a1"]], ids=repr)
def test_names_that_are_none(folder, size, name):
    _, store = make(folder, size, 2)
    for method in (store.pin, store.unregister, store.prefetch):
        with pytest.raises(errors.UnknownAdapterError, match="no adapter of the store"):
            method(name)
    assert name not in store
