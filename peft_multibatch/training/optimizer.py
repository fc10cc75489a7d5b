"""An optimizer for many adapters; each takes the same steps as in a run of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils import logging

from peft_multibatch.errors import AdapterIdsLengthError, ModelStateError, UnknownAdapterError, UnsupportedError
from peft_multibatch.plan.ids import AdapterIds, ids_of, label_of, resolve
from peft_multibatch.plan.segments import BASE
from peft_multibatch.training.counts import Counts
from peft_multibatch.training.distributed import Ranks
from peft_multibatch.training.parameters import handle_of, make_trainable
from peft_multibatch.training.progress import Progress
from peft_multibatch.training.runs import Run


logger = logging.get_logger(__name__)


class AdapterOptimizer:
    """Trains several adapters of one model in the same batches, with the same steps as in separate runs.

    Every adapter has its own optimizer, learning rate, schedule, clipping, accumulation and step counter. If a batch
    has no rows of an adapter, neither its weights nor its schedule change. If an adapter's loss or gradient isn't
    finite, only that adapter stops, before the step, and a warning names it. Until ``close``, the adapters of all runs
    are trainable, and all others are frozen.

    With several processes, each must call ``step`` equally often. Gradients are summed over all processes and divided
    by the total number of items, so a process may have no rows of an adapter. DistributedDataParallel isn't needed,
    but can wrap the model if it is created after the optimizer, with ``find_unused_parameters=True``, and if every
    process has rows of some adapter in every batch.

    Args:
        model: an enabled model.
        runs: the settings of each adapter, by its name.
        process_group: processes that train the same adapters on different rows; by default all.

    Attributes:
        steps: number of steps that each adapter has taken.
        stopped: adapters that have stopped, with the reasons.
        running: adapters that haven't stopped.
        moved: the last result of ``step`` or ``flush``.

    Raises:
        NotEnabledError: the model isn't enabled.
        UnknownAdapterError: there is no adapter with this name.
        UnsupportedError: gradients of different adapters would mix, or the model is split over devices.

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
        self._counts = Counts(len(runs))
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
        """Sum the losses of a batch, and record whose they are when ``backward`` runs.

        ``step`` divides each adapter's gradient by its items. A factor on the result, such as that of gradient
        accumulation, cancels out; to weight samples, weight ``losses`` and ``items``. Rows of the base model and of
        stopped adapters are ignored. ``torch.amp.GradScaler`` isn't supported, because one adapter's overflow would
        skip the steps of all: use bfloat16, or a constant factor if gradients underflow in float16.

        Args:
            losses: the loss of each sample, summed over its items; ``[samples]``.
            items: number of items of each sample, such as labels, to divide an adapter's losses by; ``[samples]``.
            adapter_ids: the ids that were passed to the model.

        Returns:
            The sum, to call ``backward()`` on.

        Raises:
            AdapterIdsLengthError: there isn't one loss per sample, as with losses that compare samples.
            UnknownAdapterError: a row has an adapter without a run.
            UnsupportedError: a row has a mixture, or BatchNorm is in training mode.
            ModelStateError: the losses have no gradients, for example because an adapter was frozen.
        """
        self._drop_interrupted()
        rows = self._rows(adapter_ids)
        if losses.shape != (len(rows),) or items.shape != losses.shape:
            raise AdapterIdsLengthError(
                f"loss got losses of shape {list(losses.shape)}, items of shape {list(items.shape)} and "
                f"{len(rows)} adapter ids: expected one loss and one number of items per sample. Losses that compare "
                "samples, such as contrastive ones, would mix the gradients of adapters: compute them for one adapter "
                "at a time."
            )
        if any(each.training for each in self._norms):
            raise UnsupportedError(
                "the model has BatchNorm in training mode, which normalizes the samples of all adapters together: "
                "expected it to use running statistics. Call eval() on these modules, and if a Trainer calls "
                "train() on the model before every step, also replace their train method by one that does nothing."
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
            return total.detach().requires_grad_()  # lets backward run without any gradients
        if not total.requires_grad:
            raise ModelStateError(
                "loss got losses without a graph: expected losses computed with gradients, from adapters that are "
                "trained. Check whether set_adapter froze them, or torch.no_grad is active."
            )
        places = torch.tensor([rows[row] for row in kept], dtype=torch.long, device=losses.device)
        self._counts.add(total, losses, items, places)
        return total

    def step(self) -> dict[str, dict[str, float]]:
        """Collect the gradients of the backward passes since the last step, and update the adapters that are due.

        Gradients are None afterwards, also after an exception; accumulated ones are kept separately. While
        continuous batching runs on the model, running requests of an adapter finish before it is updated, with the
        weights they started with.

        Returns:
            For each updated adapter: ``loss`` per item, ``grad_norm`` before clipping, ``lr`` and ``items``.

        Raises:
            ModelStateError: there are gradients of losses that didn't come from ``loss``, an adapter with rows got no
                gradients, or the loss had a negative factor.
        """
        self._drop_interrupted()
        runs: dict[str, Progress] = {}
        with self._dropping(runs):
            counted = self._count()
            for name, (loss, items, _) in counted.items():
                if not math.isfinite(loss) or not items:
                    over = "" if items else " over no items"
                    self.stop(name, f"its loss was {loss}{over} at step {self._runs[name].steps + 1}")
            runs.update((name, self._runs[name]) for name in counted if not self._runs[name].stopped)
            # includes adapters that aren't due, so that every process has the same state
            self._ranks.sum_gradients([list(each.parameters.values()) for each in runs.values()])
            for name, each in runs.items():
                each.take(*counted[name])
            return self._move({name: each for name, each in runs.items() if each.is_due})

    def flush(self) -> dict[str, dict[str, float]]:
        """Update the adapters with an incomplete accumulation, at the end of a run."""
        runs = {name: self._runs[name] for name in self.running if self._runs[name].batches}
        with self._dropping(runs):
            return self._move(runs)

    @contextmanager
    def _dropping(self, runs: Mapping[str, Progress]) -> Iterator[None]:
        """If the block is interrupted, drop gradients, which the next step would add to its own."""
        try:
            yield
        except BaseException:
            self.zero_grad()
            for each in runs.values():
                each.clear()
            raise

    def stop(self, name: str, reason: str) -> None:
        """Stop training an adapter. Its weights stay as they are, and all others continue.

        Args:
            name: the adapter's name.
            reason: the reason for ``stopped``.
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
        """Drop gradients since the last step; those accumulated in earlier steps are kept."""
        self._counts.clear()
        for each in self._runs.values():
            each.zero_grad()

    def _drop_interrupted(self) -> None:
        if self._counts.was_interrupted:
            logger.warning("backward was interrupted: its incomplete gradients are dropped.")
            self.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The state needed to resume, without the weights, in plain types and tensors."""
        return {name: each.state_dict() for name, each in self._runs.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the state of another optimizer for the same adapters.

        Raises:
            ModelStateError: the state is that of other adapters.
        """
        if state.keys() != self._runs.keys():
            raise ModelStateError(
                f"load_state_dict got the state of {sorted(state)}: expected that of {sorted(self._runs)}. Create the "
                "optimizer with the same runs."
            )
        for name, each in self._runs.items():
            each.load_state_dict(state[name])
        self._counts.clear()

    def close(self) -> None:
        """Drop gradients and restore ``requires_grad`` of all parameters; further calls do nothing."""
        self.zero_grad()
        self._restore()
        self._restore = lambda: None

    def __enter__(self) -> AdapterOptimizer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rows(self, adapter_ids: Any) -> list[int | None]:
        """Return the index of each row's run, or None for rows that are ignored."""
        self._handle._refresh()
        names = self._handle._registry.names
        rows: list[int | None] = []
        for entry in resolve(adapter_ids, names):
            if isinstance(entry, tuple):
                raise UnsupportedError(
                    f"loss got a row of the mixture {label_of(entry, names)}, which would train its adapters "
                    "together: expected one adapter per row."
                )
            name = None if entry == BASE else names.by_id[ids_of(entry)[0]]
            if name is not None and name not in self._runs:
                raise UnknownAdapterError(
                    f"loss got a row of {name!r}, which has no run: expected rows of {', '.join(self._runs)}. Leave "
                    "rows of frozen adapters out of the loss, or add a run for this one."
                )
            rows.append(None if name is None or self._runs[name].stopped else self._places[name])
        return rows

    def _count(self) -> dict[str, tuple[float, float, float]]:
        """Losses and items with their factor, and items, over all processes, for adapters with items or losses."""
        device = next(iter(next(iter(self._runs.values())).parameters.values())).device
        sums = self._counts.take(device)
        for (name, each), (_, scaled, items, _) in zip(self._runs.items(), sums.T.tolist()):
            if scaled * items < 0:
                raise ModelStateError(
                    f"the loss of {name!r} was multiplied by a negative factor, which dividing by its items would "
                    "cancel out: expected a positive one. Negate the losses that you pass to AdapterOptimizer.loss."
                )
            if items and not each.stopped and not each.has_gradients():
                raise ModelStateError(
                    f"{name!r} had rows in a batch but got no gradients: expected trainable parameters. It may have "
                    "been frozen by set_adapter, or deleted and added again. Close the optimizer and create a new one."
                )
        everywhere = (self._ranks.sum(sums) if self._ranks.size > 1 else sums).T.tolist()
        found = {}
        for (name, each), (loss, scaled, items, rows) in zip(self._runs.items(), everywhere):
            if (scaled or loss) and not each.stopped:
                found[name] = loss, scaled, items
                continue
            if not each.stopped and not rows and each.has_gradients(other_than_zero=True):
                raise ModelStateError(
                    f"step found gradients of {name!r} from an unknown loss, which it can't divide by that adapter's "
                    "number of items: expected losses from AdapterOptimizer.loss. Use "
                    "optimizer.loss(losses, items, adapter_ids).backward()."
                )
            each.zero_grad()  # compiled code leaves zeros, and rows without labels zeros or NaN
        return found

    def _move(self, runs: Mapping[str, Progress]) -> dict[str, dict[str, float]]:
        """Take a step for each of these adapters."""
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
                    "loss": each.loss / each.scaled, "grad_norm": norm, "lr": each.lr, "items": each.items,
                }  # fmt: skip
                each.step(norms[name])
                each.clear()
        for name, norm in zip(runs, values):
            if name not in finite:
                each = runs[name]
                scale = each.scaled / each.items if each.items else 1.0
                overflow = f", computed from a loss that was multiplied by {scale:g}" if scale > 1 else ""
                self.stop(name, f"its gradient had a norm of {norm} at step {each.steps + 1}{overflow}")
        for each in self._runs.values():
            each.zero_grad()
        return self.moved
