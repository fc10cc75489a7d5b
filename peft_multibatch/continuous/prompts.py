"""Convert and validate what users pass for a request."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from peft_multibatch.errors import UnsupportedError


def tokens_of(input_ids: Any, vocabulary: int) -> list[int]:
    """Convert a prompt to a list of tokens.

    Args:
        input_ids: a sequence of integers, or a 1-D tensor or array of them.
        vocabulary: size of the model's vocabulary.

    Raises:
        UnsupportedError: it is something else, is empty, or has tokens outside the vocabulary.
    """
    found = integers_of("a prompt", input_ids)
    wrong = [token for token in found if not 0 <= token < vocabulary]
    if wrong or not found:
        raise UnsupportedError(
            f"a prompt has {len(found)} tokens{f', including {wrong[0]}' if wrong else ''}: "
            f"expected at least one, all from 0 to {vocabulary - 1}. Check the tokenizer."
        )
    return found


def ends_of(eos_token_id: Any) -> int | list[int] | None:
    """Convert the tokens that end a request: one, several, or None to use the generation configuration's.

    Raises:
        UnsupportedError: they are something else.
    """
    if eos_token_id is None:
        return None
    if isinstance(eos_token_id, (set, frozenset)):
        eos_token_id = list(eos_token_id)
    if hasattr(eos_token_id, "__index__") and not getattr(eos_token_id, "ndim", 0):
        return integers_of("eos_token_id", [eos_token_id])[0]
    return integers_of("eos_token_id", eos_token_id)


def limit_of(max_new_tokens: Any) -> int | None:
    """Convert ``max_new_tokens``.

    Raises:
        UnsupportedError: it is neither None nor an integer, or is negative.
    """
    limit = None if max_new_tokens is None else integers_of("max_new_tokens", [max_new_tokens])[0]
    if limit is not None and limit < 0:
        raise UnsupportedError(
            f"a request has max_new_tokens={limit}: expected at least 0. Leave it out for the limit of the generation "
            "config."
        )
    return limit


def prefix_of(input_ids: Any) -> list[int]:
    """Return a prompt as a sort key; an invalid prompt gives an empty list."""
    try:
        return integers_of("a prompt", input_ids)
    except UnsupportedError:
        return []


def check_options(processors: Any, options: dict[str, Any]) -> None:
    """Check a request's arguments for logits processors.

    Raises:
        UnsupportedError: transformers doesn't know them, or can't convert them to tensors.
    """
    if not options:
        return
    state = RequestState("", [0], logit_processor_kwargs=options)
    try:
        processors.check_kwargs(options)
        for each in processors.logits_processor:
            if isinstance(each, ContinuousBatchingLogitsProcessor):
                each.prepare_tensor_args([FutureRequestState(state, True, {}, 1)])
    except Exception as caught:
        raise UnsupportedError(
            f"a request was added with the arguments {options}, for which transformers raises "
            f"{type(caught).__name__} ({caught}): expected arguments of its logits processors. Leave out the others."
        ) from caught


def check_name(request_id: Any) -> None:
    """Check a request's id.

    Raises:
        UnsupportedError: it isn't hashable.
    """
    try:
        hash(request_id)
    except TypeError:
        raise UnsupportedError(
            f"a request's id is {request_id!r} of type {type(request_id).__name__}: expected something hashable, "
            "such as a string. Leave request_id out to have one generated."
        ) from None


def integers_of(what: str, values: Any) -> list[int]:
    """Convert a sequence of integers to a list.

    Args:
        what: how error messages refer to it.
        values: a sequence, or a 1-D tensor or array.

    Raises:
        UnsupportedError: it is something else.
    """
    shape = list(values.shape) if hasattr(values, "shape") else []
    if len(shape) == 1 and hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, (str, bytes, Tensor)) or not isinstance(values, Sequence):
        told = f"of shape {shape}" if shape else f"{values!r}" if values is None else "not a sequence of tokens"
        raise UnsupportedError(
            f"{what} is {told}, of type {type(values).__name__}: expected a list of integers or a 1-D integer "
            "tensor. Pass requests one by one."
        )
    try:
        if not any(isinstance(value, bool) for value in values):
            return list(map(operator.index, values))
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor that isn't a single number
        pass
    odd = next(each for each in values if isinstance(each, bool) or not _is_integer(each))
    raise UnsupportedError(f"{what} contains {odd!r} of type {type(odd).__name__}: expected integers. Convert it.")


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True
