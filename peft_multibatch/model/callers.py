"""What can be known of the code that calls a model: whether it names what it passes, and keeps samples in order."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_multibatch.calls.call import Call
from peft_multibatch.errors import AdapterIdsError, RowMappingError, UnsupportedError
from peft_multibatch.layers.patch import STATE
from peft_multibatch.plan.ids import Entry


CACHES = ("cache", "past_key_values", "cache_params")
"""Arguments that carry a model's cache, in newer transformers and in older ones."""

SENTENCES = "sentence_transformers"
"""The library whose loops sort inputs by length."""

LOOPS = ("encode", "predict")
"""Its methods that do."""

FOLLOWED = f"peft_multibatch.model.{SENTENCES}"
"""The module by which inputs in these loops are followed."""

TRAINERS = "transformers.trainer"
"""The module of transformers' Trainer, from which TRL's are derived."""

STEPS = ("training_step", "prediction_step", "compute_loss")
"""Its methods that call the model."""

COLUMNS = ("adapter_ids", "adapter_names")
"""Columns of a dataset that say whose a row is."""

_columns: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


def reads(model: nn.Module, keyword: str, custom_generate: Any = None) -> bool:
    """Whether any part of a model, PEFT's aside, or a function in the place of ``generate`` has such a parameter."""
    classes = {type(part) for part in model.modules() if not type(part).__module__.startswith("peft.")}
    functions = [getattr(each, "forward", None) for each in classes] + [custom_generate]
    return any(keyword in inspect.signature(each).parameters for each in functions if inspect.isfunction(each))


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, or None."""
    return next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)


def check_order(entries: Sequence[Entry]) -> None:
    """Raise where ids of a block meet a loop that sorts, around a model that isn't itself the enabled one.

    Raises:
        UnsupportedError: they do.
    """
    if SENTENCES not in sys.modules or len({*entries}) < 2:
        return
    frame = sys._getframe(1)
    while frame is not None:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module == FOLLOWED:
            return
        if function in (*LOOPS, "_inference") and module.startswith(f"{SENTENCES}."):
            raise UnsupportedError(
                f"a model was called by Sentence Transformers' {function}, which sorts inputs by length, inside of "
                "mb.batch(...) with several adapters: expected the ids to follow the inputs. Pass the "
                "SentenceTransformer or CrossEncoder itself to peft_multibatch.enable."
            )
        frame = frame.f_back  # type: ignore[assignment]


def check_trainer(handle: Any, has_ids: bool) -> None:
    """Raise where a Trainer calls an enabled model, and rows would run under other adapters than their own.

    Args:
        handle: of the model.
        has_ids: ids were passed, or are active.

    Raises:
        AdapterIdsError: the Trainer's dataset has ids, which were lost on the way.
        UnsupportedError: it is one of TRL's that compare the model with a reference, which would have the same ids.
    """
    if TRAINERS not in sys.modules:
        return
    frame = sys._getframe(1)
    while frame.f_code.co_name not in STEPS or not isinstance(
        frame.f_locals.get("self"), sys.modules[TRAINERS].Trainer
    ):
        if frame.f_back is None:
            return
        frame = frame.f_back
    trainer = frame.f_locals["self"]
    if getattr(trainer.model, STATE, None) is not handle:
        return
    name = type(trainer).__name__
    if has_ids:
        if hasattr(trainer, "ref_model") and frame.f_globals["__name__"].startswith("trl."):
            raise UnsupportedError(
                f"{name} called a model with ids, which would hold for its reference as well: expected none. Train "
                "one adapter at a time without ids, or write a loop in which policies and references are ids, as "
                "examples/dpo_reference.py does."
            )
        return
    if trainer not in _columns:
        _columns[trainer] = _column_of(trainer)
    column = _columns[trainer]
    if column is not None:
        raise AdapterIdsError(
            f"the dataset of {name} has a column {column!r} that didn't reach the model: expected ids for every "
            "batch. Pass data_collator=peft_multibatch.training.AdapterCollator(...), and to TRL's SFTTrainer "
            "remove_unused_columns=False as well. TRL's other trainers know no ids: train one adapter at a time, or "
            "write a loop as examples/dpo_reference.py does."
        )


def _column_of(trainer: Any) -> str | None:
    """The column with ids of a Trainer's datasets, or None."""
    given = [getattr(trainer, "train_dataset", None), getattr(trainer, "eval_dataset", None)]
    datasets: list[Any] = [each for part in given for each in (part.values() if isinstance(part, Mapping) else [part])]
    for dataset in datasets:
        names = getattr(dataset, "column_names", None)
        if names is None and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset):
            row = dataset[0]
            names = [*row] if isinstance(row, Mapping) else None
        for name in names or ():
            if name in COLUMNS:
                return name
    return None


def check_prompts(call: Call, input_ids: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise where a ``custom_generate`` put samples in another order than the one in which they have their ids.

    Args:
        call: has the prompts, a row for each sample.
        input_ids: what a forward inside ``generate`` got.
        kwargs: its arguments.

    Raises:
        RowMappingError: a row that begins with another sample's prompt.
    """
    prompts = call.prompts
    if prompts is None or not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        return
    samples, tokens = prompts.shape
    cache = cache_of(kwargs)
    if len(input_ids) % samples or input_ids.shape[1] < tokens or (cache is not None and cache.get_seq_length()):
        return
    rows = torch.cat([prompts.to(input_ids.device), input_ids[:, :tokens]])
    known, found = rows.unique(dim=0, return_inverse=True)[1].split(
        [samples, len(input_ids)]
    )  # equal rows, one number
    is_another = found != known.repeat_interleave(len(input_ids) // samples)
    if (is_another & torch.isin(found, known)).any():
        raise RowMappingError(
            f"custom_generate put {len(input_ids)} rows in an order in which some begin with the prompt of another of "
            f"the {samples} samples: expected a sample's rows side by side. Write repeat_interleave where it says "
            "repeat or cat."
        )
