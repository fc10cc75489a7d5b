"""Losses per sample, which can be summed per adapter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from peft_multibatch.errors import UnsupportedError


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
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape or labels.dim() not in (1, 2):
        raise UnsupportedError(
            f"sample_losses got logits {list(logits.shape)} and labels {list(labels.shape)} of {labels.dtype}: "
            "expected logits [samples, tokens, classes] and integer labels [samples, tokens], or [samples, classes] "
            "and [samples]. Compute a loss per sample yourself and pass it to AdapterOptimizer.loss."
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
