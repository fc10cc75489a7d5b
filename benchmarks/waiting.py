"""Benchmark steps of continuous batching by the number of waiting requests, in a tiny model on a CPU.

    python benchmarks/waiting.py                       # results/waiting.csv beside this script
    python benchmarks/waiting.py --counts 100,1000 --seconds 1 --out waiting.csv

All requests are added first, and each way runs for the same time with 8 requests at once: transformers' continuous
batching of the base model; 12 adapters of PEFT; 12 adapters in a store; and as many stored adapters as requests, of
which 64 fit into memory. ``choosing_ms`` is the mean time per step that choosing requests takes, and ``step_ms`` that
of a whole step.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from end_to_end import PROJECTIONS, TINY, console, versions, write
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import ContinuousBatchingConfig

import peft_multibatch


RESULTS = Path(__file__).parent / "results"
BASE, PEFT, STORED, DIFFERENT = "base", "12 adapters of PEFT", "12 stored adapters", "a stored adapter per request"
RUNNING, ADAPTERS, ROOM = 8, 12, 64


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **TINY)).eval()


def peft_model() -> PeftModel:
    """Build a model with the adapters ``a0`` and so on."""
    config = LoraConfig(r=8, target_modules=PROJECTIONS, init_lora_weights=False, task_type="CAUSAL_LM")
    model: Any = get_peft_model(base_model(), config, adapter_name="a0")
    for number in range(1, ADAPTERS):
        model.add_adapter(f"a{number}", config)
    return model.eval()


@contextlib.contextmanager
def session(way: str, count: int, root: Path) -> Iterator[tuple[Any, list[Any]]]:
    """A manager of continuous batching, and ids for its requests."""
    options: dict[str, Any] = {
        "generation_config": GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0),
        "continuous_batching_config": ContinuousBatchingConfig(
            use_cuda_graph=False, num_blocks=64, max_requests_per_batch=RUNNING, max_batch_tokens=256
        ),
    }
    if way == BASE:
        with base_model().continuous_batching_context_manager(**options) as manager:
            yield manager, [None]
        return
    model = peft_model() if way == PEFT else base_model()
    mb = peft_multibatch.enable(model)
    ids = [f"a{number}" for number in range(count if way == DIFFERENT else ADAPTERS)]
    if way != PEFT:
        size = sum(path.stat().st_size for path in (root / "a1").glob("*.safetensors")) + 4096
        store = mb.adapter_store(ROOM * size)
        for number, name in enumerate(ids):
            store.register(name, root / f"a{number % ADAPTERS}")
    with mb.continuous_batching(**options, warmup=False) as manager:
        yield manager, ids


def measure(way: str, count: int, seconds: float, root: Path) -> dict[str, float]:
    """Run one way with a number of waiting requests."""
    took: list[float] = []
    with session(way, count, root) as (manager, ids):
        for number in range(count):
            name = ids[number % len(ids)]
            options = {} if name is None else {"adapter_id": name}
            manager.add_request([1 + number % 900] * 12, max_new_tokens=8, **options)
        while manager.batch_processor is None or not manager.input_queue.empty():
            time.sleep(0.001)
        scheduler = manager.batch_processor.scheduler
        choose = scheduler._get_waiting_candidates

        def timed() -> list:
            begin = time.perf_counter()
            found = choose()
            took.append(time.perf_counter() - begin)
            return found

        scheduler._get_waiting_candidates, begin = timed, time.perf_counter()
        while time.perf_counter() - begin < seconds and len(scheduler.waiting_requests) > count // 10:
            time.sleep(0.01)
        whole, steps = time.perf_counter() - begin, len(took)
        manager.stop(block=False)
    found = took[:steps]
    return {
        "steps": steps,
        "choosing_ms": round(1e3 * statistics.mean(found), 3),
        "choosing_max_ms": round(1e3 * max(found), 3),
        "step_ms": round(1e3 * whole / steps, 3),
    }


def main(
    counts: str = "100,1000,10000", seconds: float = 5.0, out: Path = RESULTS / "waiting.csv", commit: str = ""
) -> None:
    """Measure every way with every number of waiting requests."""
    torch.set_num_threads(1)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        peft_model().save_pretrained(folder)
        for count in map(int, counts.split(",")):
            for way in (BASE, PEFT, STORED, DIFFERENT):
                found = measure(way, count, seconds, Path(folder))
                records.append({"waiting": count, "way": way} | found | versions(commit))
                console.print(f"{count} waiting, {way}: {found}")
                write(records, out)


if __name__ == "__main__":
    typer.run(main)
