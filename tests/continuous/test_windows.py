"""Events that come between two steps at the worst moment; every window is held open, so that it is always hit."""

from __future__ import annotations

import threading

import pytest
from batching import DEVICE, generation, results, row_by_row, settings
from models import peft_model
from transformers.generation.continuous_batching import continuous_api

import peft_multibatch


@pytest.fixture
def enabled():
    model = peft_model().to(DEVICE)
    mb = peft_multibatch.enable(model)
    yield model, mb
    mb.disable()


def serve(mb, tokens=8, blocks=48, **options):
    copies = {"num_return_sequences": 2, "do_sample": True, "top_k": 1}
    config = generation(max_new_tokens=tokens, **copies)
    return mb.continuous_batching(generation_config=config, continuous_batching_config=settings(blocks, **options))


def in_both_copies(found, names):
    assert [found[name].error for name in names] == [None] * len(names)
    first, second = ([found[name + end].generated_tokens for name in names] for end in ("", "__child#0"))
    assert first == second
    return first


@pytest.mark.parametrize("length", [2, 20, 65])
def test_a_request_that_waits_to_be_forked_has_no_tokens_in_the_step_between(enabled, asynchronous, length):
    """Two steps are running, and the request is forked after the first one was read: no other request has tokens in
    the second."""
    model, mb = enabled
    want = row_by_row(model, [[9] * length], ["eight"])
    with serve(mb, **asynchronous) as manager:
        for _ in range(2):
            names = manager.add_requests([[9] * length], adapter_ids=["eight"])
            assert in_both_copies(results(manager, 2), names) == want
        assert manager.is_running()


def test_a_full_cache_leaves_alone_who_is_about_to_be_forked(enabled, asynchronous):
    """Its last token needs another block, and none is free; if it were restarted, its forks would be stale."""
    model, mb = enabled
    inputs, entries = [[9] * 33, [8] * 33], ["eight", "three"]
    want = row_by_row(model, inputs, entries)
    with serve(mb, blocks=5, allow_block_sharing=False, safety_margin=0.0, **asynchronous) as manager:
        with manager.changing():  # both have 32 tokens in the first step, which is full
            names = [manager.add_request(*each, adapter_id=entry) for each, entry in zip(zip(inputs, "ab"), entries)]
        found = results(manager, 4)
        assert manager.is_running()
    assert in_both_copies(found, names) == want


def test_who_lacks_blocks_is_known_whoever_was_tried_after_it(enabled):
    """Requests of an adapter that failed before run one by one: none of the three can run, and the last has no
    blocks."""
    model, mb = enabled
    inputs, entries = [[9] * 60, [8] * 60], ["eight", "eight"]
    want = row_by_row(model, inputs, entries, 20)

    def refuse(module, args):
        if (args[0] == 159).any():
            raise ZeroDivisionError("a hook's own")

    handle = model.get_input_embeddings().register_forward_pre_hook(refuse)
    with serve(mb, 20, blocks=8, allow_block_sharing=False) as manager:
        manager.add_request([159] * 4, "bad", adapter_id="eight")
        assert all("ZeroDivisionError" in output.error for output in results(manager, 2).values())
        with manager.changing():
            names = [manager.add_request(*each, adapter_id=entry) for each, entry in zip(zip(inputs, "ab"), entries)]
        found = results(manager, 4)
        assert manager.is_running()
    handle.remove()
    assert in_both_copies(found, names) == want


def test_a_request_that_is_cancelled_before_the_loop_has_it(enabled, monkeypatch):
    """The loop takes requests first and cancellations afterwards: this request is added and cancelled in between."""
    _, mb = enabled
    drain, came = continuous_api.drain_queue, threading.Event()

    def drain_slowly(queue):
        found = drain(queue)
        if queue is manager.input_queue and not came.is_set():
            came.set()
            manager.add_request([9] * 20, "it", adapter_id="eight")
            manager.cancel_request("it")
        return found

    with serve(mb) as manager:
        monkeypatch.setattr(continuous_api, "drain_queue", drain_slowly)
        found = results(manager, 2)
        assert manager.is_running()
    assert all("was cancelled" in output.error for output in found.values())


def test_steps_with_graphs_do_not_wait_for_calls_of_other_threads(enabled, monkeypatch):
    """Captured graphs read one plan, which such a call occupies until it ends; meanwhile steps run without graphs."""
    model, mb = enabled
    want = row_by_row(model, [[9] * 20], ["eight"])
    captured = []

    def capture(forward, stream, *args):
        captured.append(forward(*args))

    with serve(mb) as manager:
        manager.add_request([9] * 4)
        results(manager, 2)
        with manager.changing():
            runner = manager.batch_processor.model_runner
            monkeypatch.setattr(manager._admission, "uses_graphs", True)
            monkeypatch.setattr(runner, "use_cuda_graph_varlen", True)
            monkeypatch.setattr(runner, "_capture_graph", capture)
        with mb.batch(["three"]):
            names = manager.add_requests([[9] * 20], adapter_ids=["eight"])
            assert in_both_copies(results(manager, 2), names) == want
            assert not captured
        names = manager.add_requests([[9] * 20], adapter_ids=["eight"])
        assert in_both_copies(results(manager, 2), names) == want
        assert captured
