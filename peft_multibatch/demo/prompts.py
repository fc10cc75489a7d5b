"""Read files of prompts with adapters, and run them, for the examples of batch inference."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_multibatch
from peft_multibatch.demo.model import load_model


def named_paths(adapters: list[str]) -> dict[str, str]:
    """Parse NAME=PATH arguments to paths by name."""
    found: dict[str, str] = {}
    for each in adapters:
        name, _, path = each.partition("=")
        if not path or name in ("", "__base__", *found):
            raise SystemExit(f"--adapter {each}: expected NAME=PATH, with a name that isn't used twice.")
        found[name] = os.path.abspath(path) if Path(path).exists() else path  # workers may run in other folders
    return found


def read_requests(path: Path, adapters: dict[str, str]) -> list[dict[str, Any]]:
    """Read and validate the rows of the input."""
    requests = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # raises for lone surrogates
        except ValueError as error:
            raise SystemExit(f"{path}, line {number}: expected one JSON object per line, but {error}.") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
            raise SystemExit(f'{path}, line {number}: expected an object with a non-empty string "prompt".')
        if "completion" in row:
            raise SystemExit(f'{path}, line {number}: has a "completion", which the answer would overwrite.')
        if "adapter" not in row or row["adapter"] not in [None, *adapters]:
            raise SystemExit(
                f'{path}, line {number}: "adapter" is {row.get("adapter", "missing")!r}: expected one of '
                f"{', '.join(adapters)}, or null for the base model. Pass --adapter NAME=PATH for others."
            )
        requests.append(row)
    return requests


def replace(path: Path, text: str) -> None:
    """Write a file atomically."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load(model: str, adapters: dict[str, str], dtype: str, device: torch.device | str) -> tuple[PeftModel, Any]:
    """Load a model with its adapters, and its tokenizer; an empty path stands for the demo's model."""
    if model:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    else:
        loaded, tokenizer = load_model(torch.float32 if dtype == "auto" else getattr(torch, dtype))
    (first, path), *others = adapters.items()
    peft_model = PeftModel.from_pretrained(loaded, path, adapter_name=first)
    for name, path in others:
        peft_model.load_adapter(path, adapter_name=name)
    return peft_model.to(device).eval(), tokenizer


def complete(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, **ids: Any) -> list[str]:
    """Generate a greedy completion of each prompt."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **ids)
    return tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def hold_to_peft(model: Any, tokenizer: Any, answers: list[dict[str, Any]], max_new_tokens: int) -> None:
    """Print every row, after comparing it with what PEFT generates for it alone."""
    peft_multibatch.disable(model)
    for row in answers:
        if row["adapter"] is None:
            with model.disable_adapter():
                alone = complete(model, tokenizer, [row["prompt"]], max_new_tokens)
        else:
            model.set_adapter(row["adapter"])
            alone = complete(model, tokenizer, [row["prompt"]], max_new_tokens)
        assert alone == [row["completion"]], (alone, row)
        print(f"{row['prompt']!r}, adapter {row['adapter']}: {row['completion']!r} (matches PEFT)")
