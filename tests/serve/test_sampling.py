"""Sampling per request in continuous batching, against transformers' processing of the same logits."""

from __future__ import annotations

import contextlib

import pytest
import torch
from batching import DEVICE, generation, prompts, results, row_by_row, settings
from models import base_model
from stored import save_many

import peft_multibatch
from peft_multibatch.serve.manager import ServingManager
from peft_multibatch.serve.sampling import CHOSEN, PLAIN, SORTED, Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    save_many(path, 2)
    return path


@pytest.fixture(scope="module")
def mb(folder):
    handle = peft_multibatch.enable(base_model().to(DEVICE))
    handle.adapter_store(roots=[folder]).register_folder(folder)
    yield handle
    handle.disable()


@contextlib.contextmanager
def running(mb, **options):
    manager = ServingManager(mb, generation_config=generation(), continuous_batching_config=settings(**options))
    manager.warmup()
    manager.start()
    try:
        yield manager
    finally:
        manager.stop()
        manager.destroy()


def run(mb, requests, manager_options=None):
    """Run requests (prompt, adapter, options); returns the last output of each, in order."""
    with running(mb, **(manager_options or {})) as manager:
        return run_with(manager, requests)


def run_with(manager, requests):
    for number, (prompt, adapter, options) in enumerate(requests):
        manager.add_request(prompt, f"r{number}", adapter_id=adapter, **options)
    found = results(manager, len(requests))
    outputs = [found[f"r{number}"] for number in range(len(requests))]
    assert [output.error for output in outputs] == [None] * len(outputs)
    return outputs


def logits_after(mb, prompt, adapter):
    """Return the model's logits after each token of a prompt."""
    with torch.no_grad():
        return (
            mb._inner(input_ids=torch.tensor([prompt], device=DEVICE), adapter_ids=[adapter]).logits[0].float().cpu()
        )


def test_greedy_requests_are_those_of_generate_whoever_samples_beside_them(mb):
    inputs = prompts(6)
    entries = ["a0", "__base__", "a1"] * 2
    requests = [(prompt, entry, {"max_new_tokens": 8}) for prompt, entry in zip(inputs, entries)]
    noisy = [
        (prompt, "a1", {"max_new_tokens": 8, "temperature": 1.5, "top_p": 0.9, "seed": 1, "frequency_penalty": 1.0})
        for prompt in inputs
    ]
    mixed = [each for pair in zip(requests, noisy) for each in pair]
    found = [output.generated_tokens for output in run(mb, mixed)[::2]]
    for prompt, entry, tokens in zip(inputs, entries, found):
        assert tokens == row_by_row(mb._inner, [prompt], [entry])[0]


@pytest.mark.parametrize("how", ["static", pytest.param("graphs", marks=pytest.mark.gpu)])
def test_captured_steps_choose_the_tokens_of_others(mb, how):
    """A step's work depends on its requests' options, so one request of each kind runs longer than all others."""
    kinds = [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.8, "seed": 2, "top_k": 7},
        {"temperature": 1.2, "seed": 3, "top_p": 0.7, "presence_penalty": 0.5},
        {"logprobs": 2, "frequency_penalty": 1.0},
        {"logprobs": 0},
    ]
    requests = [
        (prompt, f"a{number % 2}", {"max_new_tokens": 2 + 3 * (number % len(kinds))} | kinds[-number % len(kinds)])
        for number, prompt in enumerate(prompts(12))
    ]
    expected = run(mb, requests)
    with running(mb, **({"use_cuda_graph": True} if how == "graphs" else {})) as manager:
        if how == "static":  # nothing is captured on a CPU
            manager.logit_processor.is_static = True
        assert manager.logit_processor.is_static
        found = run_with(manager, requests)
    for one, other in zip(expected, found):
        assert one.generated_tokens == other.generated_tokens
        assert [each.chosen for each in one.logprobs] == pytest.approx(
            [each.chosen for each in other.logprobs], abs=1e-4
        )


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.3, "top_p": 0.6}],
    ids=["temperature", "top_k", "top_p"],
)
def test_tokens_come_as_often_as_they_should(mb, options):
    prompt, draws = prompts(1)[0], 800
    requests = [(prompt, "a0", {"max_new_tokens": 1, "seed": seed} | options) for seed in range(draws)]
    tokens = torch.tensor([output.generated_tokens[0] for output in run(mb, requests, {"allow_block_sharing": False})])
    counts = torch.bincount(tokens, minlength=160)
    scores = logits_after(mb, prompt, "a0")[-1:]
    config = generation(do_sample=True, **({"top_k": 0} | options))
    probabilities = mb._inner._get_logits_processor(config)(None, scores).softmax(-1)[0]
    assert counts[probabilities == 0].sum() == 0
    kept = probabilities * draws >= 5
    expected = probabilities[kept] * draws
    chi_square = ((counts[kept] - expected) ** 2 / expected).sum()
    freedom = kept.sum() - 1
    assert freedom >= 3
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_a_seed_gives_the_same_tokens_whoever_runs_beside_it(mb):
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 7}
    inputs = prompts(5)
    alone = run(mb, [(inputs[0], "a0", options)])[0].generated_tokens
    others = [(prompt, "a1", options | {"seed": 8}) for prompt in inputs]
    beside = run(mb, [*others, (inputs[0], "a0", options)])[-1].generated_tokens
    assert alone == beside
    other_seeds = run(mb, [(inputs[0], "a0", options | {"seed": seed}) for seed in range(4)])
    assert len({tuple(output.generated_tokens) for output in other_seeds}) == 4


def greedy_with_penalties(mb, prompt, adapter, presence, frequency, count):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        scores = logits_after(mb, tokens, adapter)[-1]
        counts = torch.bincount(torch.tensor(tokens[len(prompt) :], dtype=torch.long), minlength=160)
        tokens.append(int((scores - counts * frequency - (counts > 0) * presence).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("blocks", [48, 6], ids=["", "evicted"])
def test_penalties_are_openais(mb, blocks):
    inputs, cases = prompts(4, longest=20), [(2.0, 0.0), (0.0, 2.0), (0.7, 0.9), (0.0, 0.0)]
    requests = [
        (prompt, "a0", {"max_new_tokens": 20, "presence_penalty": one, "frequency_penalty": two})
        for prompt, (one, two) in zip(inputs, cases)
    ]
    expected = [greedy_with_penalties(mb, prompt, "a0", *case, 20) for prompt, case in zip(inputs, cases)]
    plain = [greedy_with_penalties(mb, prompt, "a0", 0, 0, 20) for prompt in inputs]
    assert sum(one != two for one, two in zip(expected, plain)) >= 2
    assert [output.generated_tokens for output in run(mb, requests, {"blocks": blocks})] == expected


def test_penalties_and_logprobs_in_asynchronous_batching(mb, asynchronous):
    prompt = prompts(1)[0]
    options = {"max_new_tokens": 12, "presence_penalty": 0.7, "frequency_penalty": 0.9, "logprobs": 2}
    beside = [(each, "a1", {"max_new_tokens": 3}) for each in prompts(3)]
    outputs = run(mb, [(prompt, "a0", options), *beside], asynchronous)
    assert outputs[0].generated_tokens == greedy_with_penalties(mb, prompt, "a0", 0.7, 0.9, 12)
    check_logprobs(mb, prompt, "a0", outputs[0], 2)


def check_logprobs(mb, prompt, adapter, output, number):
    tokens = output.generated_tokens
    rows = logits_after(mb, [*prompt, *tokens[:-1]], adapter)[len(prompt) - 1 :].log_softmax(-1)
    assert len(output.logprobs) == len(tokens)
    for row, token, found in zip(rows, tokens, output.logprobs):
        assert found.chosen == pytest.approx(row[token].item(), abs=1e-4)
        values, likeliest = row.topk(number)
        assert [name for name, _ in found.top] == likeliest.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_logprobs_are_of_the_models_own_distribution(mb):
    inputs = prompts(3)
    cases = [(0, {}), (3, {"temperature": 1.7, "top_p": 0.8, "seed": 3}), (20, {"presence_penalty": 1.5})]
    requests = [
        (prompt, "a1", {"max_new_tokens": 6, "logprobs": number} | options)
        for prompt, (number, options) in zip(inputs, cases)
    ]
    outputs = run(mb, [*requests, (inputs[0], "a1", {"max_new_tokens": 6})])
    for prompt, (number, _), output in zip(inputs, cases, outputs):
        check_logprobs(mb, prompt, "a1", output, number)
    assert outputs[-1].logprobs == []


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ([{}], (PLAIN, False)),
        ([{}, {"logprobs": 2}], (PLAIN, True)),
        ([{"temperature": 1.0, "seed": 1}], (CHOSEN, False)),
        ([{}, {"presence_penalty": 1.0}], (CHOSEN, False)),
        ([{"temperature": 1.0, "seed": 1, "top_k": 3}, {"logprobs": 1}], (SORTED, True)),
    ],
)
def test_a_captured_graph_is_of_the_kind_that_a_step_wants(mb, asynchronous, monkeypatch, options, kind):
    seen = []
    requests = [(prompt, "a0", {"max_new_tokens": 2, **each}) for prompt, each in zip(prompts(len(options)), options)]
    with running(mb, **asynchronous) as manager:
        io = manager.batch_processor.inputs_and_outputs
        apply = Sampling.__call__

        def look(self, *args):
            seen.append(io.io_pairs[io.current_pair].device_io._get_graph_key()[-2:])
            return apply(self, *args)

        monkeypatch.setattr(Sampling, "__call__", look)
        run_with(manager, requests)
    assert seen and kind in seen and set(seen) <= {kind, (PLAIN, False), (PLAIN, kind[1]), (kind[0], False)}
