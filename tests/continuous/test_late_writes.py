"""What steps read is written on another stream; here the writes are late, because a kernel of `torch.cuda._sleep` is
in front of them, and the host is ahead.
"""

from __future__ import annotations

import pytest
import torch
from batching import generation, prompts, results, row_by_row, settings
from models import peft_model
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs

import peft_multibatch


pytestmark = pytest.mark.gpu

LONG = 200_000_000
"""Cycles, about a tenth of a second."""

ENTRIES = ["three", "__base__", "eight", "four"]


@pytest.fixture
def enabled():
    model = peft_model().cuda()
    mb = peft_multibatch.enable(model)
    yield model, mb
    mb.disable()


def check(model, mb, number, **options):
    inputs, entries = prompts(number), (ENTRIES * number)[:number]
    want = row_by_row(model, inputs, entries)
    config = settings(40, **options)
    with mb.continuous_batching(generation_config=generation(), continuous_batching_config=config) as manager:
        names = manager.add_requests(inputs, adapter_ids=entries)
        found = results(manager, number, timeout=120)
    assert [found[name].generated_tokens for name in names] == want


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_inputs_of_asynchronous_steps_are_filled_before_the_first_step_copies_its_own(enabled, monkeypatch, graphs):
    create = ContinuousBatchingManager._create_batch_processor

    def create_late(self):
        processor = create(self)
        for pair in processor.inputs_and_outputs.io_pairs:
            torch.cuda._sleep(LONG)
            pair.device_io._reset_static_tensors(full_reset=True)  # as it has just done
        return processor

    monkeypatch.setattr(ContinuousBatchingManager, "_create_batch_processor", create_late)
    check(*enabled, 8, use_cuda_graph=graphs, use_async_batching=True)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_synchronous_steps_wait_for_their_inputs(enabled, monkeypatch, graphs):
    """A single request, whose steps have the same plan: no plan is copied, which would wait for other streams."""
    prepare = ContinuousBatchingIOs.prepare_batch_tensors

    def prepare_late(self, *args, **kwargs):
        prepare(self, *args, **kwargs)
        for each in (self.write_index_storage, self.read_index_storage):
            written = each.clone()
            each.zero_()
            torch.cuda._sleep(LONG // 10)
            each.copy_(written)

    monkeypatch.setattr(ContinuousBatchingIOs, "prepare_batch_tensors", prepare_late)
    check(*enabled, 1, use_cuda_graph=graphs, use_async_batching=False)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_steps_after_a_change_read_the_new_weights(backend):
    model, alone = peft_model().cuda(), peft_model().cuda()
    mb = peft_multibatch.enable(model, backend=backend)
    peft_multibatch.enable(alone, backend=backend)
    prompt = prompts(1)[0]

    def change(model):
        for name, module in model.named_modules():
            if name.endswith("lora_B.eight"):
                module.weight.data.mul_(-2)

    with mb.continuous_batching(
        generation_config=generation(), continuous_batching_config=settings(40, use_async_batching=True)
    ) as manager:
        for _ in range(2):  # the first round compiles kernels and allocates memory
            with manager.changing("eight"):
                torch.cuda._sleep(LONG)
                change(model)
            manager.add_request(prompt, adapter_id="eight")
            (output,) = results(manager, 1).values()
            change(alone)
            assert [output.generated_tokens] == row_by_row(alone, [prompt], ["eight"])
