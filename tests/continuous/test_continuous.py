"""Continuous batching with an adapter per request, against `generate` row by row."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections import Counter

import pytest
import torch
from batching import DEVICE, Simulation, generation, prompts, results, row_by_row, settings
from models import base_model, lora_configs, peft_model
from peft import LoraConfig, get_peft_model
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import RequestState

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.continuous import admission, prefixes


ENTRIES = ["three", "__base__", "eight", {"four": 0.7, "eight": 0.3}, "four", "three"]


@pytest.fixture
def enabled():
    model = peft_model().to(DEVICE)
    mb = peft_multibatch.enable(model)
    yield model, mb
    mb.disable()


def test_fifty_requests_that_share_prefixes_in_a_cache_that_evicts_them(enabled, monkeypatch):
    model, mb = enabled
    evicted, original = [], RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request", lambda self: evicted.append(1) or original(self)
    )
    shared = prompts(1, 2)[0] + [7] * 34
    inputs = [shared + prompt if index % 3 else prompt for index, prompt in enumerate(prompts(54))]
    entries = [ENTRIES[index % len(ENTRIES)] for index in range(len(inputs))]
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=settings(14)) as manager:
        names = manager.add_requests(inputs, adapter_ids=entries)
        found = results(manager, len(inputs), timeout=300)
        hits, served = manager.prefix_hits, dict(manager.served)
    assert evicted
    assert [found[name].generated_tokens for name in names] == row_by_row(model, inputs, entries)
    assert hits >= 32  # prompts of one adapter share their prefix
    assert set(served) == {"three", "__base__", "eight", "0.7 four + 0.3 eight", "four"}


def add_what_no_graph_can_hold(model):
    shared = {"target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model.add_adapter("DoRA", LoraConfig(r=4, use_dora=True, **shared))
    model.add_adapter("bias", LoraConfig(r=4, lora_bias=True, **shared))
    model.to(DEVICE).eval()


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_entries_that_no_graph_can_hold_are_not_admitted(enabled):
    model, mb = enabled
    add_what_no_graph_can_hold(model)
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=settings()) as manager:
        for uses_graphs in (False, True):
            manager._admission.uses_graphs = uses_graphs
            for entry, reason in ((3, "a DoRA adapter is used"), (4, "its lora_B has a bias")):
                refused = pytest.raises(errors.UnsupportedError, match=reason)
                with refused if uses_graphs else contextlib.nullcontext():
                    manager._admission.check_entry(entry)
            manager._admission.check_entry(0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_requests_that_no_graph_can_hold_end_with_an_error(enabled):
    model, mb = enabled
    add_what_no_graph_can_hold(model)
    config, inputs = settings(40, use_cuda_graph=True), prompts(4)
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=config) as manager:
        names = manager.add_requests(inputs, adapter_ids=["three", "DoRA", "bias", "__base__"])
        found = results(manager, 4, timeout=120)
    assert "a DoRA adapter is used" in found[names[1]].error
    assert "its lora_B has a bias" in found[names[2]].error
    texts = [found[names[index]].generated_tokens for index in (0, 3)]
    assert texts == row_by_row(model, [inputs[0], inputs[3]], ["three", "__base__"])


@pytest.mark.gpu
def test_graphs_are_captured_anew_only_for_what_they_cannot_serve(enabled):
    """Adapters of known ranks need no new graph; one of a larger rank does."""
    model, mb = enabled
    config = settings(40, use_cuda_graph=True, use_async_batching=True)
    shared = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    inputs, said = prompts(6), []

    def ask(entries):
        names = manager.add_requests(inputs, adapter_ids=entries)
        found = results(manager, len(inputs), timeout=120)
        said.append((entries, [found[name].generated_tokens for name in names]))

    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=config) as manager:
        ask(["three", "eight", "__base__"] * 2)
        for rank in (8, 64):
            with manager.changing():
                model.add_adapter(f"rank {rank}", LoraConfig(r=rank, **shared))
                model.to(DEVICE).eval()
            ask(["three", f"rank {rank}", "__base__"] * 2)
            assert mb._router.graph.captures.discards == (rank == 64)
    for entries, texts in said:
        assert texts == row_by_row(model, inputs, entries)


@pytest.mark.gpu
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_on_a_gpu(enabled, graphs, asynchronous):
    model, mb = enabled
    inputs = [[7] * 34 + prompt if index % 3 else prompt for index, prompt in enumerate(prompts(54))]
    entries = [ENTRIES[index % len(ENTRIES)] for index in range(len(inputs))]
    want = row_by_row(model, inputs, entries)
    config = settings(40, use_cuda_graph=graphs, use_async_batching=asynchronous)
    options = {"generation_config": generation(), "continuous_batching_config": config}
    with mb.continuous_batching(mixtures=2, **options) as manager:  # graphs have two plans
        for _ in range(2):
            names = manager.add_requests(inputs, adapter_ids=entries)
            found = results(manager, len(inputs), timeout=120)
            assert [found[name].generated_tokens for name in names] == want
        assert bool(mb._router.graph.captures) == graphs
        with manager.changing("eight"):
            for name, module in model.named_modules():
                if name.endswith("lora_B.eight"):
                    module.weight = torch.nn.Parameter(module.weight * -2)
        names = manager.add_requests(inputs, adapter_ids=entries)
        found = results(manager, len(inputs), timeout=120)
    assert [found[name].generated_tokens for name in names] == row_by_row(model, inputs, entries)


@pytest.mark.gpu
def test_steps_allocate_nothing_once_their_graphs_are_captured(enabled, monkeypatch):
    """For any mix, plans are written in place, and tables don't change."""
    _, mb = enabled
    captured, original = [], torch.cuda.CUDAGraph.capture_begin
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "capture_begin", lambda *args, **kwargs: captured.append(1) or original(*args, **kwargs)
    )
    inputs = prompts(40)
    entries = [ENTRIES[index % len(ENTRIES)] for index in range(len(inputs))]
    config = settings(40, use_cuda_graph=True, use_async_batching=True, allow_block_sharing=False)
    options = {"generation_config": generation(), "continuous_batching_config": config}
    with mb.continuous_batching(mixtures=2, **options) as manager:
        for _ in range(20):
            before = len(captured), torch.cuda.memory_stats()["allocation.all.allocated"]
            manager.add_requests(inputs, adapter_ids=entries)
            results(manager, len(inputs), timeout=120)
            entries = entries[1:] + entries[:1]
            if len(captured) == before[0]:
                break
    assert captured and len(captured) == before[0]
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before[1]


@pytest.mark.parametrize("shares", [False, True])
def test_weights_that_are_replaced_are_noticed_when_a_request_begins(enabled, shares):
    model, mb = enabled
    names, inputs = ["three", "four", "eight"], prompts(3)
    before = {module: module.weight for name, module in model.named_modules() if ".lora_B." in name}
    changes = [
        {
            module: torch.nn.Parameter(torch.randn_like(module.weight) * 2)
            for name, module in model.named_modules()
            if name.endswith(f"lora_B.{replaced}")
        }
        for replaced in names * 2
    ]

    def change(weights):
        for module, weight in weights.items():
            module.weight = weight

    wants = [change(weights) or row_by_row(model, inputs, names) for weights in changes]
    change(before)
    config = settings(allow_block_sharing=shares)
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=config) as manager:
        for weights, want in zip(changes, wants):
            change(weights)
            requests = manager.add_requests(inputs, adapter_ids=names)
            found = results(manager, len(inputs))
            assert [found[request].generated_tokens for request in requests] == want


def test_generate_batch(enabled):
    model, mb = enabled
    inputs, entries = prompts(9), (ENTRIES * 2)[:9]
    outputs = model.generate_batch(
        inputs, generation_config=generation(), continuous_batching_config=settings(), adapter_ids=entries
    )
    assert [output.generated_tokens for output in outputs.values()] == row_by_row(model, inputs, entries)
    plain = model.generate_batch(inputs, generation_config=generation(), continuous_batching_config=settings())
    assert [output.generated_tokens for output in plain.values()] == row_by_row(model, inputs, ["three"] * 9)
    with pytest.raises(errors.AdapterIdsLengthError, match="3 entries for 9 prompts"):
        model.generate_batch(
            inputs, generation_config=generation(), continuous_batching_config=settings(), adapter_ids=[0, 1, 2]
        )
    with mb.batch([0]), pytest.raises(errors.UnsupportedError, match="while adapter ids per sample are active"):
        model.generate_batch(inputs, generation_config=generation())
    with mb.batch([0]):
        outlives = contextvars.copy_context()  # as in a task that was started here
    options = {"generation_config": generation(), "continuous_batching_config": settings()}
    outputs = outlives.run(model.generate_batch, inputs[:2], adapter_ids=entries[:2], **options)
    assert [output.generated_tokens for output in outputs.values()] == row_by_row(model, inputs[:2], entries[:2])
    with pytest.raises(errors.ModelStateError, match="after that block had ended"):
        outlives.run(model.generate_batch, inputs[:2], **options)


def test_ids_as_a_tensor_and_too_few_of_them(enabled):
    model, mb = enabled
    prompt = prompts(1)[0]
    want = row_by_row(model, [prompt] * 2, [0, 2])
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=settings()) as manager:
        for ids in (torch.tensor([0]), torch.tensor([0, 2])):
            names = manager.add_requests([prompt] * len(ids), adapter_ids=ids)
            found = results(manager, len(ids))
            assert [found[name].generated_tokens for name in names] == want[: len(ids)]
        with pytest.raises(errors.AdapterIdsLengthError, match="0 entries for 1 prompts"):
            manager.add_requests([prompt], adapter_ids=[])


def test_a_manager_is_not_kept_for_calls_without_ids(enabled):
    model, _ = enabled
    options = {"generation_config": generation(), "continuous_batching_config": settings()}
    with pytest.raises(errors.UnsupportedError, match="got persistent_manager=True"):
        model.generate_batch(prompts(1), adapter_ids=["eight"], persistent_manager=True, **options)


def test_a_prefix_is_not_shared_between_adapters(enabled):
    model, mb = enabled
    prompt = prompts(1, 2)[0] + [9] * 40
    entries = ["three", "eight", "__base__", {"four": 1.0, "eight": 0.5}]
    want = row_by_row(model, [prompt] * 4, entries)
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=settings()) as manager:
        for entry, tokens in zip(entries, want):
            manager.add_request(prompt, adapter_id=entry)
            (first,) = results(manager, 1).values()
            assert first.generated_tokens == tokens
        assert manager.prefix_hits == 0
        manager.add_request(prompt, adapter_id="eight")
        (second,) = results(manager, 1).values()
        assert manager.prefix_hits == 32  # two blocks of sixteen
        assert second.generated_tokens == want[1]


def test_a_prompt_of_one_token_is_not_shared_between_adapters(enabled):
    model, mb = enabled
    options = {"generation_config": generation(max_new_tokens=20), "continuous_batching_config": settings()}
    with mb.continuous_batching(**options) as manager:
        manager.add_request([7], adapter_id="eight")
        (first,) = results(manager, 1).values()
        prompt = [7, *first.generated_tokens[:16]]  # its first block is full of tokens that another adapter generated
        manager.add_request(prompt)
        (second,) = results(manager, 1).values()
        assert manager.prefix_hits == 0
    assert [second.generated_tokens] == row_by_row(model, [prompt], ["__base__"], 20)


def test_forks(enabled):
    model, _ = enabled
    config = generation(num_return_sequences=3, do_sample=True, top_k=1)
    inputs, entries = prompts(4), ENTRIES[:4]
    outputs = model.generate_batch(
        inputs, generation_config=config, continuous_batching_config=settings(), adapter_ids=entries
    )
    # older versions of transformers return only the first
    copies = 3 if hasattr(ContinuousBatchingManager, "pause") else 1
    want = [tokens for tokens in row_by_row(model, inputs, entries) for _ in range(copies)]
    assert [output.generated_tokens for output in outputs.values()] == want


def test_a_request_that_fails_fails_with_its_forks(enabled):
    model, _ = enabled
    config = generation(num_return_sequences=2, do_sample=True, top_k=1)
    inputs, entries = [*prompts(1), [3, 160], [3] * 5000], ["eight"] * 3
    outputs = model.generate_batch(
        inputs, generation_config=config, continuous_batching_config=settings(), adapter_ids=entries
    )
    errors_of = [output.error for output in outputs.values() if output.error]
    copies = len(errors_of) // 2  # older versions of transformers return only the first
    assert copies == (2 if hasattr(ContinuousBatchingManager, "pause") else 1)
    good = [output.generated_tokens for output in outputs.values() if not output.error]
    assert good == row_by_row(model, inputs[:1], entries[:1]) * copies


def test_streams_and_cancelled_requests(enabled):
    _, mb = enabled
    prompt = prompts(1)[0]
    with mb.continuous_batching(
        generation_config=generation(max_new_tokens=200), continuous_batching_config=settings()
    ) as manager:
        endless = manager.add_request(prompt, adapter_id="three", streaming=True)
        assert manager.get_result(timeout=60).request_id == endless
        manager.cancel_request(endless)
        name = manager.add_request(prompt, adapter_id="eight", streaming=True, max_new_tokens=4)
        lengths = [len(output.generated_tokens) for output in manager.request_id_iter(name)]
    assert lengths == [1, 2, 3, 4]


def test_what_one_request_gets_wrong_is_its_own_affair(enabled):
    model, mb = enabled
    prompt = prompts(1)[0]
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=settings()) as manager:
        good = manager.add_request(prompt, adapter_id="eight")
        bad = {
            manager.add_request([3, 160], adapter_id="eight"): "including 160",
            manager.add_request([], adapter_id="eight"): "has 0 tokens",
            manager.add_request([3] * 5000, adapter_id="eight"): "but the cache holds",
            manager.add_request(prompt, adapter_id="nine"): "no adapter has this name",
            manager.add_request(prompt, adapter_id=17): "no adapter has this id",
            manager.add_request(prompt, adapter_id={"three": "much"}): "expected a finite number",
        }
        last = manager.add_request(prompt, adapter_id="three")
        found = results(manager, len(bad) + 2)
    for name, message in bad.items():
        assert message in found[name].error
        assert found[name].generated_tokens == []
    want = row_by_row(model, [prompt] * 2, ["eight", "three"])
    assert [found[good].generated_tokens, found[last].generated_tokens] == want


def test_two_requests_of_the_same_id(enabled):
    model, mb = enabled
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=settings()) as manager:
        with manager.changing():  # both must be waiting
            manager.add_request([8] * 20, "same", adapter_id="three")
            manager.add_request([9] * 20, "same", adapter_id="eight")
        outputs = [manager.get_result(timeout=60) for _ in range(2)]
    (error,) = [output.error for output in outputs if output.error]
    assert "a request was added with the id 'same', which a running request already has" in error
    (good,) = [output.generated_tokens for output in outputs if not output.error]
    assert [good] == row_by_row(model, [[8] * 20], ["three"])


def test_an_adapter_changes_while_requests_run(enabled):
    model, mb = enabled
    layers = [module for name, module in model.named_modules() if name.endswith("lora_B.eight")]
    prompt = prompts(1, 2)[0] + [9] * 40
    before = row_by_row(model, [prompt], ["eight"], 40)[0]
    with mb.continuous_batching(
        generation_config=generation(max_new_tokens=40), continuous_batching_config=settings()
    ) as manager:
        old = manager.add_request(prompt, adapter_id="eight", streaming=True)
        others = manager.add_requests(prompts(4), adapter_ids=["three"] * 4, max_new_tokens=20)
        assert manager.get_result(timeout=60) is not None  # it is running
        late = []

        def ask():
            time.sleep(0.05)  # the change is waiting
            late.append(manager.add_request(prompt, adapter_id="eight"))

        asking = threading.Thread(target=ask)
        asking.start()
        with manager.changing("eight"):
            asking.join()
            for layer in layers:
                layer.weight.data.mul_(-2)  # in place, as in hot-swapping
        found = results(manager, 6)
        hits = manager.prefix_hits
    after = row_by_row(model, [prompt], ["eight"], 40)[0]
    assert before != after
    assert found[old].generated_tokens == before
    assert found[late[0]].generated_tokens == after
    assert hits == 0  # prefixes cached with the old weights aren't used with the new ones
    want = row_by_row(model, prompts(4), ["three"] * 4, 20)
    assert [found[name].generated_tokens for name in others] == want


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
def test_an_adapter_is_deleted_and_another_one_added_while_requests_run(enabled):
    model, mb = enabled
    prompt = prompts(1)[0]
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=settings()) as manager:
        with manager.changing("four"):
            waiting = manager.add_request(prompt, adapter_id="four")
            other = manager.add_request(prompt, adapter_id="eight")
            model.delete_adapter("four")
            model.add_adapter("new", lora_configs()["three"])
            model.to(DEVICE)
        new = manager.add_request(prompt, adapter_id="new")
        found = results(manager, 3)
    assert "the adapter with the id 1 was deleted" in found[waiting].error
    assert [found[name].generated_tokens for name in (other, new)] == row_by_row(model, [prompt] * 2, ["eight", "new"])


@pytest.mark.skipif(not hasattr(ContinuousBatchingManager, "pause"), reason="older transformers have no hard stop")
def test_a_change_does_not_wait_for_a_loop_that_ended(enabled):
    _, mb = enabled
    changed = threading.Event()
    options = {"generation_config": generation(max_new_tokens=700), "continuous_batching_config": settings()}
    with mb.continuous_batching(**options) as manager:
        manager.add_request([9] * 20, adapter_id="eight", streaming=True)
        assert manager.get_result(timeout=60) is not None  # it is running

        def change():
            with manager.changing("eight"):
                changed.set()

        changing = threading.Thread(target=change, daemon=True)
        changing.start()
        manager.stop(hard_stop=True)
        assert changed.wait(timeout=30)
        changing.join()


def test_what_would_wait_for_itself_is_refused(enabled):
    model, mb = enabled
    has_pause = hasattr(ContinuousBatchingManager, "pause")
    options = {"generation_config": generation(), "continuous_batching_config": settings()}
    with mb.continuous_batching(**options) as manager:
        for method in ["stop", "pause"][: 1 + has_pause]:
            with (
                manager.changing("eight"),
                pytest.raises(errors.ModelStateError, match=f"{method} was called inside manager.changing"),
            ):
                getattr(manager, method)()
        if has_pause:
            refused = pytest.raises(errors.ModelStateError, match="changing was called inside")
            with manager.pause(), refused, manager.changing("eight"):
                pass
        manager.add_request([9] * 20, adapter_id="eight")
        (output,) = results(manager, 1).values()
    assert [output.generated_tokens] == row_by_row(model, [[9] * 20], ["eight"])


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")
def test_a_model_that_cannot_run_requests_and_can_again(enabled):
    model, mb = enabled
    prompt = [9] * 40
    want = row_by_row(model, [prompt] * 2, ["__base__", "eight"])
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=settings()) as manager:
        with model.disable_adapter():
            (base, bad) = manager.add_requests([prompt] * 2, adapter_ids=["__base__", "eight"])
            found = results(manager, 2)
        assert found[base].generated_tokens == want[0]
        assert "adapters were disabled while request" in found[bad].error
        model.merge_adapter(["three"])
        manager.add_request(prompt)
        assert "is merged into the base weights" in results(manager, 1).popitem()[1].error
        model.unmerge_adapter()
        manager.add_request(prompt, adapter_id="eight")
        assert results(manager, 1).popitem()[1].generated_tokens == want[1]


@pytest.mark.parametrize("how", ["segmented", "per segment"])
def test_adapters_disabled_and_enabled_in_the_middle_of_a_step(how):
    """As another thread's `with model.disable_adapter()` may do."""
    model = peft_model().to(DEVICE)
    if how == "per segment":
        for name, module in model.named_modules():
            if name.endswith("lora_A.eight"):
                module.register_forward_hook(lambda *_: None)
    mb = peft_multibatch.enable(model, fuse=False)
    assert {layer.how for layer in mb.report()} == {"segmented"}
    assert bool(mb.report().adapters[2].reason) == (how == "per segment")
    inputs, entries = prompts(3), ["three", "eight", "__base__"]
    want = row_by_row(model, inputs, entries)
    layers, toggled = model.get_base_model().model.layers, []
    layers[1].self_attn.register_forward_pre_hook(lambda *_: toggled.append(model.base_model.disable_adapter_layers()))
    layers[1].register_forward_hook(lambda *_: model.base_model.enable_adapter_layers())
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=settings()) as manager:
        names = manager.add_requests(inputs, adapter_ids=entries)
        found = results(manager, 3)
    assert toggled
    assert [found[name].generated_tokens for name in names] == want


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
def test_what_comes_in_an_adapters_place_and_cannot_run(enabled):
    model, mb = enabled
    prompt = prompts(1)[0]
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=settings()) as manager:
        good = manager.add_request(prompt, adapter_id="three")
        with manager.changing("eight"):
            bad = manager.add_request(prompt, adapter_id={"eight": 0.5, "four": 0.5})
            model.delete_adapter("eight")
            config = lora_configs()["eight"]
            config.use_dora = True
            model.add_adapter("eight", config)
            model.to(DEVICE)
        found = results(manager, 2)
    assert "isn't a delta that can be weighted" in found[bad].error
    assert [found[good].generated_tokens] == row_by_row(model, [prompt], ["three"])


def test_a_request_without_an_end_is_the_only_one_that_fills_the_cache(enabled):
    _, mb = enabled
    options = {"generation_config": generation(max_new_tokens=None), "continuous_batching_config": settings(8)}
    with mb.continuous_batching(**options) as manager:
        endless = manager.add_request([9] * 20, adapter_id="eight")
        short = manager.add_request([8] * 20, adapter_id="three", max_new_tokens=8)
        found = results(manager, 2)
        last = manager.add_request([8] * 20, adapter_id="three", max_new_tokens=8)
        found |= results(manager, 1)
    assert "but the cache holds" in found[endless].error
    assert len(found[endless].generated_tokens) == 109
    assert found[last].generated_tokens == found[short].generated_tokens


def test_layers_that_run_per_segment():
    torch.manual_seed(0)
    shared = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base_model(), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], **shared), "one")
    model.add_adapter("two", LoraConfig(r=3, target_modules=["v_proj"], use_dora=True, **shared))
    for name, parameter in model.named_parameters():
        if "lora_embedding" in name:
            torch.nn.init.normal_(parameter)
    model.eval().to(DEVICE)
    peft_multibatch.enable(model)
    inputs, entries = prompts(6), ["one", "two", "__base__"] * 2
    outputs = model.generate_batch(
        inputs, generation_config=generation(), continuous_batching_config=settings(), adapter_ids=entries
    )
    assert [output.generated_tokens for output in outputs.values()] == row_by_row(model, inputs, entries)
    outputs = model.generate_batch(
        inputs[:2],
        generation_config=generation(),
        continuous_batching_config=settings(),
        adapter_ids=["one", {"one": 0.5, "two": 0.5}],
    )
    good, bad = outputs.values()
    assert [good.generated_tokens] == row_by_row(model, inputs[:1], ["one"])
    assert "isn't a delta that can be weighted" in bad.error


def test_an_adapter_that_is_replaced_without_a_word(enabled):
    model, mb = enabled
    prompt = [9] * 40
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=settings()) as manager:
        manager.add_request(prompt, adapter_id="eight")
        results(manager, 1)
        for name, module in model.named_modules():
            if name.endswith("lora_B.eight"):
                module.weight = torch.nn.Parameter(module.weight * -2)
        manager.add_request(prompt, adapter_id="eight")
        (output,) = results(manager, 1).values()
        assert manager.prefix_hits == 0
        with pytest.raises(errors.UnsupportedError, match="for the base model"), manager.changing("__base__"):
            pass
    assert [output.generated_tokens] == row_by_row(model, [prompt], ["eight"])


def test_more_mixtures_than_are_remembered(enabled, monkeypatch):
    """A mixture that returns has lost its prefixes, and gets no others."""
    model, mb = enabled
    for module in (admission, prefixes):
        monkeypatch.setattr(module, "KEPT", 3)
    prompt = [9] * 40
    entries = [{"three": 0.1 * weight, "eight": 0.5} for weight in range(1, 6)]
    entries += entries[:1] + entries[4:]
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=settings()) as manager:
        found = []
        for entry in entries:
            manager.add_request(prompt, adapter_id=entry)
            (output,) = results(manager, 1).values()
            found.append(output.generated_tokens)
        assert len(manager._prefixes._salts) == 3 and len(manager._admission._checked) <= 3
        assert 0 < manager.prefix_hits < len(prompt)  # only of the last one
    assert found == row_by_row(model, [prompt] * len(entries), entries)


def test_an_adapter_that_is_replaced_while_a_request_runs(enabled):
    """That request's steps notice it before another request looks for cached prefixes."""
    model, mb = enabled
    prompt, long = [9] * 40, generation(max_new_tokens=100)
    with mb.continuous_batching(generation_config=long, continuous_batching_config=settings()) as manager:
        manager.add_request(prompt, adapter_id="eight", streaming=True)
        assert not manager.get_result(timeout=60).is_finished()
        for name, module in model.named_modules():
            if name.endswith("lora_B.eight"):
                module.weight = torch.nn.Parameter(module.weight * -2)
        results(manager, 1)
        manager.add_request(prompt, adapter_id="eight", max_new_tokens=8)
        (output,) = results(manager, 1).values()
        assert manager.prefix_hits == 0
    assert [output.generated_tokens] == row_by_row(model, [prompt], ["eight"])


def test_what_was_checked_of_old_versions_is_let_go(enabled):
    """Adapters whose scaling is a tensor, as in PEFT's compiled hot-swap, count as new at every step."""
    model, mb = enabled
    for module in model.modules():
        for name, scaling in getattr(module, "scaling", {}).items() if hasattr(module, "lora_A") else ():
            module.scaling[name] = torch.tensor(float(scaling))
    with mb.continuous_batching(
        generation_config=generation(max_new_tokens=30), continuous_batching_config=settings()
    ) as manager:
        manager.add_request([9] * 40, adapter_id="eight")
        results(manager, 1)
        assert len(manager._admission._checked) <= 2


def test_requests_are_checked_again_only_after_a_change(enabled, monkeypatch):
    """Not whenever the last request of another adapter has ended, which would take long with many of them."""
    model, mb = enabled
    checked, why_not = Counter(), admission.Admission.why_not

    def count(self, state):
        checked[state.request_id] += 1
        return why_not(self, state)

    monkeypatch.setattr(admission.Admission, "why_not", count)
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=settings()) as manager:
        for number, name in enumerate(["three", "four", "eight"]):
            manager.add_request([9] * 5, name, 4 + 4 * number, adapter_id=name)
        assert [len(each.generated_tokens) for each in results(manager, 3).values()] == [4, 8, 12]
        assert max(checked.values()) <= 2
        manager.add_request([9] * 5, "long", 60, adapter_id="eight", streaming=True)
        assert not manager.get_result(timeout=60).is_finished()
        before = checked["long"]
        for name, module in model.named_modules():
            if name.endswith("lora_B.eight"):
                module.weight = torch.nn.Parameter(module.weight * -2)
        results(manager, 1)
    assert checked["long"] > before


def test_requests_beyond_learned_positions_and_of_odd_numbers():
    model = peft_model("gpt2").to(DEVICE)  # it has 64 positions
    mb = peft_multibatch.enable(model)
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=settings()) as manager:
        bad = {
            manager.add_request([9] * 70, adapter_id="eight"): "the model has 64 positions",
            manager.add_request([9] * 50, adapter_id="eight", max_new_tokens=16): "the model has 64 positions",
            manager.add_request([9.5], adapter_id="eight"): "a prompt contains 9.5 of type float",
            manager.add_request(
                [9], adapter_id="eight", max_new_tokens="9"
            ): "max_new_tokens contains '9' of type str",
            manager.add_request([9], adapter_id=(0, 1)): "of type tuple: expected an integer id",
        }
        good = manager.add_request([9] * 50, adapter_id="eight", max_new_tokens=15)
        found = results(manager, len(bad) + 1)
    for name, message in bad.items():
        assert message in found[name].error
    assert [found[good].generated_tokens] == row_by_row(model, [[9] * 50], ["eight"], 15)


def test_an_adapter_on_the_head_that_is_loaded_while_requests_run(enabled):
    model, mb = enabled
    config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=settings()) as manager:
        with manager.changing():
            model.add_adapter("head", config)
            model.to(DEVICE)
        names = manager.add_requests([[9] * 40] * 2, adapter_ids=["eight", "head"])
        found = results(manager, 2)
    texts = [found[name].generated_tokens for name in names]
    assert texts == row_by_row(model, [[9] * 40] * 2, ["eight", "head"])


def test_a_flood_for_one_adapter_does_not_starve_the_others():
    """A simulation of two adapters, one of which has a hundred requests before the other's ten arrive."""

    queue, begun = Simulation(), []
    for _ in range(100):
        queue.arrive(0)
    for step in range(110):
        for _ in range(10 if step == 20 else 0):
            queue.arrive(1)
        begun.append(queue.serve())
    assert begun[:20] == [0] * 20
    # they alternate from the arrival on: the late adapter neither waits nor takes all places
    assert Counter(begun[20:40]) == {0: 10, 1: 10}
