"""A file of prompts, each with its adapter, completed by the workers of a Ray cluster.

    python examples/ray_batch_inference.py --input prompts.jsonl --out answers.jsonl --workers 8 --gpus-per-worker 1 \\
        --model path/to/model --adapter sql=path/to/sql --adapter poet=path/to/poet
    python examples/ray_batch_inference.py    # a trial: the demo's model and prompts, compared with PEFT

A line of the input is `{"prompt": "LOVE, n.", "adapter": "devil"}`, where null stands for the base model; other keys
are kept. Without `--model` it is SmolLM2-135M with the three adapters of the demo. The output is in the order of the
input and written at the end.

Where RAY_ADDRESS names a cluster, or one runs on this machine, its workers do the work, and must see the model and
the adapters; otherwise Ray begins one here. A worker that dies is started again by Ray, and so are its batches.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import ray
import torch
import typer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_multibatch
from peft_multibatch.demo.model import ADAPTERS_DIR, load_model
from peft_multibatch.demo.run import ADAPTERS, PROMPTS


RETRIES = 3
"""Ray's own default is to begin again for ever, also with a batch for which the memory never suffices."""


class Writer:
    """What every worker keeps: the model, its adapters and the tokenizer."""

    def __init__(self, model: str, adapters: dict[str, str], dtype: str, max_new_tokens: int) -> None:
        if model:
            self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
            self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        else:
            loaded, self.tokenizer = load_model(torch.float32 if dtype == "auto" else getattr(torch, dtype))
        (first, path), *others = adapters.items()
        self.model = PeftModel.from_pretrained(loaded, path, adapter_name=first)
        for name, path in others:
            self.model.load_adapter(path, adapter_name=name)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # Ray shows a worker its own GPUs
        peft_multibatch.enable(self.model)
        self.max_new_tokens = max_new_tokens

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        completions = self.complete(batch["prompt"].tolist(), adapter_ids=batch["adapter"].tolist())
        return {"row": batch["row"], "completion": completions}

    def complete(self, prompts: list[str], **ids: Any) -> list[str]:
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        inputs = inputs.to(self.model.device)
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, **ids)
        return self.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def named_paths(adapters: list[str]) -> dict[str, str]:
    """Adapters by name."""
    found: dict[str, str] = {}
    for each in adapters:
        name, _, path = each.partition("=")
        if not path or name in ("", "__base__", *found):
            raise SystemExit(f"--adapter {each}: expected NAME=PATH, with a name that no other adapter has.")
        found[name] = os.path.abspath(path) if Path(path).exists() else path  # workers run in folders of their own
    return found


def read_requests(path: Path, adapters: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of the input, after all of them were checked."""
    requests = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # fails for half of a surrogate pair, which is no text
        except ValueError as error:
            raise SystemExit(f"{path}, line {number}: expected JSON, one object a line, but {error}.") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
            raise SystemExit(f'{path}, line {number}: expected an object with a "prompt" that is a text, not empty.')
        if "completion" in row:
            raise SystemExit(f'{path}, line {number}: has a "completion" already, which the answer would replace.')
        if "adapter" not in row or row["adapter"] not in [None, *adapters]:
            raise SystemExit(
                f'{path}, line {number}: "adapter" is {row.get("adapter", "missing")!r}: expected one of '
                f"{', '.join(adapters)}, or null for the base model. Pass --adapter NAME=PATH for others."
            )
        requests.append(row)
    return requests


def answer(
    requests: list[dict[str, Any]], writer: dict[str, Any], workers: int, gpus_per_worker: float, batch_size: int
) -> list[dict[str, Any]]:
    """The requests with their completions, in the same order."""
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
    found = {row["row"]: row["completion"] for row in dataset.iter_rows()}  # in the order in which they are ready
    return [{**request, "completion": found[index]} for index, request in enumerate(requests)]


def hold_to_peft(writer: Writer, answers: list[dict[str, Any]]) -> None:
    """Print every row, and hold it to what PEFT says for it alone."""
    peft_multibatch.disable(writer.model)
    for row in answers:
        if row["adapter"] is None:
            with writer.model.disable_adapter():
                alone = writer.complete([row["prompt"]])
        else:
            writer.model.set_adapter(row["adapter"])
            alone = writer.complete([row["prompt"]])
        assert alone == [row["completion"]], (alone, row)
        print(f"{row['prompt']!r}, adapter {row['adapter']}: {row['completion']!r}, as PEFT says")


def main(
    input: Path | None = None,
    out: Path | None = None,
    model: str = "",
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=PATH, once for every adapter")] = None,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_worker: Annotated[float, typer.Option(min=0)] = 0,
    dtype: str = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 16,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    compare: Annotated[bool, typer.Option("--compare", help="with PEFT, row by row, on this machine")] = False,
) -> None:
    """Complete the prompts of INPUT, each with its adapter, into OUT."""
    trial = out is None
    if (input is None) != trial or bool(model) != bool(adapter) or (trial and model):
        raise SystemExit("expected --input with --out, and --model with --adapter, or none of them for a trial.")
    if out is not None and not out.parent.is_dir():
        raise SystemExit(f"--out {out}: expected a file in a folder that is there.")
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
        unfinished = out.with_name(out.name + ".unfinished")
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
        os.replace(unfinished, out)
        print(f"{out}: {len(answers)} rows")
    if trial or compare:
        hold_to_peft(Writer(**writer), answers)


if __name__ == "__main__":
    typer.run(main)
