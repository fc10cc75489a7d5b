"""One optimizer for many adapters, each of which moves as it would in a run of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils import logging

from peft_multibatch.errors import AdapterIdsLengthError, ModelStateError, UnknownAdapterError, UnsupportedError
from peft_multibatch.plan.ids import AdapterIds, ids_of, label_of, resolve
from peft_multibatch.plan.segments import BASE
from peft_multibatch.training.distributed import Ranks
from peft_multibatch.training.parameters import handle_of, make_trainable
from peft_multibatch.training.progress import Progress
from peft_multibatch.training.runs import Run


logger = logging.get_logger(__name__)


class AdapterOptimizer:
    """Train several adapters of one model in the same batches, step by step as each in a run of its own.

    Every adapter has its own optimizer, learning rate, schedule, clip, accumulation and step counter. An adapter
    without rows in a batch doesn't move, nor does its schedule. One whose loss or gradient isn't finite stops alone,
    before the step, and is named in a warning. The adapters of all runs get gradients, all others are frozen, until
    ``close``.

    With several processes every one calls ``step`` equally often; gradients are added up over all of them and divided
    by the items of all, so that a process may lack rows of an adapter. DistributedDataParallel isn't needed. Around
    the model it does no harm if it was made after the optimizer, with ``find_unused_parameters=True``, and every
    process has rows of some adapter in every batch.

    Args:
        model: an enabled model.
        runs: the settings of each adapter, by its name.
        process_group: processes that train the same adapters on rows of their own; all, by default.

    Attributes:
        steps: how many steps each adapter has made.
        stopped: adapters that don't go on, and why.
        running: adapters that do.
        moved: what ``step`` or ``flush`` returned last.

    Raises:
        NotEnabledError: ``enable`` was not called on the model.
        UnknownAdapterError: there is no adapter of this name.
        UnsupportedError: something would couple the adapters, or the model is split over devices.

    Example:
        ```python
        runs = {"sql": Run(lr=1e-4), "poet": Run(lr=3e-4, max_grad_norm=1.0, accumulate=4)}
        optimizer = AdapterOptimizer(model, runs)
        for batch in loader:
            logits = model(batch["input_ids"], adapter_ids=batch["adapter_ids"]).logits
            losses, items = sample_losses(logits, batch["labels"])
            optimizer.loss(losses, items, batch["adapter_ids"]).backward()
            print(optimizer.step())  # {"sql": {"loss": 2.31, "grad_norm": 0.42, "lr": 1e-4, "items": 512.0}, ...}
        optimizer.close()
        ```
    """

    def __init__(self, model: nn.Module, runs: Mapping[str, Run], process_group: Any = None) -> None:
        if not runs:
            raise UnsupportedError(
                "AdapterOptimizer got no runs: expected at least one, such as {'sql': Run(lr=1e-4)}."
            )
        self._handle = handle_of(model)
        self._ranks = Ranks(process_group)
        self._ranks.check_same(list(runs))
        found, self._restore = make_trainable(self._handle, list(runs))
        try:
            registry = self._handle._registry
            self._runs = {
                name: Progress(run, found[name], registry.dropout_state(registry.names.ids[name]))
                for name, run in runs.items()
            }
            self._ranks.broadcast([each for own in found.values() for each in own.values()])
        except BaseException:
            self._restore()
            raise
        self._norms = [each for each in self._handle._inner.modules() if isinstance(each, _BatchNorm)]
        self._places = {name: place for place, name in enumerate(runs)}
        self._noted: list[Tensor] = []
        self.moved: dict[str, dict[str, float]] = {}

    @property
    def steps(self) -> dict[str, int]:
        return {name: each.steps for name, each in self._runs.items()}

    @property
    def stopped(self) -> dict[str, str]:
        return {name: each.stopped for name, each in self._runs.items() if each.stopped}

    @property
    def running(self) -> list[str]:
        return [name for name, each in self._runs.items() if not each.stopped]

    @property
    def lrs(self) -> dict[str, float]:
        """The learning rate of each adapter's next step."""
        return {name: each.lr for name, each in self._runs.items()}

    def loss(self, losses: Tensor, items: Tensor, adapter_ids: AdapterIds) -> Tensor:
        """Add up the losses of a batch, and note whose they are once backward runs.

        ``step`` divides each adapter's gradient by its items. A factor on the result, as gradient accumulation or a
        gradient scaler puts it, cancels out; to weight samples, weight ``losses`` and ``items``. Rows of the base
        model and of adapters that have stopped don't count.

        Args:
            losses: the loss of every sample, summed over its items; ``[samples]``.
            items: what to divide an adapter's losses by, such as numbers of labels; ``[samples]``.
            adapter_ids: what was passed to the model.

        Returns:
            The sum, on which to call ``backward()``.

        Raises:
            AdapterIdsLengthError: not one loss for every sample, such as a loss that compares samples with each other.
            UnknownAdapterError: a row has an adapter without a run.
            UnsupportedError: a row has a mixture, or samples are normalized together.
            ModelStateError: an adapter was frozen meanwhile.
        """
        rows = self._rows(adapter_ids)
        if losses.shape != (len(rows),) or items.shape != losses.shape:
            raise AdapterIdsLengthError(
                f"loss got losses of shape {list(losses.shape)}, items of shape {list(items.shape)} and "
                f"{len(rows)} adapter ids: expected one loss and one number of items for every sample. Losses that "
                "compare samples, such as contrastive ones, would couple the adapters of a batch: compute them for "
                "one adapter at a time."
            )
        if any(each.training for each in self._norms):
            raise UnsupportedError(
                "the model has BatchNorm in training mode, which normalizes the samples of all adapters together: "
                "expected its running statistics. Call eval() on these modules."
            )
        kept = [row for row, place in enumerate(rows) if place is not None]
        if losses.dtype in (torch.float16, torch.bfloat16):
            losses = losses.float()
        if len(kept) < len(rows):
            index = torch.tensor(kept, dtype=torch.long, device=losses.device)
            losses, items = losses[index], items.to(losses.device)[index]
        total = losses.sum()
        if not torch.is_grad_enabled():
            return total
        if not kept:
            return total.detach().requires_grad_()  # on which backward may be called, with nothing to find
        if not total.requires_grad:
            raise ModelStateError(
                "loss got losses without a graph: expected what the model computed with gradients, of adapters that "
                "are trained. Did set_adapter or torch.no_grad freeze them?"
            )
        places = torch.tensor([rows[row] for row in kept], dtype=torch.long, device=losses.device)
        sums = torch.stack([losses.detach(), items.to(losses)])
        sums = sums.new_zeros(2, len(self._runs)).index_add_(1, places, sums)
        total.register_hook(lambda factor: self._noted.append(sums * factor))
        return total

    def step(self) -> dict[str, dict[str, float]]:
        """Take the gradients of what went through backward, and move the adapters that are due.

        Gradients are None afterwards; what is accumulated is kept elsewhere. While continuous batching runs on the
        model, requests that have begun under an adapter end before it moves, with the weights they began with.

        Returns:
            For every adapter that moved: ``loss`` per item, ``grad_norm`` before it was clipped, ``lr``, ``items``.

        Raises:
            ModelStateError: there are gradients whose losses didn't come from ``loss``, or an adapter had rows and got
                no gradients.
        """
        counted = self._count()
        for name, (loss, _) in counted.items():
            if not math.isfinite(loss):
                self.stop(name, f"its loss was {loss} at step {self._runs[name].steps + 1}")
        runs = {name: self._runs[name] for name in counted if not self._runs[name].stopped}
        # also of those that aren't due, so that every process has the same state
        self._ranks.sum_gradients([list(each.parameters.values()) for each in runs.values()])
        for name, each in runs.items():
            each.take(*counted[name])
        return self._move([name for name, each in runs.items() if each.is_due])

    def flush(self) -> dict[str, dict[str, float]]:
        """Move the adapters that have accumulated fewer batches than they want, at the end of a run."""
        return self._move([name for name in self.running if self._runs[name].batches])

    def stop(self, name: str, reason: str) -> None:
        """Train an adapter no further. Its weights stay as they are, and all others go on.

        Args:
            name: its name.
            reason: what ``stopped`` says.
        """
        progress = self._runs[name]
        if progress.stopped:
            return
        progress.stopped = reason
        progress.clear()
        logger.warning(f"adapter {name!r} stopped after {progress.steps} steps: {reason}.")
        if not self.running:
            logger.warning("all adapters have stopped.")

    def zero_grad(self) -> None:
        """Drop gradients of which no step was made; what was accumulated in earlier steps stays."""
        self._noted.clear()
        for each in self._runs.values():
            each.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on, weights aside; plain types and tensors."""
        return {name: each.state_dict() for name, each in self._runs.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another optimizer was, of the same adapters.

        Raises:
            ModelStateError: of other adapters.
        """
        if state.keys() != self._runs.keys():
            raise ModelStateError(
                f"load_state_dict got the state of {sorted(state)}: expected that of {sorted(self._runs)}. Begin with "
                "the same runs."
            )
        for name, each in self._runs.items():
            each.load_state_dict(state[name])
        self._noted.clear()

    def close(self) -> None:
        """Drop gradients, and let parameters have gradients or none as before; does nothing the second time."""
        self.zero_grad()
        self._restore()
        self._restore = lambda: None

    def __enter__(self) -> AdapterOptimizer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rows(self, adapter_ids: Any) -> list[int | None]:
        """Whose every row is, as a place among the runs; None where it doesn't count."""
        self._handle._refresh()
        names = self._handle._registry.names
        rows: list[int | None] = []
        for entry in resolve(adapter_ids, names):
            if isinstance(entry, tuple):
                raise UnsupportedError(
                    f"loss got a row of the mixture {label_of(entry, names)}, through which its adapters would train "
                    "together: expected one adapter for every row."
                )
            name = None if entry == BASE else names.by_id[ids_of(entry)[0]]
            if name is not None and name not in self._runs:
                raise UnknownAdapterError(
                    f"loss got a row of {name!r}, which has no run: expected rows of {', '.join(self._runs)}. Leave "
                    "rows of frozen adapters out of the loss, or give it a run."
                )
            rows.append(None if name is None or self._runs[name].stopped else self._places[name])
        return rows

    def _count(self) -> dict[str, tuple[float, float]]:
        """Losses and items, over all processes, of the adapters that had any since the last step."""
        device = next(iter(next(iter(self._runs.values())).parameters.values())).device
        noted = [each.to(device) for each in self._noted]
        none = torch.zeros(2, len(self._runs), dtype=torch.float32, device=device)
        sums = torch.stack(noted).sum(0) if noted else none
        self._noted.clear()
        for (name, each), items in zip(self._runs.items(), sums[1].tolist()):
            if items and not each.stopped and not each.has_gradients():
                raise ModelStateError(
                    f"{name!r} had rows in a batch and got no gradients: expected parameters that are trained. Was it "
                    "frozen by set_adapter, or deleted and added again? Close the optimizer and begin another one."
                )
        losses, everywhere = (self._ranks.sum(sums) if self._ranks.size > 1 else sums).tolist()
        found = {}
        for (name, each), loss, items in zip(self._runs.items(), losses, everywhere):
            if items and not each.stopped:
                found[name] = loss, items
                continue
            if not each.stopped and each.has_gradients(other_than_zero=True):
                raise ModelStateError(
                    f"step found gradients of {name!r} whose loss it doesn't know, and which it can't divide by what "
                    "is that adapter's own: expected losses through AdapterOptimizer.loss. Write "
                    "optimizer.loss(losses, items, adapter_ids).backward()."
                )
            each.zero_grad()  # compiled code leaves zeros
        return found

    def _move(self, names: list[str]) -> dict[str, dict[str, float]]:
        """A step of each of these adapters."""
        runs = {name: self._runs[name] for name in names}
        for each in runs.values():
            each.gather()
        norms = {name: each.normalize() for name, each in runs.items()}
        values = torch.stack([norm.float().cpu() for norm in norms.values()]).tolist() if norms else []
        self.moved = {}
        finite = {name: norm for name, norm in zip(runs, values) if math.isfinite(norm)}
        registry = self._handle._registry
        with registry.changing(*(registry.names.ids[name] for name in finite)):
            for name, norm in finite.items():
                each = runs[name]
                self.moved[name] = {
                    "loss": each.loss / each.items, "grad_norm": norm, "lr": each.lr, "items": each.items,
                }  # fmt: skip
                each.step(norms[name])
                each.clear()
        for name, norm in zip(runs, values):
            if name not in finite:
                self.stop(name, f"its gradient had a norm of {norm} at step {runs[name].steps + 1}")
        for each in self._runs.values():
            each.zero_grad()
        return self.moved
