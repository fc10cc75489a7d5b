"""Errors of one adapter, request or caller of continuous batching don't affect the others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque

import pytest
import torch
from batching import DEVICE, generation, prompts, results, row_by_row, settings
from models import SIZES, base_model, peft_model
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.generation.continuous_batching import ContinuousBatchingManager

import peft_multibatch
from peft_multibatch import errors


SHARED = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}


def weights_of(model, name, halves=("lora_A", "lora_B"), projections=("",)):
    return [
        module.weight
        for path, module in model.named_modules()
        if any(path.endswith(f"{projection}.{half}.{name}") for half in halves for projection in projections)
    ]


@pytest.fixture
def enabled():
    model = peft_model().to(DEVICE)
    mb = peft_multibatch.enable(model)
    yield model, mb
    mb.disable()


def serve(mb, tokens=8, blocks=48, number=1, **options):
    copies = {"num_return_sequences": number, "do_sample": True, "top_k": 1} if number > 1 else {}
    config = generation(max_new_tokens=tokens, **copies)
    return mb.continuous_batching(generation_config=config, continuous_batching_config=settings(blocks, **options))


def cached_values(manager):
    """Return the whole cache except the two sectors of padding, which are never read."""
    cache = manager.batch_processor.cache
    if not hasattr(cache, "cache_tensor"):  # older versions of transformers leave memory uninitialized
        return torch.zeros(1)
    return cache.cache_tensor[2 * cache.bytes_per_sector :].view(cache.dtype)


BAD = {
    "one NaN in the first layer": lambda weights: weights[0].data[0, 0].fill_(float("nan")),
    "one infinite value in the last layer": lambda weights: weights[-1].data[0, 0].fill_(float("inf")),
    "NaN in all keys": lambda weights: [weight.data.fill_(float("nan")) for weight in weights[1::7]],
    "infinite keys": lambda weights: weights[1].data.fill_(float("inf")),
    "values that overflow": lambda weights: [
        weight.data.fill_(min(1e30, torch.finfo(weight.dtype).max)) for weight in weights
    ],
}


@pytest.mark.parametrize("shares", [False, True], ids=["apart", "shared prefixes"])
@pytest.mark.parametrize("bad", BAD)
def test_values_that_are_not_finite_stay_with_their_adapter(enabled, bad, shares):
    model, mb = enabled
    with torch.no_grad():
        BAD[bad](weights_of(model, "eight", ["lora_B"]))
    inputs = [[7] * 34 + prompt if index % 2 else prompt for index, prompt in enumerate(prompts(12))]
    entries = ["three", "eight", "__base__", "four", {"three": 0.5, "eight": 0.5}, "three"] * 2
    good = [index for index in range(12) if index % 6 not in (1, 4)]
    want = row_by_row(model, [inputs[index] for index in good], [entries[index] for index in good])
    with serve(mb, allow_block_sharing=shares) as manager:
        for _ in range(2):
            names = manager.add_requests(inputs, adapter_ids=entries)
            found = results(manager, 12)
            assert [found[names[index]].generated_tokens for index in good] == want
            for index in {*range(12)} - {*good}:
                assert "has non-finite logits" in found[names[index]].error
                assert "eight" in found[names[index]].error
        assert manager.is_running()
        assert bool(cached_values(manager).isfinite().all())
        assert not manager._quarantine.suspects


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("size", [60.0, 3e3, 6e4])
def test_keys_that_are_too_large_for_float16(size, attention):
    """Scores can reach the lowest number of float16, which masks are made of."""
    model = peft_model(dtype=torch.float16, autocast_adapter_dtype=False).to(DEVICE)
    model.get_base_model().set_attn_implementation(attention)
    mb = peft_multibatch.enable(model)
    with torch.no_grad():
        for weight in weights_of(model, "eight", ["lora_B"], ["k_proj"]):
            weight.copy_(torch.sign(torch.randn_like(weight)) * size)
    inputs, entries = prompts(6), ["three", "eight", "__base__"] * 2
    want = row_by_row(model, inputs, entries)
    with serve(mb) as manager:
        names = manager.add_requests(inputs, adapter_ids=entries)
        found = results(manager, 6)
        assert manager.is_running()
    for index, name in enumerate(names):
        if index % 3 != 1:
            assert found[name].generated_tokens == want[index]
        else:
            assert found[name].error or found[name].generated_tokens == want[index]


@pytest.mark.parametrize("shares", [False, True], ids=["apart", "shared prefixes"])
@pytest.mark.parametrize("bad", BAD)
def test_values_that_are_not_finite_in_asynchronous_steps(enabled, bad, shares, asynchronous):
    """The next step is already running when a step's tokens are read, and takes its input tokens from the device."""
    model, mb = enabled
    with torch.no_grad():
        BAD[bad](weights_of(model, "eight", ["lora_B"]))
    inputs = [
        [9] * 150,
        [8] * 140,
        *([7] * 34 + prompt if index % 2 else prompt for index, prompt in enumerate(prompts(10))),
    ]
    entries = ["three", "eight", "__base__", "four", {"three": 0.5, "eight": 0.5}, "three"] * 2
    good = [index for index in range(12) if index % 6 not in (1, 4)]
    want = row_by_row(model, [inputs[index] for index in good], [entries[index] for index in good])
    with serve(mb, number=2, allow_block_sharing=shares, **asynchronous) as manager:
        for _ in range(2):
            names = manager.add_requests(inputs, adapter_ids=entries)
            found = results(manager, 24)
            for copies in (names, [f"{name}__child#0" for name in names]):
                assert [found[copies[index]].generated_tokens for index in good] == want
                for index in {*range(12)} - {*good}:
                    assert "has non-finite logits" in found[copies[index]].error
        assert manager.is_running() and not manager._quarantine.suspects
        assert bool(cached_values(manager).isfinite().all())
        assert manager.batch_processor.use_async_batching


def test_long_prompts_that_begin_alike_and_are_not_finite(enabled):
    """The second copy of a page frees the first one when it is complete, long before there are logits."""
    model, mb = enabled
    with torch.no_grad():
        weights_of(model, "eight", ["lora_B"], ["k_proj"])[0].fill_(float("nan"))
    inputs, entries = [[9] * 150] * 4 + [[9] * 20] * 2, ["eight"] * 5 + ["three"]
    want = row_by_row(model, inputs[-1:], entries[-1:])
    with serve(mb, number=2, allow_block_sharing=True) as manager:
        with manager.changing():
            names = manager.add_requests(inputs, adapter_ids=entries)
        found = results(manager, 12)
        assert bool(cached_values(manager).isfinite().all())
    assert all("non-finite logits" in found[name].error for name in names[:-1])
    assert [found[names[-1]].generated_tokens] == want


@pytest.mark.gpu
@pytest.mark.parametrize("is_asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bad", BAD)
def test_values_that_are_not_finite_in_graphs(bad, dtype, is_asynchronous):
    model = peft_model(dtype=dtype, autocast_adapter_dtype=False).to(DEVICE)
    mb = peft_multibatch.enable(model)
    with torch.no_grad():
        BAD[bad](weights_of(model, "eight", ["lora_B"]))
    inputs = [[7] * 34 + prompt if index % 2 else prompt for index, prompt in enumerate(prompts(12))]
    entries = ["three", "eight", "__base__", "four", "eight", "three"] * 2
    good = [index for index in range(12) if entries[index] != "eight"]
    want = row_by_row(model, [inputs[index] for index in good], [entries[index] for index in good])
    with serve(mb, number=2, use_cuda_graph=True, use_async_batching=is_asynchronous) as manager:
        for _ in range(2):
            names = manager.add_requests(inputs, adapter_ids=entries)
            found = results(manager, 24, timeout=120)
            for copies in (names, [f"{name}__child#0" for name in names]):
                assert [found[copies[index]].generated_tokens for index in good] == want
                assert all("non-finite logits" in found[copies[index]].error for index in {*range(12)} - {*good})
        assert manager.is_running()
        assert bool(cached_values(manager).isfinite().all())
    mb.disable()


@pytest.mark.gpu
def test_adapters_on_the_head_are_refused_where_there_are_graphs():
    model = peft_model().to(DEVICE)
    model.add_adapter("head", LoraConfig(r=4, target_modules=["lm_head"], **SHARED))
    model.add_adapter("words", LoraConfig(r=4, target_modules=["embed_tokens"], **SHARED))
    model.to(DEVICE).eval()
    mb = peft_multibatch.enable(model)
    inputs, entries = prompts(4), ["three", "head", "words", "__base__"]
    want = row_by_row(model, inputs, entries)
    with serve(mb, use_cuda_graph=True) as manager:
        names = manager.add_requests(inputs, adapter_ids=entries)
        found = results(manager, 4, timeout=120)
    assert "gets only the last token of every request" in found[names[1]].error
    assert "runs PEFT's own code per segment" in found[names[2]].error
    assert [found[names[index]].generated_tokens for index in (0, 3)] == [want[0], want[3]]
    mb.disable()


def test_what_raises_in_an_asynchronous_step(enabled, asynchronous):
    model, mb = enabled
    inputs, entries = prompts(9), ["three", "eight", "__base__"] * 3
    want = row_by_row(model, inputs, entries)

    def refuse(module, args):
        raise ZeroDivisionError("a hook's own")

    for path, module in model.named_modules():
        if path.endswith("1.mlp.up_proj.lora_A.eight"):
            module.register_forward_pre_hook(refuse)
    with serve(mb, **asynchronous) as manager:
        names = manager.add_requests(inputs, adapter_ids=entries)
        found = results(manager, 9)
        assert manager.is_running()
    for index, name in enumerate(names):
        if index % 3 == 1:
            assert "ZeroDivisionError (a hook's own)" in found[name].error
        else:
            assert found[name].generated_tokens == want[index]


def test_an_id_that_is_used_again_in_asynchronous_steps(enabled, asynchronous):
    """The output of a cancelled request's last step doesn't go to another request with the same id."""
    model, mb = enabled
    want = row_by_row(model, [[9] * 16], ["eight"], 20)[0]
    with serve(mb, 20, **asynchronous) as manager:
        for _ in range(5):
            manager.add_request([8] * 12, "it", adapter_id="eight", streaming=True, max_new_tokens=200)
            assert manager.get_result(timeout=60).error is None
            with manager.changing():  # both must come between the same two steps
                manager.cancel_request("it")
                manager.add_request([9] * 16, "again", adapter_id="eight")
            found = results(manager, 2)
            assert "was cancelled" in found["it"].error
            assert found["again"].generated_tokens == want
            assert manager.is_running()


def test_a_prompt_in_many_steps_and_in_several_copies(enabled):
    """Prompts that take several steps have no logits in most of them, and share their pages when they are forked."""
    model, mb = enabled
    with torch.no_grad():
        weights_of(model, "eight", ["lora_B"], ["k_proj"])[0][0, 0] = float("nan")
    inputs = [[9] * 150, [8] * 140, *prompts(4)]
    entries = ["eight", "three", "eight", "__base__", "four", "three"]
    want = row_by_row(model, inputs, entries)
    with serve(mb, number=3) as manager:
        names = manager.add_requests(inputs, adapter_ids=entries)
        found = results(manager, 18)
    for name, entry, tokens in zip(names, entries, want):
        for each in (name, f"{name}__child#0", f"{name}__child#1"):
            if entry == "eight":
                assert "non-finite logits" in found[each].error
            else:
                assert found[each].generated_tokens == tokens


def test_pages_that_were_spoilt_before_anybody_had_logits(enabled):
    """Two prompts share a step without logits of either, followed by a step of only the innocent one."""
    model, mb = enabled
    with torch.no_grad():
        weights_of(model, "eight", ["lora_B"], ["k_proj"])[0].fill_(float("nan"))
    want = row_by_row(model, [[8] * 20], ["three"])[0]
    with serve(mb, number=2) as manager:
        with manager.changing():  # both must be waiting
            manager.add_request([9] * 20, "bad", adapter_id="eight")
            manager.add_request([8] * 20, "good", adapter_id="three")
            scheduler, steps = manager.batch_processor.scheduler, []
            process = scheduler._process_candidates

            def offer(candidates, *args):
                steps.append(len(candidates))
                one = [state for state in candidates if state.request_id == "good"]
                return process(one if len(steps) == 2 else candidates, *args)

            scheduler._process_candidates = offer
        found = results(manager, 4)
    assert steps[:2] == [2, 4]  # before and after the fork
    for name in ("", "__child#0"):
        assert found[f"good{name}"].generated_tokens == want
        assert "non-finite logits" in found[f"bad{name}"].error


def test_sampling_from_what_is_not_finite(enabled):
    model, mb = enabled
    with torch.no_grad():
        weights_of(model, "eight")[0].fill_(float("nan"))
    inputs, entries = prompts(4), ["eight", "three"] * 2
    options = {"continuous_batching_config": settings(return_logprobs=True)}
    config = generation(do_sample=True, top_k=1)
    with mb.continuous_batching(generation_config=config, **options) as manager:
        names = manager.add_requests(inputs, adapter_ids=entries)
        found = results(manager, 4)
    assert all("non-finite logits" in found[name].error for name in names[::2])
    good = [found[name] for name in names[1::2]]
    assert [output.generated_tokens for output in good] == row_by_row(model, inputs[1::2], entries[1::2])
    assert all(len(output.logprobs) == 8 for output in good)


def test_what_raises_in_a_step_is_its_own_requests_affair(enabled):
    model, mb = enabled
    inputs, entries = prompts(6), ["three", "eight", "__base__"] * 2
    want = row_by_row(model, inputs, entries)

    def refuse(module, args):
        raise ZeroDivisionError("a hook's own")

    for path, module in model.named_modules():
        if path.endswith("1.mlp.up_proj.lora_A.eight"):
            module.register_forward_pre_hook(refuse)
    with serve(mb) as manager:
        names = manager.add_requests(inputs, adapter_ids=entries)
        found = results(manager, 6)
        assert manager.is_running()
    for index, name in enumerate(names):
        if index % 3 == 1:
            assert "ZeroDivisionError (a hook's own)" in found[name].error
        else:
            assert found[name].generated_tokens == want[index]


def broken(model, how):
    """Break a model's adapter ``eight`` so that its requests fail."""
    weights = [each for each in model.modules() if "eight" in getattr(each, "lora_A", ())]
    layer = weights[3]
    if how == "a tensor on the meta device":
        layer.lora_B["eight"].weight = torch.nn.Parameter(layer.lora_B["eight"].weight.to("meta"), requires_grad=False)
    elif how == "an infinite scaling":
        layer.scaling["eight"] = 1e308
    elif how == "different ranks":
        layer.lora_A["eight"].weight = torch.nn.Parameter(torch.randn(16, layer.in_features, device=DEVICE))
    elif how == "a missing half":
        del layer.lora_B["eight"]


@pytest.mark.parametrize("when", ["before", "while it waits", "while it runs"])
@pytest.mark.parametrize(
    "how", ["a tensor on the meta device", "an infinite scaling", "different ranks", "a missing half"]
)
def test_an_adapter_that_cannot_run(enabled, how, when):
    model, mb = enabled
    inputs, entries = prompts(6), ["three", "eight", "__base__", "four", "eight", "three"]
    good = [index for index, entry in enumerate(entries) if entry != "eight"]
    want = row_by_row(model, [inputs[index] for index in good], [entries[index] for index in good], 30)
    if when == "before":
        broken(model, how)
    with serve(mb, 30) as manager:
        with manager._changes.lock if when == "while it waits" else threading.Lock():
            names = manager.add_requests(inputs, adapter_ids=entries, streaming=when == "while it runs")
            if when == "while it waits":
                broken(model, how)
        if when == "while it runs":
            while "eight" not in manager.served:
                time.sleep(0.001)
            broken(model, how)
        found = results(manager, 6)
        assert manager.is_running()
        assert [found[names[index]].generated_tokens for index in good] == want
        for index in (1, 4):
            assert "eight" in found[names[index]].error or when == "while it runs"
        manager.add_request(inputs[0], adapter_id="eight")
        assert "adapter 'eight'" in results(manager, 1).popitem()[1].error


def test_adapters_on_fused_experts():
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], **SHARED)
    model = get_peft_model(base_model("mixtral"), config, "experts")
    model.add_adapter("plain", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **SHARED))
    model.eval().to(DEVICE)
    mb = peft_multibatch.enable(model)
    inputs, entries = [*prompts(5), [9]], ["experts", "plain", "__base__"] * 2
    want = row_by_row(model, inputs, entries)
    with serve(mb) as manager:
        names = manager.add_requests(inputs, adapter_ids=entries)
        found = results(manager, 6)
        assert manager.is_running()
    assert [found[name].error for name in names] == [None] * 6
    assert [found[name].generated_tokens for name in names] == want


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_layers_that_run_per_segment_and_get_tokens_without_a_batch():
    """As in Qwen2-MoE's shared experts."""
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    base = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **sizes, shared_expert_intermediate_size=24))
    targets = {"r": 4, "target_modules": r".*shared_expert\.(up|down)_proj|.*q_proj"}
    model = get_peft_model(base, LoraConfig(**targets, **SHARED), "plain")
    model.add_adapter("bias", LoraConfig(lora_bias=True, **targets, **SHARED))
    model.add_adapter("DoRA", LoraConfig(use_dora=True, **targets, **SHARED))
    model.eval().to(DEVICE)
    mb = peft_multibatch.enable(model)
    inputs, entries = prompts(8), ["plain", "bias", "DoRA", "__base__"] * 2
    want = row_by_row(model, inputs, entries)
    with serve(mb) as manager:
        names = manager.add_requests(inputs, adapter_ids=entries)
        found = results(manager, 8)
    assert [found[name].error for name in names] == [None] * 8
    assert [found[name].generated_tokens for name in names] == want


def test_ids_of_any_hashable_type(enabled):
    model, mb = enabled
    inputs, ids = prompts(5), [7, ("a", 1), None, 2.5, frozenset({3})]
    with serve(mb) as manager:
        names = [manager.add_request(tokens, name, adapter_id="eight") for tokens, name in zip(inputs, ids)]
        found = results(manager, 5)
        assert names[2] is not None
        for wrong in ([7], {}, torch.ones(2).numpy()):
            with pytest.raises(errors.UnsupportedError, match="expected something hashable"):
                manager.add_request(inputs[0], wrong, adapter_id="eight")
            with pytest.raises(errors.UnsupportedError, match="expected something hashable"):
                manager.cancel_request(wrong)
    assert [found[name].generated_tokens for name in names] == row_by_row(model, inputs, ["eight"] * 5)


def test_several_copies_of_requests_whose_ids_look_alike(enabled):
    model, mb = enabled
    with serve(mb, number=2) as manager:
        with manager.changing():  # all of them must be waiting
            ids = [7, "7", "7__child#0"]
            for name in ids:
                manager.add_request([9] * 20, name, adapter_id="eight")
        outputs = [manager.get_result(timeout=60) for _ in range(4)]
    assert sum("which a running request already has" in (each.error or "") for each in outputs) == 2
    good = {each.request_id: each.generated_tokens for each in outputs if not each.error}
    assert good == dict.fromkeys([7, "7__child#0"], row_by_row(model, [[9] * 20], ["eight"])[0])


@pytest.mark.parametrize("length", [1, 17, 33])
def test_several_copies_of_a_prompt_of_which_one_token_is_left(enabled, length):
    model, mb = enabled
    prompt = [9] * length
    want = row_by_row(model, [prompt], ["eight"])[0]
    with serve(mb, number=3) as manager:
        for _ in range(2):  # the second one finds all tokens except one in the cache
            manager.add_request(prompt, "it", adapter_id="eight")
            found = results(manager, 3)
            assert manager.is_running()
            assert {name: output.generated_tokens for name, output in found.items()} == dict.fromkeys(
                ["it", "it__child#0", "it__child#1"], want
            )


def test_generate_on_other_threads(enabled):
    """Packed steps aren't causal by themselves, and all threads share the model's configuration."""
    model, mb = enabled
    inputs, entries = prompts(8), ["three", "eight", "__base__", "four"] * 2
    want = row_by_row(model, inputs, entries)
    before = model.config.to_dict()
    with serve(mb, 100) as manager:
        # `generate` of older versions of transformers explains why not
        if model.config._attn_implementation == "paged|sdpa":
            pytest.skip("this version of transformers has no generate beside continuous batching")
        names = manager.add_requests(inputs * 4, adapter_ids=entries * 4)
        found, seen = [], set()
        while len(found) < 6:
            found.append(row_by_row(model, inputs, entries))
            seen.add(getattr(model.config, "is_causal", None))
        results(manager, len(names))
    assert found == [want] * 6
    assert seen == {None}
    assert model.config.to_dict() == before and not hasattr(model.config, "is_causal")


def test_calls_beside_eager_attention_are_refused():
    """transformers' eager attention for packed steps builds no masks for other calls."""
    model = peft_model().to(DEVICE)
    model.get_base_model().set_attn_implementation("eager")
    mb = peft_multibatch.enable(model)
    inputs, entries = prompts(2), ["three", "eight"]
    want = row_by_row(model, inputs, entries)
    ids = torch.tensor(inputs[:1], device=DEVICE)
    with serve(mb) as manager:
        for call in (lambda: row_by_row(model, inputs, entries), lambda: model(ids), lambda: model.generate(ids)):
            with pytest.raises(errors.ModelStateError, match="would see future tokens"):
                call()
        names = manager.add_requests(inputs, adapter_ids=entries)
        found = results(manager, 2)
    assert [found[name].generated_tokens for name in names] == want == row_by_row(model, inputs, entries)
    plain = model.generate_batch(inputs, generation_config=generation(), continuous_batching_config=settings())
    assert [output.generated_tokens for output in plain.values()] == row_by_row(model, inputs, ["three"] * 2)


def test_the_configuration_stays_as_it_is_within_steps(enabled):
    model, mb = enabled
    seen = []
    inner = model.get_base_model()
    handle = inner.model.layers[0].register_forward_pre_hook(
        lambda *_: seen.append(getattr(model.config, "is_causal", None))
    )
    with serve(mb) as manager:
        manager.add_request([9] * 20, adapter_id="eight")
        (output,) = results(manager, 1).values()
    handle.remove()
    assert seen and set(seen) == {None}
    assert [output.generated_tokens] == row_by_row(model, [[9] * 20], ["eight"])


def copy_in_place(model, state):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".eight." in name:
                parameter.copy_(state[name.replace(".eight.", ".")])


WRITES = {
    "copy_": copy_in_place,
    "set_peft_model_state_dict": lambda model, state: set_peft_model_state_dict(model, state, "eight"),
    "load_state_dict": lambda model, state: model.load_state_dict(
        {name.replace(".weight", ".eight.weight"): value for name, value in state.items()}, strict=False
    ),
}


@pytest.mark.parametrize("how", WRITES)
def test_weights_that_are_written_in_place_leave_no_stale_prefixes(enabled, how):
    model, mb = enabled
    state = {name: value * -2 for name, value in get_peft_model_state_dict(model, adapter_name="eight").items()}
    prompt = [9] * 40
    with serve(mb) as manager:
        manager.add_request(prompt, adapter_id="eight")
        results(manager, 1)
        WRITES[how](model, state)
        manager.add_request(prompt, adapter_id="eight")
        (output,) = results(manager, 1).values()
        assert manager.prefix_hits == 0
        manager.add_request(prompt, adapter_id="eight")
        (again,) = results(manager, 1).values()
        assert manager.prefix_hits == 32
    assert [output.generated_tokens, again.generated_tokens] == row_by_row(model, [prompt] * 2, ["eight"] * 2)


@pytest.mark.skipif(not hasattr(ContinuousBatchingManager, "pause"), reason="not in older transformers")
def test_weights_that_are_written_in_a_pause(enabled):
    model, mb = enabled
    prompt = [9] * 40
    with serve(mb) as manager:
        manager.add_request(prompt, adapter_id="eight")
        results(manager, 1)
        with manager.pause():
            for weight in weights_of(model, "eight", ["lora_B"]):
                weight.data.mul_(-2)
        manager.add_request(prompt, adapter_id="eight")
        (output,) = results(manager, 1).values()
    assert [output.generated_tokens] == row_by_row(model, [prompt], ["eight"])


def test_pages_that_were_begun_under_other_weights_are_not_found(enabled):
    """A request starts with few tokens, and its first page is completed after the weights have changed."""
    model, mb = enabled
    prompt = [9] * 10
    with serve(mb, 60) as manager:
        manager.add_request(prompt, adapter_id="eight", streaming=True)
        manager.get_result(timeout=60)
        with torch.no_grad():
            for weight in weights_of(model, "eight", ["lora_B"]):
                weight.mul_(1.01)
        manager.add_request([8] * 40, adapter_id="eight", max_new_tokens=1)  # this one notices it
        found = results(manager, 2)
        long = next(output for output in found.values() if len(output.generated_tokens) == 60)
        tokens = prompt + long.generated_tokens[:40]
        manager.add_request(tokens, adapter_id="eight", max_new_tokens=8)
        (output,) = results(manager, 1).values()
        assert manager.prefix_hits == 0
    assert [output.generated_tokens] == row_by_row(model, [tokens], ["eight"])


def test_cancelled_requests_and_their_children_end(enabled):
    model, mb = enabled
    with serve(mb, 400, number=3, blocks=120) as manager:
        asked = manager.add_request([9] * 20, adapter_id="eight", streaming=True)
        children = [f"{asked}__child#{index}" for index in range(2)]
        seen = set()
        while seen < {asked, *children}:
            seen.add(manager.get_result(timeout=60).request_id)
        manager.cancel_request(asked)
        found = results(manager, 3)
        with manager.changing("three"):
            waits = manager.add_request([9] * 20, adapter_id="three")
            manager.cancel_request(waits)
        late = results(manager, 3)
        manager.cancel_request("nobody")
        last = manager.add_request([9] * 20, adapter_id="eight", max_new_tokens=4)
        good = results(manager, 3)
    assert set(found) == {asked, *children}
    assert all("was cancelled" in output.error for output in (*found.values(), *late.values()))
    assert 0 < len(found[asked].generated_tokens) < 400
    assert good[last].generated_tokens == row_by_row(model, [[9] * 20], ["eight"], 4)[0]


def test_the_cost_of_cancelling_does_not_grow_with_the_square_of_the_requests(enabled):
    """Those that wait are searched once, not once for each cancelled request."""
    _, mb = enabled
    searches = []

    class Searched(deque):
        def __iter__(self):
            searches.append(len(self))
            return super().__iter__()

        def __contains__(self, name):
            searches.append(len(self))
            return super().__contains__(name)

        def remove(self, name):
            searches.append(len(self))
            super().remove(name)

    with serve(mb, 700, max_requests_per_batch=1) as manager:
        first = manager.add_request([9] * 20, adapter_id="three")
        waiting = [manager.add_request([9] * 20, adapter_id="eight") for _ in range(200)]
        deadline = time.monotonic() + 60
        while manager.batch_processor is None or len(manager.batch_processor.scheduler.waiting_requests) < 200:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        scheduler = manager.batch_processor.scheduler
        with manager._changes.lock:  # no step runs
            scheduler.waiting_requests_order = Searched(scheduler.waiting_requests_order)
            for name in waiting:
                manager.cancel_request(name)
        found = results(manager, 200)
        count = len(searches)
        assert first in scheduler.active_requests
        manager.cancel_request(first)
    assert all("was cancelled" in output.error for output in found.values())
    assert count < 100


ODD = {
    "a 2-D tensor": (torch.ones(1, 3, dtype=torch.long), {}, r"a prompt is of shape \[1, 3\]"),
    "None": (None, {}, "a prompt is None"),
    "an iterator": (iter([1, 2]), {}, "a prompt is not a sequence"),
    "a generator": ((each for each in [1]), {}, "a prompt is not a sequence"),
    "a number": (7, {}, "a prompt is not a sequence"),
    "a string": ("words", {}, "a prompt is not a sequence"),
    "nested": ([[1, 2]], {}, "a prompt contains .* of type list"),
    "floats": (torch.ones(3), {}, "a prompt contains 1.0 of type float"),
    "truths": ([True, False], {}, "a prompt contains True of type bool"),
    "an end that is a string": ([9], {"eos_token_id": "x"}, "eos_token_id is not a sequence"),
    "an end that is a fraction": ([9], {"eos_token_id": 2.5}, "eos_token_id is not a sequence"),
    "ends that are odd": ([9], {"eos_token_id": [1, None]}, "eos_token_id contains None"),
    "an end that is a dictionary": ([9], {"eos_token_id": {1: 2}}, "eos_token_id is not a sequence"),
    "a limit that is a list": ([9], {"max_new_tokens": [3]}, "max_new_tokens contains"),
}


@pytest.mark.parametrize("what", ODD)
def test_requests_that_are_none(enabled, what):
    import re

    model, mb = enabled
    prompt, options, message = ODD[what]
    with serve(mb, number=2) as manager:
        bad = manager.add_request(prompt, adapter_id="eight", **options)
        good = manager.add_request([9] * 20, adapter_id="eight")
        found = results(manager, 4)
    for name in (bad, f"{bad}__child#0"):
        assert re.search(message, found[name].error) and ": expected" in found[name].error
        assert found[name].generated_tokens == []
    assert found[good].generated_tokens == row_by_row(model, [[9] * 20], ["eight"])[0]


def test_prompts_of_generate_batch_that_are_none(enabled):
    model, _ = enabled
    options = {"generation_config": generation(), "continuous_batching_config": settings()}
    for bad, message in (
        (None, "a prompt is None"),
        (torch.ones(1, 3), "a prompt is of shape"),
        (["x"], "contains 'x' of"),
    ):
        with pytest.raises(errors.UnsupportedError, match=message):
            model.generate_batch([[9], bad], adapter_ids=["eight", "eight"], **options)
    outputs = model.generate_batch([torch.tensor([9] * 4), (9,) * 4], adapter_ids=["eight"] * 2, **options)
    want = row_by_row(model, [[9] * 4], ["eight"])
    assert [output.generated_tokens for output in outputs.values()] == want * 2


def test_prompts_and_ends_in_other_forms(enabled):
    model, mb = enabled
    prompt = [9, 8, 7]
    want = row_by_row(model, [prompt], ["eight"])[0]
    end = want[2]
    ends = [end, [end], {end}, (end, 159), torch.tensor(end), torch.tensor([end])]
    with serve(mb) as manager:
        for form in (tuple(prompt), torch.tensor(prompt), torch.tensor(prompt).numpy(), [*torch.tensor(prompt)]):
            manager.add_request(form, adapter_id="eight")
            assert results(manager, 1).popitem()[1].generated_tokens == want
        for each in ends:
            manager.add_request(prompt, adapter_id="eight", eos_token_id=each)
            assert results(manager, 1).popitem()[1].generated_tokens == want[: want.index(end) + 1]


def test_per_request_arguments_that_no_tensor_can_hold(enabled):
    _, mb = enabled
    config = generation(do_sample=True, top_k=5, temperature=0.5)
    with mb.continuous_batching(
        generation_config=config, continuous_batching_config=settings(per_request_processors=True)
    ) as manager:
        bad = manager.add_request([9] * 4, adapter_id="eight", top_k=2**40)
        good = manager.add_request([9] * 4, adapter_id="eight", top_k=3)
        found = results(manager, 2)
    assert "for which transformers raises" in found[bad].error
    assert len(found[good].generated_tokens) == 8


def test_outputs_that_come_before_somebody_listens(enabled):
    _, mb = enabled

    async def listen(manager, name):
        got: asyncio.Queue = asyncio.Queue()
        manager.register_result_handler(name, got.put_nowait)
        return await asyncio.wait_for(got.get(), 30)

    with serve(mb) as manager:
        bad = manager.add_request(None, adapter_id="eight")
        other = manager.add_request([9] * 4, adapter_id="three")
        good = manager.add_request([9] * 4, adapter_id="eight")
        time.sleep(0.5)
        assert "a prompt is None" in asyncio.run(listen(manager, bad)).error
        assert len(asyncio.run(listen(manager, good)).generated_tokens) == 8
        assert results(manager, 1).popitem()[0] == other


def test_a_listener_whose_event_loop_was_closed(enabled):
    _, mb = enabled

    async def listen(manager):
        manager.register_result_handler("gone", lambda output: None)

    with serve(mb) as manager:
        asyncio.run(listen(manager))
        manager.add_request([9] * 4, "gone", adapter_id="eight")
        found = results(manager, 1)
        assert manager.is_running()
    assert len(found["gone"].generated_tokens) == 8


HEADS = {
    "LoRA": {"target_modules": ["lm_head", "q_proj"]},
    "a copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "copies of both": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 8, 9]},
    "trained tokens on both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [7, 8], "lm_head": [7, 90]},
    },
    "DoRA": {"target_modules": ["lm_head"], "use_dora": True},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_adapters_on_the_head_and_trained_tokens(kind, tied):
    torch.manual_seed(0)
    base = base_model()
    if tied:
        base.config.tie_word_embeddings = True
        base.tie_weights()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **SHARED), "plain")
    try:
        model.add_adapter("head", LoraConfig(r=4, **HEADS[kind], **SHARED))
    except ValueError as error:
        pytest.skip(str(error))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".head" in name and ("modules_to_save" in name or "trainable_tokens" in name):
                parameter.add_(torch.randn_like(parameter) * parameter.std())
    model.eval().to(DEVICE)
    mb = peft_multibatch.enable(model)
    inputs = [[7, 8, 9, *prompt] for prompt in prompts(6, 90)]
    entries = ["plain", "head", "__base__"] * 2
    want = row_by_row(model, inputs, entries)
    with serve(mb) as manager:
        names = manager.add_requests(inputs, adapter_ids=entries)
        found = results(manager, 6)
    assert [found[name].error for name in names] == [None] * 6
    assert [found[name].generated_tokens for name in names] == want
    mb.disable()
