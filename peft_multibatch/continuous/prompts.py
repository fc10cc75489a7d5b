"""What users pass for a request → integers that the loop can run, or an error."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from peft_multibatch.errors import UnsupportedError


def tokens_of(input_ids: Any, vocabulary: int) -> list[int]:
    """A prompt as a list of tokens.

    Args:
        input_ids: a sequence of integers, or a 1-D tensor or array of them.
        vocabulary: how many tokens the model knows.

    Raises:
        UnsupportedError: it is something else, is empty, or has tokens that the model doesn't know.
    """
    found = integers_of("a prompt", input_ids)
    wrong = [token for token in found if not 0 <= token < vocabulary]
    if wrong or not found:
        raise UnsupportedError(
            f"a prompt has {len(found)} tokens, {f'among them {wrong[0]}' if wrong else 'that is none'}: "
            f"expected at least one, all from 0 to {vocabulary - 1}. Check the tokenizer."
        )
    return found


def ends_of(eos_token_id: Any) -> int | list[int] | None:
    """The tokens with which a request ends: one, several, or None where the generation configuration tells.

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
    """How many tokens a request asks for.

    Raises:
        UnsupportedError: it is neither an integer nor None.
    """
    return None if max_new_tokens is None else integers_of("max_new_tokens", [max_new_tokens])[0]


def prefix_of(input_ids: Any) -> list[int]:
    """A prompt by which others are sorted; of what is none, nothing."""
    try:
        return integers_of("a prompt", input_ids)
    except UnsupportedError:
        return []


def check_options(processors: Any, options: dict[str, Any]) -> None:
    """Raise where a request's arguments for logits processors can't be used.

    Raises:
        UnsupportedError: transformers doesn't know them, or can't put them into its tensors.
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
            f"a request has the arguments {options}, with which transformers raises {type(caught).__name__} "
            f"({caught}): expected those that its logits processors take. Leave them out."
        ) from caught


def check_name(request_id: Any) -> None:
    """Raise where a request can't be told from others by an id.

    Raises:
        UnsupportedError: it isn't hashable.
    """
    try:
        hash(request_id)
    except TypeError:
        raise UnsupportedError(
            f"a request's id is {request_id!r} of type {type(request_id).__name__}: expected something hashable, "
            "such as a string. Leave request_id out to have one made up."
        ) from None


def integers_of(what: str, values: Any) -> list[int]:
    """A sequence of integers as a list.

    Args:
        what: what it is, for messages.
        values: a sequence, or a 1-D tensor or array.

    Raises:
        UnsupportedError: it is something else.
    """
    shape = list(values.shape) if hasattr(values, "shape") else []
    if len(shape) == 1 and hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, (str, bytes, Tensor)) or not isinstance(values, Sequence):
        told = f"of shape {shape}" if shape else f"{values!r}" if values is None else "no sequence of tokens"
        raise UnsupportedError(
            f"{what} is {told}, of type {type(values).__name__}: expected a list of integers, or a 1-D tensor of "
            "them. Pass requests one by one."
        )
    try:
        if not any(isinstance(value, bool) for value in values):
            return list(map(operator.index, values))
    except (TypeError, ValueError, RuntimeError):  # a tensor's own, of something that is no number
        pass
    odd = next(each for each in values if isinstance(each, bool) or not _is_integer(each))
    raise UnsupportedError(f"{what} has {odd!r} of type {type(odd).__name__}: expected integers. Convert it.")


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True
