"""Requests of stored adapters start once these are in memory, and no other request waits for that."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from batching import DEVICE, Simulation, generation, prompts, results, settings
from models import base_model, lora_configs, peft_model
from peft import LoraConfig, get_peft_model
from stored import WEIGHTS, by_peft, edit_tensors, save, save_many
from threads import eventually
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import RequestState

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.adapters.store import transfers
from peft_multibatch.adapters.store.arena import Arena, size_class
from peft_multibatch.adapters.store.loading import Loader
from peft_multibatch.adapters.store.streams import Streams
from peft_multibatch.adapters.store.tier import Tier
from peft_multibatch.continuous import stored
from peft_multibatch.continuous.scheduler import KEY, FairScheduler


COUNT = 12
SIZE = size_class(4 * 2 * 2 * 4 * (48 + 36))  # two layers, q and v of rank 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    save_many(path, COUNT)
    return path


@pytest.fixture(scope="module")
def inputs():
    return prompts(6)


@pytest.fixture(scope="module")
def texts(folder, inputs):
    """PEFT's tokens for every prompt and adapter."""

    def generate(model):
        return [
            model.generate(
                input_ids=torch.tensor([prompt], device=DEVICE),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=DEVICE),
                generation_config=generation(),
            )[0, len(prompt) :].tolist()
            for prompt in inputs
        ]

    base = base_model().to(DEVICE)
    found = {"__base__": generate(base)}
    for number in range(COUNT):
        with by_peft(base, folder / f"a{number}") as model:
            found[f"a{number}"] = generate(model)
    return found


@pytest.fixture
def make(folder):
    handles = []

    def make(room, model=None):
        model = base_model().to(DEVICE) if model is None else model
        mb = peft_multibatch.enable(model)
        store = mb.adapter_store(room * SIZE, room * SIZE, timeout=20)
        store.register_folder(folder)
        handles.append(mb)
        return mb, store

    make.folder = folder
    yield make
    for mb in handles:
        mb.disable()


def serve(mb, **options):
    return mb.continuous_batching(
        generation_config=generation(), continuous_batching_config=settings(**options), warmup=False
    )


def test_texts_are_those_of_peft(make, inputs, texts):
    mb, store = make(room=COUNT)
    names = ["a0", "__base__", "a1", "a2", "a0", "__base__"]
    with serve(mb) as manager:
        requests = manager.add_requests(inputs, adapter_ids=names)
        found = results(manager, len(inputs))
        for row, (request, name) in enumerate(zip(requests, names)):
            assert found[request].generated_tokens == texts[name][row]
        assert store.stats().hits + store.stats().misses == 4  # each request counts once, whatever its number of steps
        assert store.stats().loads == 3
        again = manager.add_requests(inputs[:3], adapter_ids=["a1", "a1", {"a0": 1, "a2": 1}])
        found = results(manager, 3)
        assert all(found[request].error is None for request in again)
        assert store.stats().hits + store.stats().misses == 8 and store.stats().loads == 3


def test_generate_batch(make, inputs, texts):
    mb, _ = make(room=3)
    names = ["a3", "__base__", "a4", "a5", "a6", "a3"]
    outputs = mb._inner.generate_batch(
        inputs, adapter_ids=names, generation_config=generation(), continuous_batching_config=settings()
    )
    for row, (output, name) in enumerate(zip(outputs.values(), names)):
        assert output.generated_tokens == texts[name][row]


def test_more_adapters_than_there_is_room_for(make, inputs, texts):
    mb, store = make(room=2)
    generator = random.Random(0)
    wanted = [(generator.randrange(6), f"a{generator.randrange(COUNT)}") for _ in range(40)]
    with serve(mb) as manager:
        requests = [manager.add_request(inputs[row], adapter_id=name) for row, name in wanted]
        found = results(manager, len(wanted), timeout=120)
    for request, (row, name) in zip(requests, wanted):
        assert found[request].error is None
        assert found[request].generated_tokens == texts[name][row]
    assert store.stats().evictions >= COUNT - 2


def test_mixtures_and_adapters_of_peft(make, folder, inputs, texts):
    model = get_peft_model(base_model(), lora_configs()["three"], adapter_name="p").to(DEVICE).eval()
    mb, _ = make(3, model)
    entries = ["p", {"p": 0.5, "a1": 0.5}, "a1", {"a2": 0.7, "a3": -0.3}, "__base__", "a1"]
    expected = [
        model.generate(
            input_ids=torch.tensor([prompt], device=DEVICE), adapter_ids=[entry], generation_config=generation()
        )[0, len(prompt) :].tolist()
        for prompt, entry in zip(inputs, entries)
    ]
    assert expected[2] == texts["a1"][2]
    with serve(mb) as manager:
        requests = manager.add_requests(inputs, adapter_ids=entries)
        found = results(manager, len(inputs))
    assert [found[request].generated_tokens for request in requests] == expected


def test_a_request_whose_adapter_is_slow_holds_up_nobody(make, inputs, texts, monkeypatch):
    mb, _ = make(room=4)
    read, go = transfers.read_weights, threading.Event()

    def slow(name, *args):
        if name == "a0":
            go.wait(20)
        read(name, *args)

    monkeypatch.setattr(transfers, "read_weights", slow)
    with serve(mb) as manager:
        waiting = manager.add_request(inputs[0], adapter_id="a0")
        others = [manager.add_request(inputs[row], adapter_id="a1") for row in range(1, 4)]
        found = results(manager, 3)
        assert set(found) == set(others)
        go.set()
        found |= results(manager, 1)
    assert found[waiting].generated_tokens == texts["a0"][0]
    assert [found[name].generated_tokens for name in others] == texts["a1"][1:4]


def test_an_adapter_that_cannot_be_loaded_is_its_own_requests_fault(make, folder, inputs, texts, tmp_path):
    mb, store = make(room=4)
    own = shutil.copytree(folder / "a0", tmp_path / "own")
    store.register("own", own)
    (own / WEIGHTS).unlink()
    names = ["a1", "own", "__base__", "own", "a2", "a1"]
    with serve(mb) as manager:
        requests = manager.add_requests(inputs, adapter_ids=names)
        found = results(manager, len(inputs))
        for row, (request, name) in enumerate(zip(requests, names)):
            if name == "own":
                assert "can't be opened any more" in found[request].error and not found[request].generated_tokens
            else:
                assert found[request].generated_tokens == texts[name][row]
        store.register("own", folder / "a3")
        request = manager.add_request(inputs[0], adapter_id="own")
        assert results(manager, 1)[request].generated_tokens == texts["a3"][0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_numbers_that_are_none_end_their_own_requests(make, folder, inputs, texts, tmp_path, value):
    mb, store = make(room=4)
    own = shutil.copytree(folder / "a0", tmp_path / "own")
    edit_tensors(own, lambda tensors: {key: each.sign() * value for key, each in tensors.items()})
    store.register("own", own)
    names = ["a1", "own", "__base__", "own", "a2", "a1"]
    with serve(mb) as manager:
        requests = manager.add_requests(inputs, adapter_ids=names)
        found = results(manager, len(inputs))
    for row, (request, name) in enumerate(zip(requests, names)):
        if name == "own":
            assert "non-finite logits" in found[request].error
        else:
            assert found[request].error is None and found[request].generated_tokens == texts[name][row]


def test_files_that_change_while_requests_wait(make, folder, inputs, texts, tmp_path):
    """Each fails alone, and the others continue; registered again, the name works again."""
    mb, store = make(room=4)
    names = [f"own{number}" for number in range(4)]
    for name in names:
        shutil.copytree(folder / "a0", tmp_path / name)
        store.register(name, tmp_path / name)
    weights = [tmp_path / name / WEIGHTS for name in names]
    weights[0].write_bytes(weights[0].read_bytes()[:-4])
    os.utime(weights[1])
    weights[2].unlink()
    weights[2].mkdir()
    with serve(mb) as manager:
        requests = manager.add_requests(inputs, adapter_ids=[*names, "a1", "__base__"])
        found = results(manager, len(inputs))
        for request in requests[:3]:
            assert "own" in found[request].error and not found[request].generated_tokens
        for row, name in ((3, "a0"), (4, "a1"), (5, "__base__")):
            assert found[requests[row]].generated_tokens == texts[name][row]
        store.register("own1", tmp_path / "own1")
        request = manager.add_request(inputs[1], adapter_id="own1")
        assert results(manager, 1)[request].generated_tokens == texts["a0"][1]


def test_batches_on_other_threads_that_want_more_than_half_of_the_room(make, inputs, texts):
    """Requests hold adapters meanwhile; all batches finish."""
    mb, _ = make(room=3)
    failures = []

    def generate(seed):
        generator = random.Random(seed)
        try:
            for _ in range(6):
                row, names = generator.randrange(6), [f"a{each}" for each in generator.sample(range(COUNT), 2)]
                found = mb._inner.generate(
                    input_ids=torch.tensor([inputs[row]] * 2, device=DEVICE), generation_config=generation(),
                    attention_mask=torch.ones(2, len(inputs[row]), dtype=torch.long, device=DEVICE), adapter_ids=names,
                )  # fmt: skip
                assert found[:, len(inputs[row]) :].tolist() == [texts[name][row] for name in names]
        except BaseException as error:
            failures.append(error)

    generator = random.Random(9)
    wanted = [(generator.randrange(6), f"a{generator.randrange(COUNT)}") for _ in range(40)]
    threads = [threading.Thread(target=generate, args=(seed,)) for seed in range(4)]
    with serve(mb) as manager:
        for thread in threads:
            thread.start()
        requests = [manager.add_request(inputs[row], adapter_id=name) for row, name in wanted]
        found = results(manager, len(wanted), timeout=120)
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and failures == []
    for request, (row, name) in zip(requests, wanted):
        assert found[request].error is None and found[request].generated_tokens == texts[name][row]


def whole_room(mb, inputs, names):
    row = torch.tensor([inputs[0]] * len(names), device=DEVICE)
    found = mb._inner.generate(
        input_ids=row, attention_mask=torch.ones_like(row), generation_config=generation(), adapter_ids=names
    )
    return found[:, len(inputs[0]) :].tolist()


@pytest.mark.parametrize("is_stopped", [False, True], ids=["idle", "stopped"])
def test_requests_that_ended_hold_no_memory(make, inputs, texts, is_stopped):
    """Even if no other request follows: a batch that needs all of the memory gets it."""
    mb, _ = make(room=2)
    with serve(mb) as manager:
        requests = [manager.add_request(inputs[row], adapter_id=f"a{row}") for row in range(2)]
        found = results(manager, 2)
        assert [found[request].generated_tokens for request in requests] == [texts["a0"][0], texts["a1"][1]]
        if is_stopped:
            manager.stop(block=True)
        assert whole_room(mb, inputs, ["a2", "a3"]) == [texts["a2"][0], texts["a3"][0]]


def waiting(mb, name, inputs, request="r"):
    number = mb._registry.names.ids[name] if name != "__base__" else -1
    return RequestState(request, inputs[0], logit_processor_kwargs={KEY: number})


def ready(requests, states, scheduler):
    """The requests that may run now of those that wait, in order of arrival."""
    queue = FairScheduler()
    scheduler.waiting_requests = {state.request_id: state for state in states}
    for state in states:
        queue.add(state)
    queue.update(scheduler.waiting_requests, ())
    return requests.ready(queue, set(), scheduler)


def begin_all(requests, states, scheduler):
    begin = time.monotonic()
    while ready(requests, states, scheduler) != states:
        assert time.monotonic() - begin < 20


def test_sequences_that_were_forked_hold_their_adapter(make, inputs, texts):
    """Even after the request that they were forked from has ended."""
    mb, store = make(room=1)
    requests = stored.StoredRequests(mb._registry, None)
    scheduler = SimpleNamespace(active_requests={}, max_requests_per_batch=4)
    number = mb._registry.names.ids["a0"]
    state = RequestState("r", inputs[0], num_children=1, logit_processor_kwargs={KEY: number})
    begin_all(requests, [state], scheduler)
    requests.keep({"r__child#0"}, ())
    store.prefetch("a1")
    assert store.stats().loads == 1 and store.stats().evictions == 0
    requests.keep({"another"}, ())
    assert whole_room(mb, inputs, ["a1"]) == [texts["a1"][0]]


def test_requests_without_room_look_for_it_once_a_turn(make, inputs, monkeypatch):
    """Looking for room is slow, and no step runs meanwhile."""
    mb, _ = make(room=2)
    requests = stored.StoredRequests(mb._registry, None)
    scheduler = SimpleNamespace(active_requests={}, max_requests_per_batch=8)

    def states(first, stop):
        ids = [mb._registry.names.ids[f"a{number}"] for number in range(first, stop)]
        return [RequestState(f"r{number}", inputs[0], logit_processor_kwargs={KEY: number}) for number in ids]

    running = states(0, 2)
    begin_all(requests, running, scheduler)
    scheduler.active_requests = {state.request_id: state for state in running}
    looked, make_room = [], Tier.make_room
    monkeypatch.setattr(Tier, "make_room", lambda *args: looked.append(args) or make_room(*args))
    for turn in range(1, 4):
        assert ready(requests, states(2, 8), scheduler) == []
        assert len(looked) == turn


def test_a_step_does_as_much_whatever_waits(make, folder, inputs):
    """Counted in calls of functions: 100 and 2,000 waiting requests, each with an adapter of its own."""
    mb, store = make(room=4)
    for number in range(2000):
        store.register(f"x{number}", folder / f"a{number % COUNT}")

    def calls(count):
        found = []
        with serve(mb, max_requests_per_batch=4) as manager:
            manager.add_request(inputs[0], adapter_id="a0", max_new_tokens=2)
            results(manager, 1)
            with manager._changes.lock:  # no step runs
                scheduler = manager.batch_processor.scheduler
                for number in range(count):
                    scheduler.add_waiting_request(waiting(mb, f"x{number}", inputs, number))
                for _ in range(3):  # the first ones see all requests for the first time
                    found.append(0)

                    def note(frame, event, argument):
                        found[-1] += event in ("call", "c_call")

                    sys.setprofile(note)
                    try:
                        manager._fail_hopeless()
                        manager.batch_processor.scheduler._get_waiting_candidates()
                    finally:
                        sys.setprofile(None)
                scheduler.waiting_requests.clear()
                scheduler.waiting_requests_order.clear()
        return found[-1]

    few, many = max(calls(100) for _ in range(3)), min(calls(2000) for _ in range(3))  # loads end at any time
    assert many < 1.5 * few < 5000, (few, many)


def test_a_request_that_runs_and_waits_at_once_is_not_chosen(make, inputs):
    """As in transformers 5.17, if a step had no room for a request whose first tokens were in the cache."""
    mb, _ = make(room=2)
    with serve(mb) as manager:
        manager.add_request(inputs[0], adapter_id="a0", max_new_tokens=1)
        results(manager, 1)
        with manager._changes.lock:  # no step runs
            scheduler = manager.batch_processor.scheduler
            states = [waiting(mb, "__base__", inputs, name) for name in ("one", "two")]
            for state in states:
                scheduler.add_waiting_request(state)
            scheduler.active_requests["one"] = states[0]
            assert scheduler._get_waiting_candidates() == states[1:]
            scheduler.active_requests.clear()
            scheduler.waiting_requests.clear()
            scheduler.waiting_requests_order.clear()


def test_all_requests_that_became_hopeless_fail_at_once(inputs):
    """An adapter that continuous batching can't run replaces another one while 200 requests wait for it."""
    model = peft_model().to(DEVICE)
    mb = peft_multibatch.enable(model)
    with serve(mb, max_requests_per_batch=2) as manager:
        with manager._changes.lock:  # no step runs
            names = [manager.add_request(inputs[0], adapter_id="eight", max_new_tokens=9) for _ in range(200)]
        first = manager.get_result(timeout=20)
        with manager.changing("eight"):
            model.peft_config["eight"].alora_invocation_tokens = [1]
        seen, ready = [], manager._stored.ready
        manager._stored.ready = lambda *args: (seen.append(1), ready(*args))[1]
        found = results(manager, len(names) - first.is_finished(), 60)
        failed = [name for name in found if found[name].error]
        assert len(failed) > 150 and all("is an aLoRA" in found[name].error for name in failed)
        assert len(seen) <= 3


def test_a_request_that_fails_before_the_first_step_takes_none_with_it(make, inputs, texts):
    mb, _ = make(room=2)
    with serve(mb) as manager:
        with manager._changes.lock:  # no step runs
            wrong = manager.add_request(inputs[0], adapter_id="a0", max_new_tokens=10_000)
            right = manager.add_request(inputs[1], adapter_id="a0")
        found = results(manager, 2)
    assert "but the cache holds" in found[wrong].error
    assert found[right].generated_tokens == texts["a0"][1]


def test_a_mixture_that_never_has_room(make, inputs, texts):
    mb, _ = make(room=2)
    with serve(mb) as manager:
        wrong = manager.add_request(inputs[0], adapter_id={"a0": 1, "a1": 1, "a2": 1})
        right = manager.add_request(inputs[1], adapter_id="a0")
        found = results(manager, 2)
    assert "names 3 stored adapters" in found[wrong].error
    assert found[right].generated_tokens == texts["a0"][1]


@pytest.mark.parametrize("uses_graphs", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_every_answer_is_wholly_of_one_version(make, folder, inputs, texts, uses_graphs):
    """A name is registered again whenever one of its requests has run."""
    mb, store = make(room=4)
    stop, swaps = threading.Event(), [0]

    def swap():
        while not stop.is_set():
            for other in ("a1", "a2"):
                before, deadline = manager.served.get("a0"), time.monotonic() + 5
                store.register("a0", folder / other)
                swaps[0] += 1
                # requests never begin if an adapter is replaced before it has been loaded
                while not stop.is_set() and manager.served.get("a0") == before and time.monotonic() < deadline:
                    time.sleep(0.001)

    with serve(mb, use_cuda_graph=uses_graphs) as manager:
        store.register("a0", folder / "a1")
        thread = threading.Thread(target=swap)
        thread.start()
        try:
            requests = {manager.add_request(inputs[row % 6], adapter_id="a0"): row % 6 for row in range(24)}
            others = {manager.add_request(inputs[row], adapter_id="a3"): row for row in range(6)}
            found = results(manager, 30, timeout=120)
        finally:
            stop.set()
            thread.join(30)
    assert not thread.is_alive() and swaps[0] > 2
    for request, row in requests.items():
        assert found[request].generated_tokens in (texts["a1"][row], texts["a2"][row])
    for request, row in others.items():
        assert found[request].generated_tokens == texts["a3"][row]


def test_unregistering_waits_for_those_that_have_begun(make, inputs, texts):
    mb, store = make(room=4)
    with serve(mb) as manager:
        first = manager.add_request(inputs[0], adapter_id="a0", max_new_tokens=30)
        deadline = time.monotonic() + 20
        while not manager.served.get("a0") and time.monotonic() < deadline:
            time.sleep(0.001)
        store.unregister("a0")
        second = manager.add_request(inputs[1], adapter_id="a0")
        found = results(manager, 2)
    assert found[first].error is None and len(found[first].generated_tokens) == 30
    assert found[first].generated_tokens[:8] == texts["a0"][0]
    assert "no adapter has this name" in found[second].error


def test_prefixes_are_shared_under_one_version_alone(make, folder, texts):
    mb, store = make(room=4)
    prompt = [5, 6, 7] * 20
    with serve(mb, allow_block_sharing=True) as manager:

        def ask(name):
            before = manager.prefix_hits
            request = manager.add_request(prompt, adapter_id=name)
            return results(manager, 1)[request].generated_tokens, manager.prefix_hits - before

        first, hits = ask("a0")
        assert hits == 0
        again, hits = ask("a0")
        assert again == first and hits
        for number in range(1, 6):  # evicts it
            ask(f"a{number}")
        again, hits = ask("a0")
        assert again == first and hits
        store.register("a0", folder / "a6")
        other, hits = ask("a0")
        assert hits == 0
        assert other == ask("a6")[0]


# Order of requests.


def test_a_flood_of_cold_adapters_neither_starves_nor_thrashes_the_others(make, folder, inputs, texts, monkeypatch):
    """One tenant requests 120 adapters that aren't in memory, another one the same adapter 40 times."""
    mb, store = make(room=8)
    cold = {f"cold{number}": f"a{number % COUNT}" for number in range(120)}
    for name, adapter in cold.items():
        store.register(name, folder / adapter)
    loads = []
    read = transfers.read_weights

    def slow(name, *args):
        loads.append(name)
        time.sleep(0.02)
        read(name, *args)

    monkeypatch.setattr(transfers, "read_weights", slow)
    rows, order = {}, []
    with serve(mb, max_requests_per_batch=4) as manager:
        hot = manager.add_request(inputs[0], adapter_id="a0")
        assert results(manager, 1)[hot].generated_tokens == texts["a0"][0]
        # all at once, so that there is always one of each, however long this thread doesn't run
        for name, source in [*cold.items(), *[("a0", "a0")] * 40]:
            row = len(rows) % len(inputs)
            rows[manager.add_request(inputs[row], adapter_id=name)] = name, texts[source][row]
        for name, output in results(manager, len(rows), 120).items():
            adapter, tokens = rows[name]
            assert output.generated_tokens == tokens
            order.append(adapter)
    assert loads.count("a0") == 1  # it was never evicted
    places = [place for place, adapter in enumerate(order) if adapter == "a0"]
    assert max(after - before for before, after in itertools.pairwise(places)) <= 12, places


def test_an_adapter_that_finds_no_room_has_its_turn(make, inputs, texts, monkeypatch):
    """Two adapters with an endless stream of requests occupy all of the memory."""
    monkeypatch.setattr(stored, "STARVED", 0.2)
    mb, _ = make(room=2)
    with serve(mb, max_requests_per_batch=4) as manager:
        hot = {manager.add_request(inputs[0], adapter_id=f"a{number % 2}"): number % 2 for number in range(8)}
        cold, deadline = None, time.monotonic() + 60
        for served in itertools.count():
            output = manager.get_result(timeout=1)
            assert time.monotonic() < deadline
            if output is None or not output.is_finished():
                continue
            if output.request_id == cold:
                assert output.generated_tokens == texts["a2"][1]
                break
            number = hot.pop(output.request_id)
            assert output.generated_tokens == texts[f"a{number}"][0]
            hot[manager.add_request(inputs[0], adapter_id=f"a{number}")] = number
            if served >= 8 and cold is None:
                cold = manager.add_request(inputs[1], adapter_id="a2")
        found = results(manager, 8)
        assert all(found[name].generated_tokens == texts[f"a{number}"][0] for name, number in hot.items())


def test_steps_dont_wait_for_locks_that_loads_hold(make, inputs, monkeypatch):
    """Otherwise a loading thread that waits for the GIL would hold up all running requests."""
    mb, store = make(room=4)
    begun, is_held, are_loaded = threading.Event(), threading.Event(), []
    keep = stored.StoredRequests.keep

    def stops_once(requests, active, waiting):
        keep(requests, active, waiting)
        if len(active) == 3 and are_loaded and not begun.is_set():
            begun.set()
            is_held.wait(20)

    monkeypatch.setattr(stored.StoredRequests, "keep", stops_once)
    with serve(mb) as manager:
        for number in range(3):
            manager.add_request(inputs[number], adapter_id=f"a{number}", max_new_tokens=1)
        results(manager, 3)
        are_loaded.append(True)
        with manager._changes.lock:  # no step runs
            for number in range(3):
                manager.add_request(inputs[number], adapter_id=f"a{number}", max_new_tokens=3 if number else 30)
        assert begun.wait(20)
        (longest,) = (
            state for state in manager.batch_processor.scheduler.active_requests.values() if state.max_new_tokens == 30
        )
        with store._lock, store._loader.transfers.readers._lock:
            is_held.set()
            assert eventually(lambda: len(longest.generated_tokens) > 20, 20)  # the others have ended
        assert not [each for each in results(manager, 3).values() if each.error]


def test_the_adapter_that_was_used_least_recently_is_evicted(make, inputs):
    mb, store = make(room=3)
    with serve(mb) as manager:
        for number in (0, 1, 2, 0, 3):
            manager.add_request(inputs[0], adapter_id=f"a{number}")
            results(manager, 1)
    assert [store.is_loaded(store._names.ids[f"a{number}"]) for number in range(4)] == [True, False, True, True]


def test_an_adapter_is_used_until_its_request_ends(make, inputs):
    mb, store = make(room=3)
    requests = stored.StoredRequests(mb._registry, None)
    scheduler = SimpleNamespace(active_requests={}, max_requests_per_batch=4)
    begin_all(requests, [waiting(mb, f"a{number}", inputs, number) for number in range(3)], scheduler)
    requests.keep({0, 2}, ())
    requests.keep({0}, ())
    requests.keep((), ())
    store.prefetch("a3")
    assert [store.is_loaded(store._names.ids[f"a{number}"]) for number in range(3)] == [True, False, True]


def test_a_request_that_waits_for_its_turn_lets_go_of_a_version_that_was_replaced(make, folder, inputs):
    mb, store = make(room=1)
    requests = stored.StoredRequests(mb._registry, None)
    scheduler = SimpleNamespace(active_requests={}, max_requests_per_batch=4)
    states = [waiting(mb, "a0", inputs)]
    begin_all(requests, states, scheduler)
    store.register("a0", folder / "a1")
    begin_all(requests, states, scheduler)
    (adapter,) = requests._leases["r"].adapters
    assert adapter.version.path == str(folder / "a1" / WEIGHTS)


def test_a_request_that_failed_to_load_leaves_nothing_to_another_of_the_same_id(make, folder, inputs, tmp_path):
    mb, store = make(room=1)
    shutil.copytree(folder / "a0", tmp_path / "broken")
    store.register("broken", tmp_path / "broken")
    os.truncate(tmp_path / "broken" / WEIGHTS, 100)
    requests = stored.StoredRequests(mb._registry, None)
    scheduler = SimpleNamespace(active_requests={}, max_requests_per_batch=4)
    states, begin = [waiting(mb, "broken", inputs)], time.monotonic()
    while not requests.failed:
        assert ready(requests, states, scheduler) == [] and time.monotonic() - begin < 20
    states = [waiting(mb, "__base__", inputs)]
    assert ready(requests, states, scheduler) == states


def test_an_adapter_that_moves_to_peft_while_a_request_waits_for_it(make, folder, inputs, texts, monkeypatch):
    go, read = threading.Event(), transfers.read_weights
    monkeypatch.setattr(transfers, "read_weights", lambda *args: (go.wait(20), read(*args))[1])
    model = get_peft_model(base_model().to(DEVICE), lora_configs()["three"], adapter_name="another").eval()
    mb, store = make(4, model)
    with serve(mb) as manager:
        request = manager.add_request(inputs[0], adapter_id="a1")
        assert eventually(lambda: request in manager._stored._loaded, 20)
        with manager.changing("a1"):
            store.unregister("a1")
            model.load_adapter(str(folder / "a1"), "a1")
        go.set()
        assert results(manager, 1)[request].generated_tokens == texts["a1"][0]


def test_adapters_begin_to_load_when_a_request_is_queued(make, inputs, texts, monkeypatch):
    """It doesn't wait for the running step to end; the request still counts as a miss."""
    mb, store = make(room=4)
    begun = threading.Event()
    read = transfers.read_weights
    monkeypatch.setattr(transfers, "read_weights", lambda *args: (begun.set(), read(*args))[1])
    with serve(mb) as manager:
        request = manager.add_request(inputs[0], adapter_id="__base__")
        results(manager, 1)
        with manager._changes.lock:  # no step runs
            request = manager.add_request(inputs[1], adapter_id="a3")
            assert begun.wait(20)
        assert results(manager, 1)[request].generated_tokens == texts["a3"][1]
    assert (store.stats().hits, store.stats().misses) == (0, 1)


@pytest.mark.parametrize("has_memory", [False, True], ids=["one tier", "two tiers"])
def test_adapters_are_loaded_ahead_for_requests_that_come_next(make, inputs, texts, monkeypatch, has_memory):
    """While others have all places; into host memory if there is no more room where calls compute."""
    monkeypatch.setattr(Streams, "has_memory", has_memory)  # a device with memory of its own
    model = base_model().to(DEVICE)
    mb = peft_multibatch.enable(model)
    store = mb.adapter_store(6 * SIZE, SIZE if has_memory else 6 * SIZE, timeout=20)
    store.register_folder(make.folder)
    read, done = transfers.read_weights, {}
    monkeypatch.setattr(
        transfers, "read_weights", lambda *args: (read(*args), done.setdefault(args[0], threading.Event()).set())[0]
    )
    done["a1"] = threading.Event()
    with serve(mb, max_requests_per_batch=1) as manager:
        manager.add_request(inputs[0], adapter_id="__base__")
        results(manager, 1)
        with manager._changes.lock:  # the next turn sees both
            first = manager.add_request(inputs[0], adapter_id="a0", max_new_tokens=400)
            second = manager.add_request(inputs[1], adapter_id="a1")
        assert done["a1"].wait(20)
        assert manager.get_result(timeout=0.01) is None  # the first one still runs
        manager.cancel_request(first)
        assert results(manager, 2)[second].generated_tokens == texts["a1"][1]
    mb.disable()


def test_cold_adapters_have_every_place_where_nobody_else_wants_one(make, inputs, texts):
    mb, _ = make(room=8)
    most = 0
    with serve(mb, max_requests_per_batch=4) as manager:
        requests = [manager.add_request(inputs[0], adapter_id=f"a{number}") for number in range(COUNT)]
        while len(manager.served) < COUNT:
            active = getattr(manager.batch_processor, "scheduler", None)
            most = max(most, len(active.active_requests) if active is not None else 0)
            time.sleep(0.0005)
        found = results(manager, COUNT)
    assert most == 4
    assert [found[name].generated_tokens for name in requests] == [texts[f"a{n}"][0] for n in range(COUNT)]


def test_adapters_without_end_do_not_starve_one_that_was_served_before():
    """A simulation in which requests for new adapters arrive twice as fast as any are served."""
    queue, turns = Simulation(), []
    queue.arrive(0)
    for step in range(200):
        entry = queue.serve()
        if entry == 0:
            turns.append(step)
            queue.arrive(0)
        for each in range(2):
            queue.arrive(1 + 2 * step + each)
    assert len(turns) >= 4, turns


def test_nothing_is_kept_of_requests_that_end_before_they_could_start(make, inputs, texts):
    mb, _ = make(room=2)
    with serve(mb) as manager:
        for number in range(20):
            entry = {f"a{number % 6}": 1 + number / 100, f"a{(number + 1) % 6}": 1}
            manager.add_request(inputs[0], adapter_id=entry, max_new_tokens=100_000)  # more than the cache holds
            assert all("cache holds" in output.error for output in results(manager, 1).values())
        for _ in range(2):
            name = manager.add_request(inputs[0], adapter_id="a8")
            assert results(manager, 1)[name].generated_tokens == texts["a8"][0]
        kept = manager._stored
        assert not any((kept._early, kept._unseen, kept._loaded.keys() - {name}))


def test_memory_that_runs_out_before_the_limit_concerns_one_request(make, inputs, texts, monkeypatch):
    """The limit is the user's, and other things may have taken the memory."""
    mb, store = make(room=COUNT)
    sizes, make_block = [], Arena._make

    def fails_once(self, size):
        sizes.append(size)
        if len(sizes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make_block(self, size)

    monkeypatch.setattr(Arena, "_make", fails_once)
    with serve(mb) as manager:
        requests = [manager.add_request(inputs[row], adapter_id=f"a{row}") for row in range(3)]
        found = results(manager, 3)
        failed = [row for row, request in enumerate(requests) if found[request].error is not None]
        assert len(failed) <= 1  # a load that began early may have been the one to fail, and was tried again
        for row, request in enumerate(requests):
            if row in failed:
                assert "couldn't be allocated" in found[request].error
            else:
                assert found[request].generated_tokens == texts[f"a{row}"][row]
        name = manager.add_request(inputs[4], adapter_id="a4")
        assert results(manager, 1)[name].generated_tokens == texts["a4"][4]
    assert len(sizes) >= 3 and store.stats().host_bytes <= COUNT * SIZE


# Graphs.


def save_wide(folder):
    """Save an adapter on layers that no other adapter has."""
    return save(folder, LoraConfig(r=4, target_modules=["v_proj", "o_proj", "up_proj"], init_lora_weights=False))


def test_memory_that_runs_out_while_adapters_are_loaded_ahead_concerns_nobody(make, inputs, texts, monkeypatch):
    mb, _ = make(room=COUNT)
    look_ahead, make_block, failed, is_ahead = Loader.look_ahead, Arena._make, [], []

    def look(*args):
        is_ahead.append(True)
        try:
            look_ahead(*args)
        finally:
            is_ahead.pop()

    def fail(arena, size):
        if is_ahead and not failed:
            failed.append(size)
            raise MemoryError
        return make_block(arena, size)

    monkeypatch.setattr(Loader, "look_ahead", look)
    monkeypatch.setattr(Arena, "_make", fail)
    with serve(mb, max_requests_per_batch=4) as manager:
        rows = [number % len(inputs) for number in range(COUNT)]
        requests = [manager.add_request(inputs[row], adapter_id=f"a{number}") for number, row in enumerate(rows)]
        found = results(manager, COUNT)
    assert failed
    for number, (row, request) in enumerate(zip(rows, requests)):
        assert found[request].generated_tokens == texts[f"a{number}"][row]


def test_layers_that_came_after_a_graph_was_captured(make, tmp_path):
    """Adapters with weights in these layers can't use the graph; others can, whichever are loaded."""
    mb, store = make(room=COUNT)
    ids, router = store._names.ids, mb._router
    with serve(mb):
        graph = router.graph
        graph.captures.note(is_users=False, components=1)  # simulates a capture
        store.register("wide", save_wide(tmp_path / "wide"))
        assert not graph.outgrown_by(router.plan([ids["a0"], ids["a7"]]))
        assert graph.outgrown_by(router.plan([ids["a1"], ids["wide"]]))
        graph.discard_captures()
        graph.captures.note(is_users=False, components=1)  # captured again
        assert not graph.outgrown_by(router.plan([ids["wide"]]))
        graph.captures.discard()


def test_graphs_that_another_manager_discarded_are_not_used(make, inputs, texts):
    """What is recorded about captures is that of all managers of the model."""
    mb, _ = make(room=COUNT)
    with serve(mb) as one, serve(mb) as other:
        for manager in (one, other):
            manager.add_request(inputs[0], adapter_id="a0")
            results(manager, 1)
        pairs = getattr(one._steps._io, "io_pairs", None)
        places = [one._steps._io] if pairs is None else [pair.device_io for pair in pairs]
        captured = [place.graphs for place in places]
        graph = mb._router.graph
        graph.captures.note(is_users=False, components=1)  # simulates a capture
        with mb._router.routing([0], expands=False) as call:
            graph.discard_captures()  # as the other manager's next step does
            assert not graph.outgrown_by(call.plan) and one._steps._are_discarded()
        name = one.add_request(inputs[1], adapter_id="a0")
        assert results(one, 1)[name].generated_tokens == texts["a0"][1]
        assert not any(place.graphs is known for place, known in zip(places, captured))
        assert not one._steps._are_discarded() and other._steps._are_discarded()


@pytest.mark.gpu
@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_graph_is_captured_because_something_was_loaded(make, folder, inputs, texts, monkeypatch, asynchronous):
    """Four times as many adapters as fit are used repeatedly, after the first round has captured its graphs."""
    captured = []
    begin = torch.cuda.CUDAGraph.capture_begin
    monkeypatch.setattr(
        torch.cuda.CUDAGraph,
        "capture_begin",
        lambda self, *args, **kwargs: (captured.append(1), begin(self, *args, **kwargs))[1],
    )
    mb, store = make(room=3)
    generator = random.Random(0)
    with serve(mb, use_cuda_graph=True, use_async_batching=asynchronous, max_requests_per_batch=3) as manager:
        counts = []
        for _ in range(6):
            before = len(captured)
            wanted = [(row, f"a{generator.randrange(COUNT)}") for row in range(6) for _ in range(6)]
            requests = [manager.add_request(inputs[row], adapter_id=name) for row, name in wanted]
            found = results(manager, len(wanted), timeout=120)
            for request, (row, name) in zip(requests, wanted):
                assert found[request].error is None and found[request].generated_tokens == texts[name][row]
            counts.append(len(captured) - before)
        store.register("again", folder / "a3")  # its shape is known
        request = manager.add_request(inputs[0], adapter_id="again")
        assert results(manager, 1)[request].generated_tokens == texts["a3"][0]
    assert counts[0] > 0 and counts[-2:] == [0, 0], counts  # rounds may meet new shapes, but fewer each time
    assert store.stats().evictions > 4 * COUNT


@pytest.mark.gpu
def test_graphs_have_layers_that_came_later(make, inputs, texts, tmp_path):
    mb, store = make(room=COUNT)
    wide = save_wide(tmp_path / "wide")
    with by_peft(base_model().to(DEVICE), wide) as model:
        wanted = model.generate(
            input_ids=torch.tensor([inputs[1]], device=DEVICE),
            attention_mask=torch.ones(1, len(inputs[1]), dtype=torch.long, device=DEVICE),
            generation_config=generation(),
        )[0, len(inputs[1]) :].tolist()
    assert wanted != texts["__base__"][1]
    with serve(mb, use_cuda_graph=True) as manager:
        for _ in range(2):
            request = manager.add_request(inputs[0], adapter_id="a0")
            assert results(manager, 1)[request].generated_tokens == texts["a0"][0]
        store.register("wide", wide)
        names = [manager.add_request(inputs[1], adapter_id="wide"), manager.add_request(inputs[0], adapter_id="a0")]
        found = results(manager, 2)
    assert [found[name].generated_tokens for name in names] == [wanted, texts["a0"][0]]


def long(mb, prompt, name):
    prompts = torch.tensor([prompt], device=DEVICE)
    config = generation()
    config.max_new_tokens = LONG
    mask = torch.ones_like(prompts)
    output = mb._inner.generate(input_ids=prompts, attention_mask=mask, generation_config=config, adapter_ids=[name])
    return output[0, len(prompt) :].tolist()


LONG = 100


@pytest.mark.parametrize("other", ["none", "one that has ended", "one that runs", "one that begins meanwhile"])
def test_a_new_version_waits_for_the_requests_of_all_managers(make, folder, inputs, other):
    mb, store = make(room=6)
    expected = long(mb, inputs[0], "a0")
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(serve(mb))
        if other == "one that has ended":
            mb._inner.generate_batch(
                [inputs[1]],
                adapter_ids=["a2"],
                generation_config=generation(),
                continuous_batching_config=settings(),
            )
            gc.collect()
        elif other == "one that runs":
            stack.enter_context(serve(mb))
        request = manager.add_request(inputs[0], adapter_id="a0", max_new_tokens=LONG)
        assert eventually(lambda: manager.served["a0"] >= len(inputs[0]) + 5, 20)
        with ThreadPoolExecutor(1) as thread:
            change = thread.submit(store.register, "a0", folder / "a1")
            if other == "one that begins meanwhile":
                assert eventually(lambda: mb._registry.held, 20)
                second = stack.enter_context(serve(mb))
                late = second.add_request(inputs[0], adapter_id="a0", max_new_tokens=LONG)
            assert not change.done()
            assert results(manager, 1)[request].generated_tokens == expected
            change.result(30)
        new = long(mb, inputs[0], "a0")
        if other == "one that begins meanwhile":
            assert results(second, 1)[late].generated_tokens == new
    assert new != expected


@pytest.mark.skipif(not hasattr(ContinuousBatchingManager, "pause"), reason="needs a newer transformers")
def test_changes_while_a_manager_is_paused(make, folder, inputs, texts):
    """A change on another thread waits for the end of the pause, and stops no other manager meanwhile; a change on
    the thread that pauses is refused."""
    mb, store = make(room=6)
    with serve(mb) as paused, serve(mb) as running, ThreadPoolExecutor(1) as thread:
        request = paused.add_request(inputs[0], adapter_id="a0")
        results(paused, 1)
        with paused.pause():
            change = thread.submit(store.register, "a1", folder / "a2")
            time.sleep(0.1)
            for refused in (lambda: store.register("a2", folder / "a3"), lambda: store.unregister("a3")):
                with pytest.raises(errors.ModelStateError, match=r"inside manager.pause\(\)"):
                    refused()
            assert not change.done()
            request = running.add_request(inputs[0], adapter_id="__base__")
            assert results(running, 1)[request].generated_tokens == texts["__base__"][0]
            assert not change.done()
        change.result(20)
        request = paused.add_request(inputs[0], adapter_id="a1")
        assert results(paused, 1)[request].generated_tokens == texts["a2"][0]


def test_a_change_of_one_manager_waits_for_the_requests_of_another(make, inputs):
    """Changes on several threads, in both managers, also inside of each other, all end."""
    mb, _ = make(room=6)
    expected = {name: long(mb, inputs[0], name) for name in ("a0", "a1")}
    with serve(mb) as one, serve(mb) as two:

        def change(first, second):
            for _ in range(3):
                with first.changing("a0"), second.changing("a1"):
                    time.sleep(0.01)

        requests = [
            (manager, name, manager.add_request(inputs[0], adapter_id=name, max_new_tokens=LONG))
            for manager in (one, two)
            for name in ("a0", "a1")
        ]
        threads = [threading.Thread(target=change, args=each) for each in ((one, two), (two, one), (one, one))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        found = {manager: results(manager, 2) for manager in (one, two)}
        for manager, name, request in requests:
            assert found[manager][request].generated_tokens == expected[name]


def test_an_adapter_that_takes_too_long_to_load_fails_its_own_requests(make, inputs, texts, monkeypatch):
    mb, store = make(room=3)
    store._loader._timeout = 2
    go, read = threading.Event(), transfers.read_weights

    def hang(name, *args):
        if name == "a0":
            go.wait(20)
        read(name, *args)

    monkeypatch.setattr(transfers, "read_weights", hang)
    with serve(mb) as manager:
        names = ["a0", "a1", "a0"]
        requests = manager.add_requests(inputs[:3], adapter_ids=names)
        found = results(manager, 3)
        for request, name, row in zip(requests, names, range(3)):
            if name == "a0":
                assert "waited 2 s for 1 stored adapters ('a0'...)" in found[request].error
            else:
                assert found[request].generated_tokens == texts[name][row]
        go.set()
        assert eventually(lambda: store.is_loaded(store._names.ids["a0"]), 20)
        request = manager.add_request(inputs[0], adapter_id="a0")
        assert results(manager, 1)[request].generated_tokens == texts["a0"][0]


def test_every_loop_is_woken_when_an_adapter_was_loaded(make):
    _, store = make(room=3)
    events = [threading.Event(), threading.Event()]
    for event in events:
        store.wake(event)
    store.pin("a0")
    assert all(event.wait(5) for event in events)
