"""Losses per sample, which can be summed per adapter."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from peft_multibatch.errors import UnsupportedError


LOSS_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Relative difference between two ways of computing a loss; in other dtypes the model rounds it more."""

IGNORED = -100
"""The label that is ignored, as in transformers."""


def sample_losses(logits: Tensor, labels: Tensor, shift: bool = True) -> tuple[Tensor, Tensor]:
    """Compute the cross entropy of every sample, summed over its labels, and its number of labels.

    Args:
        logits: ``[samples, tokens, classes]``, or ``[samples, classes]`` of a classifier.
        labels: ``[samples, tokens]`` or ``[samples]``, integers; -100 is ignored.
        shift: whether the logits at a token predict the next label, as in causal language models. Pass False for
            token classification, masked language models and encoder-decoder models; ignored for classifiers.

    Returns:
        Losses ``[samples]``, in float32 or the logits' dtype if that is wider, and numbers of labels ``[samples]``.

    Raises:
        UnsupportedError: the shapes or dtypes don't fit a classification.

    Example:
        ```python
        losses, items = sample_losses(model(**inputs, adapter_ids=ids).logits, labels)
        optimizer.loss(losses, items, ids).backward()
        ```
    """
    fits = logits.shape[:-1] == labels.shape and logits.shape[-1] > 1  # with one class the loss would always be 0
    if labels.is_floating_point() or not fits or labels.dim() not in (1, 2):
        raise UnsupportedError(
            f"sample_losses got logits {list(logits.shape)} and labels {list(labels.shape)} of {labels.dtype}: "
            "expected logits [samples, tokens, classes] and integer labels [samples, tokens], or [samples, classes] "
            "and [samples], with two classes or more. Compute a loss per sample yourself and pass it to "
            "AdapterOptimizer.loss."
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    labels = labels.to(logits.device)
    if labels.dim() == 1:
        logits, labels = logits[:, None], labels[:, None]
    elif shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(labels.shape).sum(1), (labels != IGNORED).sum(1)


def matching_shift(logits: Tensor, labels: Tensor, loss: Tensor, expected: bool) -> bool:
    """Find out whether a model shifts labels, from the loss that it computed.

    Args:
        logits: as in ``sample_losses``.
        labels: as in ``sample_losses``.
        loss: the model's mean loss.
        expected: what to assume if both fit.

    Raises:
        UnsupportedError: neither fits, because the model computes another loss.
    """
    tolerance, found = LOSS_TOLERANCE.get(loss.dtype, 2e-2), []
    for shift in (expected, not expected):
        losses, items = sample_losses(logits, labels, shift)
        found.append((losses.sum() / items.sum()).item())
        if math.isclose(found[-1], loss.item(), rel_tol=tolerance, abs_tol=1e-6):
            return shift
    raise UnsupportedError(
        f"the model computed a loss of {loss.item():.6g} for a batch whose mean cross entropy is {found[0]:.6g} (or "
        f"{found[1]:.6g}): expected the mean over labels, which can be divided among samples. Pass loss_func=..., "
        "which returns the loss of each sample and numbers of items."
    )
