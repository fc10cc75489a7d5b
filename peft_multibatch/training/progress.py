"""The state of one adapter's run: its optimizer, its schedule and its accumulated gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_multibatch.adapters.dropout import DropoutState
from peft_multibatch.training.runs import Run


COUNTERS = ("steps", "stopped", "batches", "loss", "scaled", "items")


class Progress:
    """The state of one adapter's run.

    Args:
        run: the run's settings.
        parameters: the adapter's parameters, by their names in the model.
        dropout: the state of its dropout masks, which is reset.

    Attributes:
        parameters: as above.
        steps: number of optimizer steps so far.
        stopped: why the run has stopped, or the empty string.
        batches: number of batches accumulated for the next step.
        loss: sum of their losses, multiplied by the factors that ``backward`` ran with.
        scaled: number of their items, multiplied by the same factors, which gradients are divided by.
        items: number of their items.
    """

    def __init__(self, run: Run, parameters: dict[str, nn.Parameter], dropout: DropoutState) -> None:
        self.run, self.parameters, self._dropout = run, parameters, dropout
        dropout.reset()
        self.optimizer = run.build_optimizer(parameters.values())
        self.schedule = run.build_schedule(self.optimizer)
        self.steps, self.stopped = 0, ""
        self.batches, self.loss, self.scaled, self.items = 0, 0.0, 0.0, 0.0
        self._kept: dict[str, Tensor] = {}

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def has_gradients(self, other_than_zero: bool = False) -> bool:
        """Whether any of its parameters has a gradient."""
        return any(not other_than_zero or bool(each.any()) for each in self.gradients())

    def take(self, loss: float, scaled: float, items: float) -> None:
        """Add a batch with rows of this adapter, after its backward pass."""
        self.batches, self.loss = self.batches + 1, self.loss + loss
        self.scaled, self.items = self.scaled + scaled, self.items + items
        if self.batches == 1 and self.is_due:
            return  # nothing else is accumulated, so the gradients needn't be copied
        for name, each in self.parameters.items():
            if each.grad is not None:
                kept = self._kept.get(name)
                # a copy, because DistributedDataParallel may write into the gradient's memory
                self._kept[name] = each.grad.clone() if kept is None else kept.add_(each.grad)

    @property
    def is_due(self) -> bool:
        """Whether enough batches are accumulated for a step."""
        return self.batches >= self.run.accumulate

    def gather(self) -> None:
        """Write the accumulated gradients to the parameters."""
        for name, kept in self._kept.items():
            self.parameters[name].grad = kept
        self._kept = {}

    def gradients(self) -> list[Tensor]:
        """The gradients of the parameters that have one."""
        return [each.grad for each in self.parameters.values() if each.grad is not None]

    def normalize(self) -> Tensor:
        """Divide the gradients by the number of items and return their norm."""
        gradients = self.gradients()
        torch._foreach_div_(gradients, self.scaled)
        return torch.nn.utils.get_total_norm(gradients)

    def step(self, norm: Tensor) -> None:
        """Clip the gradients and take a step of the optimizer and its schedule."""
        if self.run.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.run.max_grad_norm, norm)
        self.optimizer.step()
        self.schedule.step()
        self.steps += 1
        self._finish()

    def _finish(self) -> None:
        if self.run.steps is not None and self.steps >= self.run.steps:
            self.stopped = self._finished

    @property
    def _finished(self) -> str:
        return f"it has finished its {self.steps} steps"

    def clear(self) -> None:
        """Discard what was accumulated."""
        self.batches, self.loss, self.scaled, self.items = 0, 0.0, 0.0, 0.0
        self._kept = {}

    def zero_grad(self) -> None:
        for each in self.parameters.values():
            each.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "kept": self._kept,
            "dropout": self._dropout.state_dict(),
            **{name: getattr(self, name) for name in COUNTERS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self._dropout.load_state_dict(state["dropout"])
        self._kept = {name: kept.clone().to(self.parameters[name].device) for name, kept in state["kept"].items()}
        for name in COUNTERS:
            setattr(self, name, state[name])
        if self.stopped == self._finished:  # the run may have more steps now, or fewer
            self.stopped = ""
        if not self.stopped:
            self._finish()
