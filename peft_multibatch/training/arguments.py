"""What MultiAdapterTrainer takes from TrainingArguments, and what it refuses."""

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
    """Runs with what they leave open from the arguments, and with the steps that their data give."""
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
    """Raise where all adapters would share what should be each one's own.

    Raises:
        UnsupportedError: they would.
    """
    refused = {
        "gradient_accumulation_steps": (args.gradient_accumulation_steps != 1, "Write Run(accumulate=...)."),
        "fp16": (args.fp16, "One adapter's overflow would skip the steps of all. Use bf16=True."),
        "label_smoothing_factor": (args.label_smoothing_factor, "Pass a loss_func that smooths labels."),
        "load_best_model_at_end": (
            args.load_best_model_at_end,
            "Every adapter has a best step of its own: save at every evaluation, and load the folder of the adapter "
            "from the checkpoint that trainer.early_stop.best names.",
        ),
        "fsdp": (
            args.fsdp,
            "Every process has to hold the model whole. Leave it out; the base model may be in 4 bit.",
        ),
        "deepspeed": (args.deepspeed, "It knows one optimizer. Leave it out."),
        "auto_find_batch_size": (args.auto_find_batch_size, "Choose batch sizes that fit."),
        "use_liger_kernel": (args.use_liger_kernel, "It returns one loss for a batch. Leave it out."),
        "dataloader_drop_last": (args.dataloader_drop_last, "Drop rows from the datasets."),
        "train_sampling_strategy": (
            getattr(args, "train_sampling_strategy", "random") != "random",
            "Order the rows of each dataset, and pass data_seed.",
        ),
        "n_gpu": (args.n_gpu > 1, "Start one process for each GPU, with torchrun or accelerate launch."),
        **{
            name: (options.get(name) is not None, instead)
            for name, instead in {
                "train_dataset": "Write Run(train_dataset=...).",
                "eval_dataset": "Write Run(eval_dataset=...).",
                "compute_loss_func": "Write loss_func=..., which returns losses and numbers of items.",
                "optimizers": "Write Run(optimizer=..., schedule=...).",
                "optimizer_cls_and_kwargs": "Write Run(optimizer=..., options=...).",
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
            f"MultiAdapterTrainer got a {type(model).__name__}: expected a PeftModel, which can save one folder for "
            "every adapter. Use get_peft_model or PeftModel.from_pretrained."
        )
