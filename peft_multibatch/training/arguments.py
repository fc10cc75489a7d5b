"""Apply TrainingArguments to the runs of MultiAdapterTrainer, and reject arguments that it can't support."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from peft_multibatch.compat import PeftModel
from peft_multibatch.errors import UnsupportedError
from peft_multibatch.training.data import AdapterBatchSampler
from peft_multibatch.training.runs import Run


def filled_runs(runs: Mapping[str, Run], args: TrainingArguments, sampler: AdapterBatchSampler) -> dict[str, Run]:
    """Fill in what runs leave open: settings from the arguments, and the number of steps from their data."""
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(sampler))
    batches = sampler.batches(total)
    made, defaults = Trainer.get_optimizer_cls_and_kwargs(args)
    found = {}
    for name, run in runs.items():
        steps = run.steps or max(math.ceil(batches[name] / run.accumulate), 1)
        filled: dict[str, Any] = {"steps": steps}
        if run.optimizer is None:
            filled["optimizer"], filled["options"] = made, {**defaults, **run.options}
        if run.schedule is None:
            filled["schedule"], filled["schedule_options"] = args.lr_scheduler_type, args.lr_scheduler_kwargs
        given = {
            "lr": args.learning_rate,
            "weight_decay": args.weight_decay,
            "max_grad_norm": args.max_grad_norm,
            "warmup_steps": args.get_warmup_steps(steps),
        }
        filled |= {key: value for key, value in given.items() if getattr(run, key) is None}
        found[name] = dataclasses.replace(run, **filled)
    return found


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
            "Every adapter has its own best step: save at every evaluation, and load the adapter's folder from the "
            "checkpoint that trainer.early_stop.best names.",
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
