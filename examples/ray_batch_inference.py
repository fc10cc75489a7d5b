"""Complete a file of prompts, each with its adapter, on a Ray cluster.

    python examples/ray_batch_inference.py --input prompts.jsonl --out answers.jsonl --workers 8 --gpus-per-worker 1 \\
        --model path/to/model --adapter sql=path/to/sql --adapter poet=path/to/poet
    python examples/ray_batch_inference.py    # a trial: the demo's model and prompts, compared with PEFT

A line of the input is `{"prompt": "LOVE, n.", "adapter": "devil"}`, where null stands for the base model; other keys
are kept. Without `--model`, it uses SmolLM2-135M with the demo's three adapters. The output is in the order of the
input and written at the end.

If RAY_ADDRESS names a cluster, or one runs on this machine, it is used, and its workers must be able to read the model
and the adapters; otherwise Ray starts one here. If a worker dies, Ray restarts it and its batches.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import ray
import torch
import typer

import peft_multibatch
from peft_multibatch.demo.model import ADAPTERS_DIR
from peft_multibatch.demo.prompts import complete, hold_to_peft, load, named_paths, read_requests, replace
from peft_multibatch.demo.run import ADAPTERS, PROMPTS


RETRIES = 3
"""By default Ray retries forever, even a batch that never fits into memory."""


class Writer:
    """A worker, which keeps the model, its adapters and the tokenizer."""

    def __init__(self, model: str, adapters: dict[str, str], dtype: str, max_new_tokens: int) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"  # Ray shows a worker its own GPUs
        self.model, self.tokenizer = load(model, adapters, dtype, device)
        peft_multibatch.enable(self.model)
        self.max_new_tokens = max_new_tokens

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        prompts, ids = batch["prompt"].tolist(), batch["adapter"].tolist()
        completions = complete(self.model, self.tokenizer, prompts, self.max_new_tokens, adapter_ids=ids)
        return {"row": batch["row"], "completion": completions}


def answer(
    requests: list[dict[str, Any]], writer: dict[str, Any], workers: int, gpus_per_worker: float, batch_size: int
) -> list[dict[str, Any]]:
    """Return the requests with their completions, in the same order."""
    rows = [
        {"row": index, "prompt": request["prompt"], "adapter": request["adapter"] or "__base__"}
        for index, request in enumerate(requests)
    ]
    dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // batch_size) or 1).map_batches(
        Writer,
        fn_constructor_kwargs=writer,
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=gpus_per_worker,
        max_task_retries=RETRIES,
    )
    found = {row["row"]: row["completion"] for row in dataset.iter_rows()}  # rows arrive in order of completion
    return [{**request, "completion": found[index]} for index, request in enumerate(requests)]


def main(
    input: Path | None = None,
    out: Path | None = None,
    model: str = "",
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=PATH; repeatable")] = None,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_worker: Annotated[float, typer.Option(min=0)] = 0,
    dtype: str = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 16,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    compare: Annotated[bool, typer.Option("--compare", help="compare with PEFT, row by row, on this machine")] = False,
) -> None:
    """Complete the prompts of INPUT, each with its adapter, into OUT."""
    trial = out is None
    if (input is None) != trial or bool(model) != bool(adapter) or (trial and model):
        raise SystemExit("expected --input with --out, and --model with --adapter, or none of them for a trial.")
    if out is not None and not out.parent.is_dir():
        raise SystemExit(f"--out {out}: expected a file in an existing folder.")
    adapters = named_paths(adapter or [f"{name}={ADAPTERS_DIR / name}" for name in ADAPTERS])
    if input is None:
        requests = [{"prompt": text, "adapter": None if name == "__base__" else name} for name, text in PROMPTS[:4]]
    else:
        requests = read_requests(input, adapters)
    writer = {
        "model": os.path.abspath(model) if Path(model).exists() and model else model,
        "adapters": adapters,
        "dtype": dtype,
        "max_new_tokens": max_new_tokens,
    }

    ray.init()
    try:
        answers = answer(requests, writer, workers, gpus_per_worker, batch_size)
    finally:
        ray.shutdown()

    if out is not None:
        replace(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers))
        print(f"{out}: {len(answers)} rows")
    if trial or compare:
        kept = Writer(**writer)
        hold_to_peft(kept.model, kept.tokenizer, answers, max_new_tokens)


if __name__ == "__main__":
    typer.run(main)
