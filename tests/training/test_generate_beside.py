"""Generating during training: new weights apply at once, old prefixes aren't used, and no request mixes versions."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from batching import generation, results, row_by_row, settings
from models import left_padded, peft_model
from tolerances import relative_error
from training_runs import STEPS, mixed_batch, sgd_runs
from transformers import GenerationConfig

import peft_multibatch
from peft_multibatch.training import AdapterOptimizer, Run, sample_losses


NAMES = ("three", "four", "eight")
PROMPT = [5 + 7 * place % 150 for place in range(40)]  # more than two blocks of the cache


def enabled():
    model = peft_model()
    return model, peft_multibatch.enable(model)


def fast():
    """Return runs in which every step changes the most likely tokens."""
    return {name: Run(lr=0.01, options={"eps": 1e-3}) for name in NAMES}


def train(model, optimizer, step):
    batch, ids = mixed_batch(step)
    labels = batch.pop("labels")
    losses, items = sample_losses(model(**batch, adapter_ids=ids).logits, labels)
    optimizer.loss(losses, items, ids).backward()
    return optimizer.step()


def test_generate_between_steps():
    """Tokens match those of PEFT with a copy of the current weights."""
    model, _ = enabled()
    optimizer, inputs, seen = AdapterOptimizer(model, fast()), left_padded(), []
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    ids = ["three", "__base__", "eight", "four", "eight", "three"]
    for step in range(4):
        train(model, optimizer, step)
        plain = copy.deepcopy(model)
        tokens = model.generate(**inputs, adapter_ids=ids, generation_config=config)
        for row, name in enumerate(ids):
            own = {key: value[row : row + 1] for key, value in inputs.items()}
            if name == "__base__":
                with plain.disable_adapter():
                    expected = plain.generate(**own, generation_config=config)
            else:
                plain.set_adapter(name)
                expected = plain.generate(**own, generation_config=config)
            assert torch.equal(tokens[row : row + 1], expected)
        seen.append(tokens)
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(seen))


@pytest.mark.parametrize("how", ["optimizer", "torch"])
def test_no_prefix_of_old_weights_between_steps(how):
    model, mb = enabled()
    optimizer, seen = AdapterOptimizer(model, fast()), []
    if how == "torch":
        own = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    hits = 0
    with mb.continuous_batching(
        generation_config=generation(), continuous_batching_config=settings(allow_block_sharing=True)
    ) as manager:
        for step in range(4):
            expected = row_by_row(model, [PROMPT], ["three"])[0]
            for asked in range(2):
                manager.add_request(PROMPT, adapter_id="three")
                (output,) = results(manager, 1).values()
                assert output.generated_tokens == expected
                assert (manager.prefix_hits > hits) == bool(asked)
                hits = manager.prefix_hits
            seen.append(expected)
            if how == "optimizer":
                train(model, optimizer, step)
            else:
                model(torch.tensor([PROMPT]), labels=torch.tensor([PROMPT]), adapter_ids=["three"]).loss.backward()
                own.step()
                own.zero_grad()
    assert len({*map(tuple, seen)}) > 1


def test_training_beside_requests():
    """Every request gets the tokens of one version of the weights, and training is the same as without requests."""
    model, mb = enabled()
    optimizer = AdapterOptimizer(model, fast())
    snapshots, asked = [copy.deepcopy(model)], {}
    with mb.continuous_batching(
        generation_config=generation(max_new_tokens=12), continuous_batching_config=settings(allow_block_sharing=True)
    ) as manager:
        for step in range(6):
            for name in NAMES:
                request = f"{name}/{step}"
                manager.add_request(PROMPT[step:], request_id=request, adapter_id=name)
                asked[request] = name, step
            train(model, optimizer, step)
            snapshots.append(copy.deepcopy(model))
        found = results(manager, len(asked))
    for each in snapshots:
        peft_multibatch.enable(each)
    versions = []
    for request, (name, step) in asked.items():
        assert found[request].error is None
        every = [row_by_row(each, [PROMPT[step:]], [name], tokens=12)[0] for each in snapshots]
        matches = [number for number, tokens in enumerate(every) if tokens == found[request].generated_tokens]
        assert matches and matches[-1] >= step, (request, matches)
        versions.append(len(set(map(tuple, every))))
    assert max(versions) > 2  # tokens of different versions differ
    alone, _ = enabled()
    other = AdapterOptimizer(alone, fast())
    for step in range(6):
        train(alone, other, step)
    for (key, mine), theirs in zip(model.named_parameters(), alone.parameters()):
        assert torch.equal(mine, theirs), key


def test_a_step_inside_of_a_block_of_changes():
    model, mb = enabled()
    optimizer = AdapterOptimizer(model, sgd_runs())
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=settings()) as manager:
        with manager.changing("three"):
            assert "three" in train(model, optimizer, 0)
        manager.add_request(PROMPT, adapter_id="three")
        (output,) = results(manager, 1).values()
        assert output.generated_tokens == row_by_row(model, [PROMPT], ["three"])[0]


def test_evaluating_by_generation_leaves_training_as_it_is():
    (one, _), (other, _) = enabled(), enabled()
    for model in (one, other):
        optimizer = AdapterOptimizer(model, sgd_runs())
        for step in range(STEPS // 2):
            train(model, optimizer, step)
            if model is other:
                model.generate(**left_padded(), adapter_ids=["three", "four", "eight", -1, -1, 0], max_new_tokens=2)
    for (key, mine), theirs in zip(one.named_parameters(), other.parameters()):
        assert relative_error(mine, theirs) == 0, key
