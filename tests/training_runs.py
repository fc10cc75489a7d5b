"""Runs that differ in every respect, and the same ones with plain PyTorch and PEFT, one adapter at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from models import SIZES
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import get_scheduler

from peft_multibatch.training import Run


STEPS = 20
ADAPTERS = ("three", "four", "eight")
ROWS = {"three": 2, "four": 1, "eight": 3}


def adamw_runs() -> dict[str, Run]:
    """Return runs with different learning rates, schedules, clipping, accumulation, decay and moments."""
    return {
        "three": Run(lr=1e-3, schedule="cosine", warmup_steps=3, steps=20, max_grad_norm=0.5),
        "four": Run(lr=3e-4, weight_decay=0.1, accumulate=3, schedule="linear", steps=40, max_grad_norm=1e-3),
        "eight": Run(lr=2e-3, options={"betas": (0.8, 0.95), "eps": 1e-6}),
    }


def sgd_runs() -> dict[str, Run]:
    """Like ``adamw_runs``, with SGD, which doesn't hide a wrong normalization."""
    return {
        "three": Run(lr=0.01, optimizer=torch.optim.SGD, options={"momentum": 0.9}, schedule="linear", steps=30),
        "four": Run(lr=0.03, optimizer=torch.optim.SGD, weight_decay=0.1, accumulate=2, max_grad_norm=0.5),
        "eight": Run(lr=0.02, optimizer=torch.optim.SGD, schedule="cosine", warmup_steps=4, steps=25),
    }


def has_rows(name: str, step: int) -> bool:
    """Adapter four skips every third batch, and adapter eight has less data than the others."""
    return not (name == "four" and step % 3 == 1) and not (name == "eight" and step >= 14)


def batch_of(name: str, step: int) -> dict[str, torch.Tensor]:
    """Return the rows of one adapter at one step, with different lengths and numbers of labels."""
    generator = torch.Generator().manual_seed(1000 * ADAPTERS.index(name) + step)
    rows, length = ROWS[name], 9
    input_ids = torch.randint(2, SIZES["vocab_size"], (rows, length), generator=generator)
    padding = torch.randint(0, 5, (rows, 1), generator=generator)
    attention_mask = (torch.arange(length) >= padding).long()
    masked = padding + torch.randint(0, 3, (rows, 1), generator=generator)
    labels = torch.where(torch.arange(length) >= masked, input_ids, -100)
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask, "labels": labels}


def mixed_batch(step: int, names: tuple[str, ...] = ADAPTERS) -> tuple[dict[str, torch.Tensor], list[str]] | None:
    """Return the rows of all adapters at one step, interleaved."""
    batches = {name: batch_of(name, step) for name in names if has_rows(name, step)}
    if not batches:
        return None
    owners = [name for name, batch in batches.items() for _ in batch["labels"]]
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(step))
    mixed = {key: torch.cat([batch[key] for batch in batches.values()])[order] for key in batch_of("four", 0)}
    return mixed, [owners[row] for row in order]


def alone(
    model: PeftModel, name: str, run: Run, steps: int = STEPS, batch: Callable[[str, int], Any] = batch_of
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train this adapter alone with PEFT and a torch loop; returns parameters and the loss of every step."""
    model = copy.deepcopy(model)
    model.set_adapter(name)
    for other in ADAPTERS:
        if other != name:
            model.delete_adapter(other)
    parameters = {key: each for key, each in model.named_parameters() if each.requires_grad}
    decay = {} if run.weight_decay is None else {"weight_decay": run.weight_decay}
    optimizer = (run.optimizer or torch.optim.AdamW)(parameters.values(), lr=run.lr, **decay, **run.options)
    schedule = get_scheduler(run.schedule or "constant_with_warmup", optimizer, run.warmup_steps or 0, run.steps)
    waiting, losses = [], []
    for step in range(steps):
        if not has_rows(name, step):
            continue
        waiting.append(batch(name, step))
        if len(waiting) < run.accumulate:
            continue
        items = sum(int((each["labels"][:, 1:] != -100).sum()) for each in waiting)
        total = 0.0
        for each in waiting:
            logits = model(each["input_ids"], attention_mask=each["attention_mask"]).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), each["labels"][:, 1:].flatten(), reduction="sum") / items
            loss.backward()
            total += loss.item()
        if run.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters.values(), run.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
        waiting = []
    return {key: each.detach() for key, each in parameters.items()}, losses
