"""Checks of the code that calls a model: its keyword arguments, and loops that reorder samples."""

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
"""Arguments with a model's cache, in newer and older versions of transformers."""

SENTENCES = "sentence_transformers"
"""The library whose loops sort inputs by length."""

LOOPS = ("encode", "predict")
"""Its methods that sort inputs."""

FOLLOWED = f"peft_multibatch.model.{SENTENCES}"
"""The module that keeps ids with their inputs in these loops."""

TRAINERS = "transformers.trainer"
"""The module of transformers' Trainer, the base class of TRL's trainers."""

STEPS = ("training_step", "prediction_step", "compute_loss")
"""Trainer's methods that call the model."""

COLUMNS = ("adapter_ids", "adapter_names")
"""Columns of a dataset with each row's adapter."""

_columns: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


def reads(model: nn.Module, keyword: str, custom_generate: Any = None) -> bool:
    """Whether a module of the model, other than PEFT's, or the custom generate function has such a parameter."""
    classes = {type(part) for part in model.modules() if not type(part).__module__.startswith("peft.")}
    functions = [getattr(each, "forward", None) for each in classes] + [custom_generate]
    return any(keyword in inspect.signature(each).parameters for each in functions if inspect.isfunction(each))


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, or None."""
    return next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)


def without_cached(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``generate`` without the tokens that its cache has already, as transformers cuts them off.

    Args:
        given: arguments by name.
    """
    cache, mask = cache_of(given), given.get("attention_mask")
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    texts = {name: given[name] for name in ("input_ids", "inputs") if isinstance(given.get(name), Tensor)}
    cut = {
        name: text[:, length:]
        for name, text in texts.items()
        if text.dim() == 2 and (mask is None or mask.shape[-1] == text.shape[1])  # otherwise these are new ones
    }
    return {**given, **cut}


def check_order(entries: Sequence[Entry]) -> None:
    """Check that no loop that sorts its inputs calls the model with the ids of a block.

    Raises:
        UnsupportedError: one does, and it belongs to a Sentence Transformers model that isn't enabled itself.
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
                f"a model was called by Sentence Transformers' {function}, which sorts inputs by length, inside "
                "mb.batch(...) with several adapters: expected ids in the order of the inputs. Pass the "
                "SentenceTransformer or CrossEncoder itself to peft_multibatch.enable, which keeps them together."
            )
        frame = frame.f_back  # type: ignore[assignment]


def check_trainer(handle: Any, has_ids: bool) -> None:
    """Check that a Trainer that calls an enabled model runs each row under the right adapter.

    Args:
        handle: the model's handle.
        has_ids: whether ids were passed, or are active.

    Raises:
        AdapterIdsError: the Trainer's dataset has ids, but they didn't reach the model.
        UnsupportedError: it is a TRL trainer with a reference model, which would get the same ids.
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
                f"{name} called a model with ids, which would apply to its reference model as well: expected no ids. "
                "Train one adapter at a time without ids, or write a loop with ids for policies and references, as "
                "in examples/dpo_reference.py."
            )
        return
    if trainer not in _columns:
        _columns[trainer] = _column_of(trainer)
    column = _columns[trainer]
    if column is not None:
        raise AdapterIdsError(
            f"the dataset of {name} has a column {column!r} that didn't reach the model: expected ids with every "
            "batch. Pass data_collator=peft_multibatch.training.AdapterCollator(...), and for TRL's SFTTrainer also "
            "remove_unused_columns=False. TRL's other trainers don't support ids: train one adapter at a time, or "
            "write a loop as in examples/dpo_reference.py."
        )


def _column_of(trainer: Any) -> str | None:
    """The column with ids in a Trainer's datasets, or None."""
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
    """Check that a ``custom_generate`` keeps samples in the order of their ids.

    Args:
        call: the call, with the prompts, one row per sample.
        input_ids: the input of a forward inside ``generate``.
        kwargs: its keyword arguments.

    Raises:
        RowMappingError: a row starts with another sample's prompt.
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
    )  # equal rows get equal numbers
    is_another = found != known.repeat_interleave(len(input_ids) // samples)
    if (is_another & torch.isin(found, known)).any():
        raise RowMappingError(
            f"custom_generate ordered {len(input_ids)} rows so that some start with the prompt of another one of the "
            f"{samples} samples: expected the rows of each sample next to each other. Use repeat_interleave instead "
            "of repeat or cat."
        )
