"""Helpers for tests of continuous batching: settings, prompts, expected tokens and results."""

from __future__ import annotations

import dataclasses
import time

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import RequestState

from peft_multibatch.continuous.scheduler import KEY, FairScheduler, entry_of


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def settings(blocks=48, **options):
    """A cache with blocks of 16 tokens; newer versions of transformers name the field differently."""
    fields = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    size = {"page_size" if "page_size" in fields else "block_size": 16}
    if "auto_switch_to_flash" in fields:
        options["auto_switch_to_flash"] = False
    return ContinuousBatchingConfig(
        **size, num_blocks=blocks, max_batch_tokens=64, **{"use_cuda_graph": False} | options
    )


def generation(**options):
    return GenerationConfig(
        **{"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0} | options
    )


def prompts(number, longest=40):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest, (number,), generator=generator).tolist()
    return [torch.randint(2, 160, (length,), generator=generator).tolist() for length in lengths]


def row_by_row(model, inputs, entries, tokens=8):
    """Generate for every prompt by itself; tests/model/test_generate.py compares this with PEFT."""
    return [
        model.generate(
            input_ids=torch.tensor([prompt], device=DEVICE),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=DEVICE),
            adapter_ids=[entry],
            generation_config=generation(max_new_tokens=tokens),
        )[0, len(prompt) :].tolist()
        for prompt, entry in zip(inputs, entries)
    ]


def results(manager, number, timeout=60):
    """Return the last output of each of ``number`` requests."""
    found, end = {}, time.monotonic() + timeout
    while len(found) < number and time.monotonic() < end:
        output = manager.get_result(timeout=1)
        if output is not None and output.is_finished():
            found[output.request_id] = output
    assert len(found) == number, found
    return found


class Simulation:
    """Requests of ten tokens in a fair scheduler's queues, which are served one after the other."""

    def __init__(self):
        self._queue, self._waiting = FairScheduler(), {}

    def arrive(self, entry):
        state = RequestState(object(), [1] * 10, logit_processor_kwargs={KEY: entry})
        self._waiting[state.request_id] = state
        self._queue.add(state)

    def serve(self):
        """Serve the next request, and return its entry."""
        self._queue.update(self._waiting, ())
        (state,) = (each.state for each in self._queue.except_of(lambda adapters: False, 1))
        del self._waiting[state.request_id]
        entry = entry_of(state)
        self._queue.charge(entry, 10)
        return entry
