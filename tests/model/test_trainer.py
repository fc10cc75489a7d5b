"""transformers' Trainer with default settings: the column of ids arrives, and every sample trains its own adapter."""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from models import left_padded, peft_model
from peft import LoraConfig, TaskType, get_peft_model
from test_pipelines import tokenizer
from tolerances import assert_close

import peft_multibatch


IDS = [0, 2, -1, 1, 0, 2]
NAMES = ["three", "four", "eight"]
RATE = 0.1


def classifier():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=160, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS, init_lora_weights=False)
    model = get_peft_model(transformers.BertForSequenceClassification(config), lora, "three")
    for name in NAMES[1:]:
        model.add_adapter(name, lora)
    return model


def rows_of(kind):
    inputs = left_padded()
    labels = torch.tensor([0, 2, 1, 1, 0, 2]) if kind == "classifier" else inputs["input_ids"]
    return {**inputs, "labels": labels}


def samples_of(rows, kind="list"):
    if kind == "datasets":
        return pytest.importorskip("datasets").Dataset.from_dict({key: value.tolist() for key, value in rows.items()})
    return [dict(zip(rows, values)) for values in zip(*(value.tolist() for value in rows.values()))]


class Gradients(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def step(model, samples, path, collator=None):
    """Take one step of SGD over all samples, with a Trainer that knows nothing about ids."""
    arguments = transformers.TrainingArguments(
        output_dir=str(path), per_device_train_batch_size=6, max_steps=1, learning_rate=RATE, report_to=[],
        save_strategy="no", lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=samples,
        data_collator=collator,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": RATE}),
    )
    trainer.add_callback(kept := Gradients())
    trainer.train()
    return trainer, kept.gradients


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def named(model, trained):
    """Return the model's parameters by their names in the part that the Trainer knows."""
    names = {parameter: name for name, parameter in trained.named_parameters()}
    return [(names[parameter], parameter) for parameter in model.parameters()]


def gradients_alone(model, rows):
    """Compute gradients with PEFT, one adapter at a time, with rows weighted as in the mean over the whole batch."""
    found = {}
    total = (rows["labels"][:, 1:] != -100).sum() if rows["labels"].dim() == 2 else len(IDS)
    for number, name in enumerate(NAMES):
        own = {key: value[[each == number for each in IDS]] for key, value in rows.items()}
        model.set_adapter(name)
        model.zero_grad()
        loss = model(**own).loss
        part = (own["labels"][:, 1:] != -100).sum() if own["labels"].dim() == 2 else len(own["labels"])
        (loss * part / total).backward()
        for key, value in model.named_parameters():
            if f".{name}." in key and value.grad is not None:
                found[key] = value.grad.clone()
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["classifier", "decoder"])
@pytest.mark.parametrize("around", ["peft", "inner", "hooked"])
@pytest.mark.parametrize("collated", ["default", "padding"])
@pytest.mark.parametrize("samples", ["list", "datasets"])
def test_a_column_of_ids(tmp_path, kind, around, collated, samples):
    model = classifier() if kind == "classifier" else peft_model()
    rows = rows_of(kind)
    expected = gradients_alone(model.train(), rows)
    inner = model.get_base_model()
    if around == "hooked":
        add_hook_to_module(inner, AlignDevicesHook("cpu"))
    mb = peft_multibatch.enable(model)
    model.set_requires_grad(NAMES)
    before = weights(model)
    collator = transformers.DataCollatorWithPadding(tokenizer()) if collated == "padding" else None
    data = samples_of({**rows, "adapter_ids": torch.tensor(IDS), "other": torch.arange(6)}, samples)
    trained = inner if around == "inner" else model
    trainer, gradients = step(trained, data, tmp_path, collator)
    assert "adapter_ids" in trainer._signature_columns
    after = weights(model)
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved == {key for key, value in expected.items() if value.any()}
    for (key, parameter), (name, _) in zip(model.named_parameters(), named(model, trained)):
        if key in moved:
            assert_close(gradients[name], expected[key])
            assert_close(parameter, before[key] - RATE * gradients[name])
    mb.disable()


def test_evaluation(tmp_path):
    model, rows = classifier().eval(), rows_of("classifier")
    mb = peft_multibatch.enable(model)
    with torch.no_grad():
        expected = model(**rows, adapter_ids=IDS).logits
        assert not torch.equal(model(**rows).logits, expected)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True
    )
    found = transformers.Trainer(model, arguments).predict(samples_of({**rows, "adapter_ids": torch.tensor(IDS)}))
    assert_close(torch.as_tensor(found.predictions), expected)
    mb.disable()
