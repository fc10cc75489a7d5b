"""Calls on several CUDA streams: state kept between calls is written on one stream and read on another.

Streams are delayed with `torch.cuda._sleep`, so that the host is far ahead of one of them; nothing else orders
them.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from models import alone, base_model, peft_model
from peft import LoraConfig, PeftModel
from stored import logits, save_many
from threads import in_threads
from tolerances import assert_close
from torch import Tensor

import peft_multibatch


pytestmark = pytest.mark.gpu

LONG = 200_000_000
"""Cycles, about a tenth of a second."""

ROWS = 4


def prepared(backend: str) -> tuple[PeftModel, Any, Tensor]:
    model = peft_model().cuda()
    mb = peft_multibatch.enable(model, backend=backend)
    generator = torch.Generator().manual_seed(0)
    return model, mb, torch.randn(ROWS, 9, 48, generator=generator).cuda()


def layers(model: PeftModel) -> list[Any]:
    attention = model.base_model.model.model.layers[1].self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


@torch.no_grad()
def expected(model: PeftModel, name: str, hidden: Tensor) -> list[Tensor]:
    return [alone(model, name, lambda layer=layer: layer(hidden)) for layer in layers(model)]


@torch.no_grad()
def run(model: PeftModel, mb: Any, names: list[str], hidden: Tensor) -> list[Tensor]:
    with mb.batch(names):
        return [layer(hidden) for layer in layers(model)]


def check(found: list[Tensor], rows: dict[str, list[Tensor]], names: list[str]) -> None:
    for index, actual in enumerate(found):
        for row, name in enumerate(names):
            assert_close(actual[row], rows[name][index][row])


def add(model: PeftModel, name: str, seed: int) -> None:
    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj"]
    model.add_adapter(name, LoraConfig(r=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("other", [["four", "eight", "four", "three"], ["eight", "four", "three", "__base__"]])
def test_what_one_stream_wrote_is_read_on_another(backend, other):
    model, mb, hidden = prepared(backend)
    names = ["four", "eight", "four", "three"]
    rows = {name: expected(model, name, hidden) for name in {*names, *other}}
    run(model, mb, ["four"] * ROWS, hidden)  # compiles the kernels
    mb._router.forget()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        torch.cuda._sleep(LONG)
        slow = run(model, mb, names, hidden)
    with torch.cuda.stream(second):
        fast = run(model, mb, other, hidden)
    torch.cuda.synchronize()
    check(slow, rows, names)
    check(fast, rows, other)


def test_kernels_that_begin_early_read_what_was_written_right_before():
    """A kernel's first reads don't wait for the previous kernel; here the device never idles between the two."""
    model, mb, hidden = prepared("triton")
    mixes = [["four", "eight", "four", "three"], ["eight", "three", "__base__", "four"]]
    rows = {name: expected(model, name, hidden) for name in {*mixes[0], *mixes[1]}}
    for names in mixes:
        run(model, mb, names, hidden)
    (block,) = mb._registry.tables._blocks
    torch.cuda.synchronize()
    torch.cuda._sleep(20 * LONG)
    found = []
    for index in range(200):
        mb._router.forget()
        block.rows.zero_()
        block.numbers[:] = 0
        found.append(run(model, mb, mixes[index % 2], hidden))
    for index, actual in enumerate(found):
        check(actual, rows, mixes[index % 2])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_slots_and_memory_of_adapters_that_are_gone(backend):
    """A stream reads late what the host has deleted, while another stream runs adapters that replace it."""
    model, mb, hidden = prepared(backend)
    for round_ in range(3):
        names = [f"{round_}-{number}" for number in range(ROWS)]
        for seed, name in enumerate(names):
            add(model, name, 10 * round_ + seed)
        rows = {name: expected(model, name, hidden) for name in names}
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(first):
            torch.cuda._sleep(LONG)
            slow = run(model, mb, names, hidden)
        for name in names:
            model.delete_adapter(name)
        later = [f"{round_}+{number}" for number in range(ROWS)]
        for seed, name in enumerate(later):
            add(model, name, 100 + 10 * round_ + seed)
        with torch.cuda.stream(second):
            fast = run(model, mb, later, hidden)
        torch.cuda.synchronize()
        check(slow, rows, names)
        check(fast, {name: expected(model, name, hidden) for name in later}, later)
        for name in later:
            model.delete_adapter(name)


def test_one_block_on_two_streams():
    model, mb, hidden = prepared("triton")
    names = ["four", "eight", "four", "three"]
    rows = {name: expected(model, name, hidden) for name in names}
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.no_grad(), mb.batch(names):
        with torch.cuda.stream(first):
            torch.cuda._sleep(LONG)
            slow = [layer(hidden) for layer in layers(model)]
        with torch.cuda.stream(second):
            fast = [layer(hidden) for layer in layers(model)]
        torch.cuda.synchronize()
    check(slow, rows, names)
    check(fast, rows, names)


def test_plans_at_fixed_places():
    """Graphs that threads replay on separate streams, one after the other, read the plan of their own call."""
    model, mb, hidden = prepared("triton")
    mixes = [["four", "eight", "four", "three"], ["eight", "three", "__base__", "four"]]
    rows = {name: expected(model, name, hidden) for name in {*mixes[0], *mixes[1]}}
    graphs, outputs = [], []
    with torch.no_grad(), mb.batch(mixes[0]):
        for _ in mixes:  # each graph has its own memory
            with torch.cuda.stream(torch.cuda.Stream()):
                [layer(hidden) for layer in layers(model)]
            torch.cuda.synchronize()
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                outputs.append([layer(hidden) for layer in layers(model)])
    torch.cuda.synchronize()
    for names, graph in zip(mixes, graphs):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(LONG)
            with mb.batch(names):
                graph.replay()
    torch.cuda.synchronize()
    for names, found in zip(mixes, outputs):
        check(found, rows, names)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_threads_on_streams_of_their_own(backend):
    model, mb, hidden = prepared(backend)
    names = ["four", "eight", "three", "__base__"]
    rows = {name: expected(model, name, hidden) for name in names}
    torch.cuda.synchronize()

    def serve(generator):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                wanted = generator.choices(names, k=ROWS)
                torch.cuda._sleep(generator.choice([0, 1_000_000]))
                check(run(model, mb, wanted, hidden), rows, wanted)

    in_threads(serve)


def test_files_are_loaded_while_a_graph_is_captured(tmp_path):
    """Captures in torch's default mode fail if any thread allocates or waits."""
    save_many(tmp_path, 8)
    model = base_model().cuda()
    mb = peft_multibatch.enable(model)
    store = mb.adapter_store("1MB", "1MB")
    store.register_folder(tmp_path)
    inputs = {"input_ids": torch.randint(2, 160, (2, 9)).cuda()}
    logits(model, inputs, adapter_ids=["a0", "a1"])
    static = torch.zeros(64, device="cuda")
    for first in range(2, 8, 2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static.add_(1)
            store.prefetch(f"a{first}")
            store.prefetch(f"a{first + 1}")
            while store.stats().device_adapters < first + 2:
                time.sleep(0.001)
        static.zero_()
        graph.replay()
        assert float(static.sum()) == 64
