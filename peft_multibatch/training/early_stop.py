"""Early stopping per adapter in MultiAdapterTrainer; the run ends when all adapters have stopped."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback


class EarlyStop(TrainerCallback):
    """Stops adapters whose evaluation loss doesn't improve. Its state is saved where Trainer saves the scheduler.

    Attributes:
        best: the smallest loss of each evaluated adapter, and the step of the run at which it was reached.
        waited: number of evaluations of each adapter since then.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.best: dict[str, tuple[float, int]] = {}
        self.waited: dict[str, int] = {}

    def reset(self) -> None:
        """Forget the previous run."""
        self.best, self.waited = {}, {}
        self._trainer._sampler.stopped = ()

    def on_epoch_begin(self, args, state, control, **_):
        self._trainer._sampler.set_epoch(int(state.epoch + 1e-6))  # resuming may start in the middle of an epoch

    def on_optimizer_step(self, args, state, control, **_):
        trainer = self._trainer
        moved = dict(trainer.optimizer.moved)
        step = state.global_step + 1
        if step >= state.max_steps or step % len(trainer._sampler) == 0:  # like Trainer, at the end of an epoch
            moved |= trainer.optimizer.flush()
        for name, metrics in moved.items():
            trainer._moved[name].append(metrics)

    def on_step_end(self, args, state, control, **_):
        self._stop(control)

    def on_evaluate(self, args, state, control, metrics, **_):
        trainer = self._trainer
        for name, run in trainer._runs.items():
            loss = metrics.get(f"eval_{name}_loss")
            if loss is None or not trainer.is_in_train or trainer.optimizer is None:
                continue
            if name not in self.best or loss < self.best[name][0] or math.isnan(self.best[name][0]):
                self.best[name], self.waited[name] = (loss, state.global_step), 0
            else:
                self.waited[name] += 1
            if run.patience is not None and self.waited[name] >= run.patience:
                step = self.best[name][1]
                trainer.optimizer.stop(
                    name,
                    f"its loss was lowest at step {step} of the run, {run.patience} evaluations ago",
                )
        self._stop(control)

    def _stop(self, control: Any) -> None:
        optimizer = self._trainer.optimizer
        if optimizer is not None:
            self._trainer._sampler.stopped = set(optimizer.stopped)
            control.should_training_stop = control.should_training_stop or not optimizer.running

    # Trainer's interface of a scheduler
    def step(self) -> None:
        pass

    def get_last_lr(self) -> list[float]:
        return [*self._trainer.optimizer.lrs.values()]

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = dict(state["best"]), dict(state["waited"])
        self._trainer._sampler.stopped = set(self._trainer.optimizer.stopped)
