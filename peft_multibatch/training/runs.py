"""The settings of one adapter's run: learning rate, optimizer, schedule, clipping, accumulation and data."""

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
    """The settings of one adapter's run. None means the optimizer's default, or that of ``TrainingArguments``.

    Attributes:
        lr: learning rate, the peak of the schedule.
        optimizer: creates the optimizer, called as ``optimizer(parameters, lr=..., weight_decay=..., **options)``;
            ``torch.optim.AdamW`` if None.
        weight_decay: weight decay of the adapter's parameters; ``MultiAdapterTrainer`` leaves out biases and norms,
            as ``Trainer`` does.
        options: further arguments of the optimizer, such as ``{"betas": (0.9, 0.95)}``.
        max_grad_norm: clip the norm of this adapter's gradient; None or 0 doesn't clip.
        schedule: a name for ``transformers.get_scheduler``, such as ``"linear"`` or ``"cosine"``, or a function that
            takes the optimizer and returns a scheduler; constant if None. It advances with this adapter's steps.
        warmup_steps: number of steps during which the learning rate rises; no warmup if None.
        schedule_options: further arguments of a schedule given by name.
        accumulate: number of batches with rows of this adapter per optimizer step; in ``MultiAdapterTrainer``, an
            epoch's last step may have fewer, as in ``Trainer``.
        steps: number of optimizer steps after which the adapter is finished; also the length of its schedule.
        batch_size: number of rows of this adapter in a batch, over all processes. This and the following attributes
            are for ``MultiAdapterTrainer``, which divides its batch size among adapters if no run sets one.
        weight: its share of a batch, relative to other adapters' weights; by default the size of its dataset.
        train_dataset: rows for training.
        eval_dataset: rows for evaluation.
        patience: number of evaluations without a lower loss after which the adapter stops; never if None.
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
        """Create the optimizer for these parameters.

        Raises:
            UnsupportedError: it would update other parameters too.
        """
        parameters = list(parameters)
        options = dict(self.options)
        for name, value in (("lr", self.lr), ("weight_decay", self.weight_decay)):
            if value is not None:
                options[name] = value
        optimizer = (self.optimizer or AdamW)(parameters, **options)
        own = {*parameters}
        others = sum(each not in own for group in optimizer.param_groups for each in group["params"])
        if others:
            raise UnsupportedError(
                f"the optimizer of a run, {type(optimizer).__name__}, has {others} parameters besides those of its "
                "adapter, and would update other adapters too: expected only parameters that Run(optimizer=...) is "
                "called with. Make groups of those, for example for LoRA+."
            )
        return optimizer

    def build_schedule(self, optimizer: Optimizer) -> LRScheduler:
        """Create the scheduler for an optimizer.

        Raises:
            UnsupportedError: the scheduler needs a metric at every step.
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
                f"Run got a schedule of type {type(schedule).__name__}, which needs more than the step: expected "
                "a torch.optim.lr_scheduler.LRScheduler, such as transformers' 'linear' or 'cosine'."
            )
        return schedule
