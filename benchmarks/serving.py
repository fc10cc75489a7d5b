"""The server over HTTP on loopback, against the same requests given to its manager directly.

    python benchmarks/serving.py [--requests 64] [--clients 16] [--tokens 32] [--output serving.csv]

The demo's model, with 1, 8 and 32 adapters. Every answer is first compared with the manager's.
"""

from __future__ import annotations

import asyncio
import csv
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import uvicorn
from openai import AsyncOpenAI
from safetensors.torch import load_file, save_file

from peft_multibatch.demo.model import ADAPTERS_DIR, load_model
from peft_multibatch.serve.app import build_app
from peft_multibatch.serve.catalog import Target
from peft_multibatch.serve.engine import Engine
from peft_multibatch.serve.jobs import Job
from peft_multibatch.serve.settings import Settings


WEIGHTS = "adapter_model.safetensors"
Run = tuple[str, float, float]  # text, seconds to the first token, seconds to the last


def make_adapters(folder: Path, count: int) -> list[str]:
    """Adapters `a0`, `a1`, ...: the demo's, each a little different."""
    generator = torch.Generator().manual_seed(0)
    sources = sorted(path for path in ADAPTERS_DIR.iterdir() if path.is_dir())
    for number in range(count):
        source, target = sources[number % len(sources)], folder / f"a{number}"
        shutil.copytree(source, target)
        tensors = load_file(source / WEIGHTS)
        noise = {key: torch.randn(each.shape, generator=generator) for key, each in tensors.items()}
        save_file({key: each + 0.001 * noise[key].to(each) for key, each in tensors.items()}, target / WEIGHTS)
    return [f"a{number}" for number in range(count)]


async def in_turns(ask: Callable[[int], Awaitable[Run]], requests: int, clients: int) -> tuple[list[Run], float]:
    """So many requests, by so many clients, each of which sends its next one when it has its answer."""
    numbers, found = iter(range(requests)), {}

    async def client() -> None:
        for number in numbers:
            found[number] = await ask(number)

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return [found[number] for number in range(requests)], time.perf_counter() - begin


async def measure(engine: Engine, url: str, names: list[str], requests: int, clients: int, tokens: int) -> list[dict]:
    """Rows of the table: the manager, and the server."""
    prompts = [f"Item {number}: the night is long, and" for number in range(requests)]

    async def by_manager(number: int) -> Run:
        begin, ids, first = time.perf_counter(), engine.tokenizer(prompts[number]).input_ids, 0.0
        name = names[number % len(names)]
        job = Job(str(number), Target(name, name, (name,)), [ids], "prompt", max_tokens=tokens, is_streamed=True)
        job.ignore_eos, text = True, ""
        async for delta in engine.run(job):
            first, text = first or time.perf_counter() - begin, text + delta.text
        return text, first, time.perf_counter() - begin

    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)

    async def by_server(number: int) -> Run:
        begin, first, text = time.perf_counter(), 0.0, ""
        async for chunk in await client.completions.create(
            model=names[number % len(names)], prompt=prompts[number], max_tokens=tokens, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        ):  # fmt: skip
            first, text = first or time.perf_counter() - begin, text + chunk.choices[0].text
        return text, first, time.perf_counter() - begin

    for name in names:
        await engine.catalog.find(name)
    expected, _ = await in_turns(by_manager, requests, clients)  # warms up as well
    rows = []
    for way, ask in (("manager", by_manager), ("server", by_server), ("manager", by_manager), ("server", by_server)):
        found, seconds = await in_turns(ask, requests, clients)
        assert [text for text, *_ in found] == [text for text, *_ in expected], f"{way} gave other texts"
        firsts = statistics.quantiles([first for _, first, _ in found], n=100)
        rows.append({
            "way": way, "adapters": len(names), "requests": requests, "clients": clients, "tokens": tokens,
            "requests_per_second": round(requests / seconds, 3),
            "tokens_per_second": round(requests * tokens / seconds, 1),
            "first_token_p50": round(firsts[49], 4), "first_token_p95": round(firsts[94], 4),
            "first_token_p99": round(firsts[98], 4),
        })  # fmt: skip
        print(rows[-1], flush=True)
    await client.close()
    return rows


def main(
    requests: Annotated[int, typer.Option(min=8)] = 64,
    clients: Annotated[int, typer.Option(min=1)] = 16,
    tokens: Annotated[int, typer.Option(min=1)] = 32,
    device: str = "cpu",
    port: int = 8765,
    output: Annotated[Path | None, typer.Option(help="A CSV to write.")] = None,
) -> None:
    """Measure both, twice, in turns."""
    model, tokenizer = load_model(device=device)
    with tempfile.TemporaryDirectory() as folder:
        names = make_adapters(Path(folder), 32)
        settings = Settings(adapters_dir=Path(folder), max_batch=clients, max_cache_tokens=128 * clients)
        engine = Engine(model, tokenizer, settings)
        engine.start()
        server = uvicorn.Server(uvicorn.Config(build_app(engine), port=port, log_level="warning"))

        async def run() -> list[dict]:
            rows = []
            for count in (1, 8, 32):
                url = f"http://127.0.0.1:{port}"
                rows += await measure(engine, url, names[:count], requests, clients, tokens)
            return rows

        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            rows = asyncio.run(run())
        finally:
            server.should_exit = True
            thread.join()
    if output is not None:
        common: dict[str, Any] = {"device": device, "cores": os.cpu_count(), "machine": platform.machine()}
        common |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        with output.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*common, *rows[0]], lineterminator="\n")
            writer.writeheader()
            writer.writerows(common | row for row in rows)


if __name__ == "__main__":
    typer.run(main)
