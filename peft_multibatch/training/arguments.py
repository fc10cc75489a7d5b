"""Apply TrainingArguments to the runs of MultiAdapterTrainer, and reject arguments that it can't support."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from peft_multibatch.compat import PeftModel
from peft_multibatch.errors import UnsupportedError
from peft_multibatch.training.data import AdapterBatchSampler
from peft_multibatch.training.runs import Run


logger = logging.get_logger(__name__)


def filled_runs(
    runs: Mapping[str, Run], args: TrainingArguments, sampler: AdapterBatchSampler, undecayed: Collection[nn.Parameter]
) -> dict[str, Run]:
    """Fill in what runs leave open: settings from the arguments, and the number of steps from their data.

    Args:
        runs: the runs as given.
        args: the trainer's arguments.
        sampler: its batches.
        undecayed: parameters without weight decay.
    """
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(sampler))
    epochs, rest = divmod(total, len(sampler))
    whole, part = sampler.batches(len(sampler)), sampler.batches(rest)
    made, defaults = Trainer.get_optimizer_cls_and_kwargs(args)
    found = {}
    for name, run in runs.items():
        # like Trainer, an incomplete accumulation at the end of an epoch is a step
        steps = epochs * math.ceil(whole[name] / run.accumulate) + math.ceil(part[name] / run.accumulate)
        if run.steps is not None and run.steps > steps:
            logger.warning(
                f"the run of {name!r} has steps={run.steps}, but there are batches for only {steps}: raise "
                "num_train_epochs or max_steps of TrainingArguments, or its schedule will not end."
            )
        steps = run.steps or max(steps, 1)
        filled: dict[str, Any] = {"steps": steps}
        make = run.optimizer
        if make is None:
            make, filled["options"] = made, {**defaults, **run.options}
        if run.schedule is None:
            filled["schedule"] = args.lr_scheduler_type
            filled["schedule_options"] = run.schedule_options or args.lr_scheduler_kwargs
        given = {
            "lr": args.learning_rate,
            "weight_decay": args.weight_decay,
            "max_grad_norm": args.max_grad_norm,
            "warmup_steps": args.get_warmup_steps(steps),
        }
        filled |= {key: value for key, value in given.items() if getattr(run, key) is None}
        filled["optimizer"] = functools.partial(_with_decay, make, undecayed)
        found[name] = dataclasses.replace(run, **filled)
    return found


def _with_decay(
    make: Callable[..., Optimizer],
    undecayed: Collection[nn.Parameter],
    parameters: Sequence[nn.Parameter],
    weight_decay: float = 0.0,
    **options: Any,
) -> Optimizer:
    """Create an optimizer with the parameter groups of Trainer."""
    decayed = [each for each in parameters if each not in undecayed]
    if not weight_decay or len(decayed) == len(parameters):
        return make(parameters, weight_decay=weight_decay, **options)
    rest = [each for each in parameters if each in undecayed]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return make([each for each in groups if each["params"]], weight_decay=weight_decay, **options)


def check_arguments(model: nn.Module, args: TrainingArguments, options: Mapping[str, Any]) -> None:
    """Reject arguments that would make adapters share what must be separate.

    Raises:
        UnsupportedError: there is such an argument.
    """
    refused = {
        "gradient_accumulation_steps": (args.gradient_accumulation_steps != 1, "Use Run(accumulate=...)."),
        "fp16": (args.fp16, "One adapter's overflow would skip the steps of all. Use bf16=True."),
        "label_smoothing_factor": (args.label_smoothing_factor, "Pass a loss_func that smooths labels."),
        "load_best_model_at_end": (
            args.load_best_model_at_end,
            "Every adapter has its own best step: save at every evaluation, without save_total_limit, and load the "
            "adapter's folder from the checkpoint that trainer.early_stop.best names.",
        ),
        "fsdp": (
            args.fsdp,
            "Every process must hold the whole model. Leave it out; the base model may be quantized to 4 bits.",
        ),
        "deepspeed": (args.deepspeed, "It supports only one optimizer. Leave it out."),
        "auto_find_batch_size": (args.auto_find_batch_size, "Choose batch sizes that fit."),
        "use_liger_kernel": (args.use_liger_kernel, "It returns one loss per batch. Leave it out."),
        "dataloader_drop_last": (args.dataloader_drop_last, "Drop rows from the datasets."),
        "train_sampling_strategy": (
            getattr(args, "train_sampling_strategy", "random") != "random",
            "Sort the rows of each dataset, and pass data_seed.",
        ),
        "n_gpu": (args.n_gpu > 1, "Start one process per GPU with torchrun or accelerate launch."),
        **{
            name: (options.get(name) is not None, instead)
            for name, instead in {
                "train_dataset": "Use Run(train_dataset=...).",
                "eval_dataset": "Use Run(eval_dataset=...).",
                "compute_loss_func": "Use loss_func=..., which returns losses and numbers of items.",
                "optimizers": "Use Run(optimizer=..., schedule=...).",
                "optimizer_cls_and_kwargs": "Use Run(optimizer=..., options=...).",
                "model_init": "Pass an enabled model.",
            }.items()
        },
    }
    for name, (is_asked, instead) in refused.items():
        if is_asked:
            value = options[name] if name in options else getattr(args, name)
            raise UnsupportedError(f"MultiAdapterTrainer got {name}={value!r}, which it doesn't support. {instead}")
    if not isinstance(model, PeftModel):
        raise UnsupportedError(
            f"MultiAdapterTrainer got a {type(model).__name__}: expected a PeftModel, which can save one folder per "
            "adapter. Use get_peft_model or PeftModel.from_pretrained."
        )
