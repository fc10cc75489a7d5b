"""TRL's trainers: SFT of many adapters, DPO and GRPO of one policy with its reference; all else is an error."""

from __future__ import annotations

import copy
import importlib.util
import math

import pytest
import torch
from models import peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tolerances import assert_close
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.training import AdapterCollator


datasets = pytest.importorskip("datasets")
NAMES = ["three", "four", "eight"]
IDS = [0, 2, -1, 1, 0, 2]
NAMED = [NAMES[number] if number >= 0 else "__base__" for number in IDS]
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")


def tokenizer():
    words = {word: place for place, word in enumerate(["pad", "end", *(f"w{number}" for number in range(2, 160))])}
    made = Tokenizer(WordLevel(words, "pad"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="pad", eos_token="end")


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def options(path, **given):
    return {
        "output_dir": str(path), "per_device_train_batch_size": 6, "max_steps": 1, "report_to": [],
        "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0, "use_cpu": True, "bf16": False, **given,
    }  # fmt: skip


def rows():
    return torch.randint(2, 160, (6, 9), generator=torch.Generator().manual_seed(7))


def alone(model, input_ids):
    """PEFT, one adapter at a time: gradients of the mean over the tokens of the whole batch."""
    found = {}
    for number, name in enumerate(NAMES):
        own = input_ids[[each == number for each in IDS]]
        model.set_adapter(name)
        model.zero_grad()
        (model(own, labels=own).loss * len(own) / len(input_ids)).backward()
        found |= {key: each.grad.clone() for key, each in model.named_parameters() if each.grad is not None}
    return found


def sft(path, model, ids, collator=True, **given):
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    data = datasets.Dataset.from_dict({"input_ids": rows().tolist(), "adapter_ids": ids})
    inner = DataCollatorForLanguageModeling(pad_token_id=0)
    return SFTTrainer(
        model,
        SFTConfig(**options(path, **{"remove_unused_columns": False, **given})),
        train_dataset=data,
        processing_class=tokenizer(),
        data_collator=AdapterCollator(inner) if collator else None,
    )


@needs_trl
@pytest.mark.parametrize("ids", [IDS, NAMED], ids=["ids", "names"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft(tmp_path, ids, checkpointing):
    model = peft_model()
    expected = alone(copy.deepcopy(model).train(), rows())
    peft_multibatch.enable(model)
    trainer = sft(tmp_path, model, ids, gradient_checkpointing=checkpointing)
    model.set_requires_grad(NAMES)
    trainer.add_callback(kept := Gradients())
    trainer.train()
    assert {key for key, value in kept.found.items() if value.any()} == {
        key for key, value in expected.items() if value.any()
    }
    for key, value in expected.items():
        assert_close(kept.found[key], value)


@needs_trl
@pytest.mark.parametrize("collator", [False, True])
@pytest.mark.parametrize("removed", [False, True])
def test_ids_that_sft_drops(tmp_path, collator, removed):
    model = peft_model()
    peft_multibatch.enable(model)
    trainer = sft(tmp_path, model, NAMED, collator, remove_unused_columns=removed)
    if collator and not removed:
        trainer.train()
        return
    with pytest.raises(errors.AdapterIdsError, match=r"adapter_ids.*remove_unused_columns=False"):
        trainer.train()


@pytest.mark.parametrize("kind", ["list", "datasets"])
@pytest.mark.parametrize("collator", [None, DataCollatorWithPadding, AdapterCollator])
def test_a_column_of_names_in_trainer(tmp_path, kind, collator):
    """The default collator drops names, and the model's error says so; ours passes them on."""
    model, input_ids = peft_model(), rows()
    expected = alone(copy.deepcopy(model).train(), input_ids)
    peft_multibatch.enable(model)
    model.set_requires_grad(NAMES)
    data = [{"input_ids": row, "labels": row, "adapter_ids": name} for row, name in zip(input_ids.tolist(), NAMED)]
    data = datasets.Dataset.from_list(data) if kind == "datasets" else data
    made = collator(tokenizer()) if collator is DataCollatorWithPadding else collator and collator()
    arguments = TrainingArguments(**options(tmp_path))
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset={"a": data}, data_collator=made)
    trainer.add_callback(kept := Gradients())
    if collator is not None and collator is not AdapterCollator:
        with pytest.raises(ValueError, match="adapter_ids"):  # the tokenizer's own error
            trainer.train()
        return
    if collator is None:
        for call in (trainer.train, trainer.evaluate):
            with pytest.raises(errors.AdapterIdsError, match="has a column 'adapter_ids' that didn't reach the model"):
                call()
        return
    trainer.train()
    for key, value in expected.items():
        assert_close(kept.found[key], value)
    assert math.isfinite(trainer.evaluate()["eval_a_loss"])


def test_a_trainer_without_ids_is_left_alone(tmp_path):
    """For a dataset without such a column, and for another model."""
    model, other = peft_model(), peft_model()
    peft_multibatch.enable(model)
    peft_multibatch.enable(other)
    data = [{"input_ids": row, "labels": row} for row in rows().tolist()]
    Trainer(model, TrainingArguments(**options(tmp_path)), train_dataset=data).train()

    class Distilling(Trainer):
        def compute_loss(self, model, inputs, **_):
            other(inputs["input_ids"])
            return super().compute_loss(model, inputs)

    data = [{**row, "adapter_ids": number} for row, number in zip(data, IDS)]
    Distilling(model, TrainingArguments(**options(tmp_path)), train_dataset=data).train()


def preferences(**columns):
    data = {
        "prompt": [f"w{number} w9" for number in range(2, 6)],
        "chosen": [" w10 w11 w12", " w13", " w14 w15", " w16"],
        "rejected": [" w20 w21", " w22 w23", " w24", " w25"],
    }
    return datasets.Dataset.from_dict({**data, **columns})


def policy():
    """Return an adapter with the name that TRL expects, which it copies as the reference."""
    model = peft_model()
    model.add_adapter("default", model.peft_config["eight"])
    model.set_adapter("default")
    return model


def dpo(path, model, data, **given):
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        **options(path, gradient_checkpointing=False, logging_steps=1, max_steps=2, learning_rate=1e-2)
    )
    return DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer(), **given)


@needs_trl
def test_dpo_of_one_policy_is_as_without_us(tmp_path):
    losses = []
    for is_enabled in (False, True):
        torch.manual_seed(0)
        model = policy()
        if is_enabled:
            peft_multibatch.enable(model)
        trainer = dpo(tmp_path, model, preferences())
        trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        losses.append((logged, [each.clone() for each in model.parameters()]))
    assert losses[0][0] == losses[1][0]
    assert losses[0][0][1] < losses[0][0][0] == pytest.approx(math.log(2))  # starting from the reference
    assert all(map(torch.equal, losses[0][1], losses[1][1]))


@needs_trl
@pytest.mark.parametrize("how", ["column", "block", "collator"])
def test_dpo_of_several_policies_is_refused(tmp_path, how):
    model = policy()
    mb = peft_multibatch.enable(model)
    if how == "column":
        with pytest.raises(errors.AdapterIdsError, match=r"DPOTrainer has a column.*examples/dpo_reference\.py"):
            dpo(tmp_path, model, preferences(adapter_ids=["three", "default"] * 2)).train()
    elif how == "block":
        trainer = dpo(tmp_path, model, preferences())
        message = r"DPOTrainer called a model with ids.*its reference model.*examples/dpo_reference\.py"
        with mb.batch(["three", "default"] * 4), pytest.raises(errors.UnsupportedError, match=message):
            trainer.train()
    else:
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        inner = DataCollatorForPreference(pad_token_id=0)

        def collator(examples):
            return {**inner(examples), "adapter_ids": ["three", "default"] * 4}

        trainer = dpo(tmp_path, model, preferences(), data_collator=collator)
        with pytest.raises(errors.UnsupportedError, match="called a model with ids"):
            trainer.train()


@needs_trl
@pytest.mark.parametrize("columns", [{}, {"adapter_ids": ["three", "eight"] * 2}], ids=["one policy", "several"])
def test_grpo(tmp_path, columns):
    from trl import GRPOConfig, GRPOTrainer

    found = []
    for is_enabled in (False, True):
        torch.manual_seed(0)
        model = policy()
        if is_enabled:
            peft_multibatch.enable(model)
        given = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "gradient_checkpointing": False}
        arguments = GRPOConfig(**options(tmp_path, **given), generation_kwargs={"min_new_tokens": 1})
        data = preferences(**columns).remove_columns(["chosen", "rejected"])
        trainer = GRPOTrainer(
            model, lambda completions, **_: [float(len(set(each))) for each in completions], arguments,
            train_dataset=data, processing_class=tokenizer(),
        )  # fmt: skip
        if columns and is_enabled:
            with pytest.raises(errors.AdapterIdsError, match="GRPOTrainer has a column 'adapter_ids'"):
                trainer.train()
            return
        trainer.train()
        found.append([each.clone() for each in model.parameters()])
    assert all(map(torch.equal, *found))
