"""Losses per sample, which can be summed per adapter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

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
    labels = labels.to(logits.device, torch.int64)
    if labels.dim() == 1:
        logits, labels = logits[:, None], labels[:, None]
    elif shift:  # shifting the labels instead of the logits saves a copy of the logits
        labels = pad(labels, (0, 1), value=IGNORED)[:, 1:]
    is_chunked = logits.is_cpu and not torch.compiler.is_compiling()
    losses = (_CrossEntropy.apply if is_chunked else _cross_entropy)(logits.flatten(0, 1), labels.flatten())
    return losses.view(labels.shape).sum(1), (labels != IGNORED).sum(1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")


class _CrossEntropy(torch.autograd.Function):
    """The loss of each row of ``[rows, classes]`` on a CPU, a few rows at a time.

    ``cross_entropy`` makes three more tensors of the logits' size, and keeps one of them for backward. Large ones are
    slow on a CPU: glibc gets new memory from the kernel for each. Here only the gradient has that size.
    """

    @staticmethod
    def forward(logits: Tensor, labels: Tensor) -> Tensor:
        parts = zip(*(each.split(_rows(logits)) for each in (logits, labels)))
        return torch.cat([_cross_entropy(*part) for part in parts])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            return torch.autograd.grad(_cross_entropy(logits, labels), logits, grad, create_graph=True)[0], None
        found = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for part, label, own, target in zip(*(each.split(_rows(logits)) for each in (logits, labels, grad, found))):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                losses = _cross_entropy(part, label)
            target.copy_(*torch.autograd.grad(losses, part, own))
        return found, None


def _rows(logits: Tensor) -> int:
    """The number of rows that have 256 K elements per thread, which stay in a core's cache."""
    return max(1, (torch.get_num_threads() << 18) // logits.shape[1])


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
