"""transformers' Trainer for many adapters: each takes the same steps as in a run of its own."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from peft_multibatch.errors import AdapterIdsError, ModelStateError, UnsupportedError
from peft_multibatch.plan.ids import BASE_NAME
from peft_multibatch.training.arguments import check_arguments, filled_runs
from peft_multibatch.training.data import COLUMN, AdapterBatchSampler, AdapterCollator, MixedDataset
from peft_multibatch.training.early_stop import EarlyStop
from peft_multibatch.training.losses import IGNORED, matching_shift, sample_losses
from peft_multibatch.training.optimizer import AdapterOptimizer
from peft_multibatch.training.parameters import handle_of
from peft_multibatch.training.runs import Run


TRAINING_ARGUMENTS = "training_args.bin"


class MultiAdapterTrainer(Trainer):
    """Trains many adapters of one model in one run, with the same steps as in separate runs.

    Settings that a ``Run`` leaves open come from ``args``: learning rate, optimizer, weight decay, clipping, schedule.
    A batch of ``per_device_train_batch_size`` rows per process is divided among adapters, see ``AdapterBatchSampler``.
    Logs contain ``<adapter>/loss``, ``<adapter>/learning_rate``, ``<adapter>/grad_norm`` and ``<adapter>/step``,
    evaluations ``eval_<adapter>_loss``. Checkpoints contain one folder per adapter, which
    ``PeftModel.from_pretrained`` loads.

    Args:
        model: an enabled ``PeftModel``.
        args: settings of the run; ``num_train_epochs`` counts epochs of every adapter's dataset, and ``max_steps``
            batches.
        runs: settings and data of each adapter, by its name.
        data_collator: a collator; it needn't handle ``adapter_ids``.
        loss_func: called with the model's output and the labels; returns the loss of each sample, summed over its
            items, and the numbers of items. By default ``sample_losses``, whose mean is compared, once, with the
            loss that the model itself computes.
        **options: further arguments of ``Trainer``.

    Raises:
        NotEnabledError: the model isn't enabled.
        UnsupportedError: ``args`` contain settings that all adapters would share, or that aren't supported; or the
            model's own loss isn't the mean cross entropy and there is no ``loss_func``.

    Example:
        ```python
        runs = {"sql": Run(lr=1e-4, train_dataset=sql_rows), "poet": Run(lr=3e-4, train_dataset=poems, patience=3)}
        MultiAdapterTrainer(model, TrainingArguments("out", num_train_epochs=3), runs=runs).train()
        ```
    """

    optimizer: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        runs: Mapping[str, Run],
        data_collator: Callable[[list[Any]], Any] | None = None,
        loss_func: Callable[[Any, Any], tuple[Tensor, Tensor]] | None = None,
        **options: Any,
    ) -> None:
        self._handle = handle_of(model)
        check_arguments(model, args, options)
        self._runs, self._loss_func = dict(runs), loss_func
        if not self._runs:
            raise UnsupportedError(
                "MultiAdapterTrainer got no runs: expected at least one, such as {'sql': Run(...)}."
            )
        training = {name: run.train_dataset for name, run in self._runs.items()}
        absent = [name for name, rows in training.items() if rows is None]
        if absent:
            raise UnsupportedError(f"the run of {absent[0]!r} has no train_dataset: expected one for every adapter.")
        evaluated = {name: run.eval_dataset for name, run in self._runs.items() if run.eval_dataset is not None}
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=MixedDataset(training),
            eval_dataset={name: MixedDataset({name: rows}) for name, rows in evaluated.items()} or None,
            **options,
        )
        inner: Any = self.data_collator
        self.data_collator: Any = inner if isinstance(inner, AdapterCollator) else AdapterCollator(inner)
        self.early_stop = EarlyStop(self)
        self.add_callback(self.early_stop)
        self._sampler = self._make_sampler()
        self._moved: dict[str, list[dict[str, float]]] = {}
        self._mean: Tensor | None = None
        self._shift: bool | None = None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model
        # skips DistributedDataParallel, because the optimizer sums the gradients of adapters that have any
        self.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)

    def get_train_dataloader(self) -> DataLoader:
        args, workers = self.args, self.args.dataloader_num_workers
        return DataLoader(
            self.train_dataset,
            batch_sampler=self._sampler,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, "training"),
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> AdapterOptimizer:
        if self.optimizer is not None:
            self.optimizer.close()
        decayed = {*self.get_decay_parameter_names(self.model)}
        undecayed = {each for name, each in self.model.named_parameters() if name not in decayed}
        self.optimizer = AdapterOptimizer(self.model, filled_runs(self._runs, self.args, self._sampler, undecayed))
        self.early_stop.reset()
        self._moved = {name: [] for name in self._runs}
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = self.early_stop  # each run has its own schedule
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        ids = inputs.get(COLUMN)
        if ids is None:
            raise AdapterIdsError(
                f"a batch has no {COLUMN}: expected an id or a name per row. Add the column to the dataset."
            )
        labels = inputs.get("labels")
        shift = self._find_shift(inputs, labels) if self._loss_func is None else False
        # given labels, the model would also compute its own loss; encoder-decoders derive decoder_input_ids from them
        without = not self._is_encoder_decoder or "decoder_input_ids" in inputs
        outputs = model(**{key: value for key, value in inputs.items() if not (key == "labels" and without)})
        if getattr(outputs, "aux_loss", None) is not None:
            raise UnsupportedError(
                "the model returned one load-balancing loss for all adapters of a batch: expected none. "
                "Call it without output_router_logits."
            )
        losses, items = self._losses(outputs, labels, shift)
        if torch.is_grad_enabled() and model.training:
            loss = self.optimizer.loss(losses, items, ids)
            self._mean = loss.detach() / items.sum().clamp_min(1)
        else:
            loss = losses.sum() / items.sum()
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        super().training_step(model, inputs, num_items_in_batch)
        assert self._mean is not None
        return self._mean  # only for the log; backward ran on the sum

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.pop("learning_rate", None)
            for name, moved in self._moved.items():
                if moved:
                    items = sum(each["items"] for each in moved)
                    logs[f"{name}/loss"] = sum(each["loss"] * each["items"] for each in moved) / items
                    logs[f"{name}/grad_norm"] = moved[-1]["grad_norm"]
                    logs[f"{name}/learning_rate"] = moved[-1]["lr"]
                    logs[f"{name}/step"] = self.optimizer.steps[name]
                    moved.clear()
        super().log(logs, start_time)

    def _losses(self, outputs: Any, labels: Any, shift: bool) -> tuple[Tensor, Tensor]:
        if self._loss_func is not None:
            return self._loss_func(outputs, labels)
        logits = getattr(outputs, "logits", None)
        if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
            raise UnsupportedError(
                f"the model returned {type(outputs).__name__} for a batch "
                f"{'with' if labels is not None else 'without'} labels, from which MultiAdapterTrainer can't compute "
                "a loss per sample: expected logits and labels. Pass loss_func=..., which returns losses and numbers "
                "of items; losses that compare samples, such as contrastive ones, would mix the gradients of adapters."
            )
        return sample_losses(logits, labels, shift)

    def _find_shift(self, inputs: Mapping[str, Any], labels: Any) -> bool:
        """Whether the model's own loss shifts labels, by comparing it, once, with the losses of samples."""
        if self._shift is not None:
            return self._shift
        kind = LOSS_MAPPING.get(getattr(self._handle._inner, "loss_type", None), ForCausalLMLoss)
        expected = kind is ForCausalLMLoss and not self._is_encoder_decoder
        modes = [(each, each.training) for each in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                # not the adapters, whose weights may not be finite
                outputs = self.model(**{**inputs, COLUMN: [BASE_NAME] * len(inputs[COLUMN])})
        finally:
            for each, mode in modes:
                each.training = mode
        own = getattr(outputs, "loss", None)
        self._losses(outputs, labels, expected)  # checks the output and the labels
        if not isinstance(own, Tensor):
            raise UnsupportedError(
                f"{type(self._handle._inner).__name__} computes no loss from labels, which would show whether it "
                "shifts them: expected outputs with a loss. Pass loss_func=..., which returns the loss of each sample "
                "and numbers of items."
            )
        if not (labels != IGNORED).any() or not own.isfinite():
            return expected  # the next batch may tell
        self._shift = matching_shift(outputs.logits, labels, own, expected)
        return self._shift

    @property
    def _is_encoder_decoder(self) -> bool:
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the folder of every run's adapter; Trainer may load one of them into the active adapter."""
        trainable = [(each, each.requires_grad) for each in self.model.parameters()]
        for name in self._runs:
            folder = resume_from_checkpoint if name == "default" else os.path.join(resume_from_checkpoint, name)
            if not os.path.isfile(os.path.join(folder, CONFIG_NAME)):
                raise ModelStateError(
                    f"the checkpoint {resume_from_checkpoint} doesn't contain the adapter {name!r}: expected one that "
                    "was saved with the same runs."
                )
            self.model.load_adapter(folder, name, is_trainable=True)
        for each, is_trained in trainable:
            each.requires_grad_(is_trained)

    def _make_sampler(self) -> AdapterBatchSampler:
        sizes = {name: run.batch_size for name, run in self._runs.items()}
        weights = {name: run.weight for name, run in self._runs.items()}
        for given, what in ((sizes, "batch_size"), (weights, "weight")):
            absent = [name for name, value in given.items() if value is None]
            if absent and len(absent) < len(given):
                raise UnsupportedError(
                    f"some runs have a {what}, but that of {absent[0]!r} doesn't: expected it for all runs or for "
                    "none."
                )
        args = self.args
        whole = args.train_batch_size * args.world_size
        return AdapterBatchSampler(
            self.train_dataset.sizes,
            whole if None in sizes.values() else sizes,  # type: ignore[arg-type]
            None if None in weights.values() else weights,  # type: ignore[arg-type]
            args.seed if args.data_seed is None else args.data_seed,
            args.process_index,
            args.world_size,
        )

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Does nothing, because the optimizer clips each adapter's gradient."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Does nothing, because adapters have separate gradient norms."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save one folder per adapter that has a run."""
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            self.model.save_pretrained(output_dir, selected_adapters=list(self._runs))
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
            torch.save(self.args, os.path.join(output_dir, TRAINING_ARGUMENTS))
