"""What one adapter is trained with: learning rate, optimizer, schedule, clip, accumulation, data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers.optimization import get_scheduler

from peft_multibatch.errors import UnsupportedError


@dataclass(frozen=True)
class Run:
    """The settings of one adapter's run. Whatever is None is left to the optimizer, or to ``TrainingArguments``.

    Attributes:
        lr: learning rate, the peak of the schedule.
        optimizer: what makes the optimizer, called as ``optimizer(parameters, lr=..., weight_decay=..., **options)``;
            ``torch.optim.AdamW`` if None.
        weight_decay: of all parameters of the adapter.
        options: further arguments of the optimizer, such as ``{"betas": (0.9, 0.95)}``.
        max_grad_norm: clip the norm of this adapter's gradient; None or 0 doesn't clip.
        schedule: a name that ``transformers.get_scheduler`` knows, such as ``"linear"`` or ``"cosine"``, or a function
            that takes the optimizer and returns a scheduler; constant if None. It advances with this adapter's steps.
        warmup_steps: steps of the adapter during which the learning rate rises; none if None.
        schedule_options: further arguments of a schedule that is given by name.
        accumulate: batches with rows of this adapter that make one step of its optimizer.
        steps: steps of its optimizer after which the adapter is finished, and over which its schedule is spread.
        batch_size: rows of this adapter in a batch, over all processes. This and what follows is for
            ``MultiAdapterTrainer``, which shares its batch size among adapters if no run has one.
        weight: its share of a batch, relative to other adapters' weights; by default the size of its dataset.
        train_dataset: its rows.
        eval_dataset: rows on which it is evaluated.
        patience: evaluations without a smaller loss after which the adapter stops; never if None.
    """

    lr: float | None = None
    optimizer: Callable[..., Optimizer] | None = None
    weight_decay: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    max_grad_norm: float | None = None
    schedule: str | Callable[[Optimizer], LRScheduler] | None = None
    warmup_steps: int | None = None
    schedule_options: Mapping[str, Any] | None = None
    accumulate: int = 1
    steps: int | None = None
    batch_size: int | None = None
    weight: float | None = None
    train_dataset: Any = None
    eval_dataset: Any = None
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("accumulate", "steps", "batch_size", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"Run got {name}={value!r}: expected a positive integer.")
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"Run got weight={self.weight!r}: expected a positive number.")

    def build_optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        """The optimizer of these parameters."""
        options = dict(self.options)
        for name, value in (("lr", self.lr), ("weight_decay", self.weight_decay)):
            if value is not None:
                options[name] = value
        return (self.optimizer or AdamW)(list(parameters), **options)

    def build_schedule(self, optimizer: Optimizer) -> LRScheduler:
        """The schedule of an optimizer's learning rate.

        Raises:
            UnsupportedError: it asks for a metric at every step.
        """
        if callable(self.schedule):
            schedule = self.schedule(optimizer)
        else:
            schedule = get_scheduler(
                self.schedule or "constant_with_warmup", optimizer, self.warmup_steps or 0, self.steps,
                scheduler_specific_kwargs=self.schedule_options,
            )  # fmt: skip
        if isinstance(schedule, ReduceLROnPlateau) or not isinstance(schedule, LRScheduler):
            raise UnsupportedError(
                f"Run got a schedule of type {type(schedule).__name__}, which isn't advanced by steps alone: expected "
                "a torch.optim.lr_scheduler.LRScheduler such as transformers' 'linear' or 'cosine'."
            )
        return schedule
