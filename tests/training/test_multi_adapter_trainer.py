"""MultiAdapterTrainer: adapters match separate runs; logs, evaluations, checkpoints and resuming."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import transformers
from models import SIZES, base_model, peft_model
from peft import PeftModel, get_peft_model_state_dict
from tolerances import relative_error
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.training import AdapterBatchSampler, MixedDataset, MultiAdapterTrainer, Run


LENGTH = 8
ROWS = {"three": 10, "four": 5, "eight": 7}
EPOCHS = 2
TOLERANCE = 2e-5


def dataset(name, rows=None, seed=0):
    """Return rows of equal length, with different numbers of labels."""
    generator = torch.Generator().manual_seed(100 * [*ROWS].index(name) + seed)
    input_ids = torch.randint(2, SIZES["vocab_size"], (rows or ROWS[name], LENGTH), generator=generator)
    first = torch.randint(0, 5, (len(input_ids), 1), generator=generator)
    labels = torch.where(torch.arange(LENGTH) >= first, input_ids, -100)
    return [{"input_ids": x, "labels": y, "unread": 1} for x, y in zip(input_ids, labels)]


def runs(**options):
    return {
        "three": Run(batch_size=2, train_dataset=dataset("three"), **options),
        "four": Run(
            lr=1e-3, batch_size=1, accumulate=2, schedule="cosine", weight_decay=0.1, max_grad_norm=0.5,
            train_dataset=dataset("four"), **options,
        ),
        "eight": Run(
            lr=1e-2, batch_size=3, optimizer=torch.optim.SGD, schedule="constant", train_dataset=dataset("eight"),
            **options,
        ),
    }  # fmt: skip


def arguments(path, **options):
    given = {
        "num_train_epochs": EPOCHS, "learning_rate": 2e-3, "weight_decay": 0.01, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "seed": 5, "warmup_steps": 2,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(path), **{**given, **options})


def enabled():
    model = peft_model()
    peft_multibatch.enable(model)
    return model


def weights(model, name=None):
    return {
        key: each.detach().clone()
        for key, each in model.named_parameters()
        if ".lora_" in key and (name is None or f".{name}." in key)
    }


def alone(model, name, run, args):
    """Train with PEFT and torch alone, on this adapter's batches from the sampler."""
    model = copy.deepcopy(model).train()
    model.set_adapter(name)
    mixed = MixedDataset({name: dataset(name) for name in ROWS})
    sampler = AdapterBatchSampler(mixed.sizes, {name: run.batch_size for name, run in runs().items()}, seed=args.seed)
    accumulated = []  # like Trainer, not beyond the end of an epoch
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        own = [[mixed[row] for row in batch if mixed[row]["adapter_ids"] == name] for batch in sampler]
        own = [*filter(None, own)]
        accumulated.extend(own[start : start + run.accumulate] for start in range(0, len(own), run.accumulate))
    parameters = [each for each in model.parameters() if each.requires_grad]
    decay = args.weight_decay if run.weight_decay is None else run.weight_decay
    lr = args.learning_rate if run.lr is None else run.lr
    clip = args.max_grad_norm if run.max_grad_norm is None else run.max_grad_norm
    optimizer = (run.optimizer or torch.optim.AdamW)(parameters, lr=lr, weight_decay=decay)
    schedule = transformers.get_scheduler(run.schedule or "linear", optimizer, args.warmup_steps, len(accumulated))
    losses = []
    for some in accumulated:
        labels = [torch.stack([row["labels"] for row in batch])[:, 1:] for batch in some]
        items = sum(int((each != -100).sum()) for each in labels)
        total = 0
        for batch, wanted in zip(some, labels):
            logits = model(torch.stack([row["input_ids"] for row in batch])).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum") / items
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return weights(model, name), losses


def test_every_adapter_as_in_a_run_of_its_own(tmp_path):
    model = enabled()
    plain = copy.deepcopy(model)
    args = arguments(tmp_path)
    trainer = MultiAdapterTrainer(model, args, runs())
    trainer.train()
    assert trainer.state.global_step == EPOCHS * 5
    logs = trainer.state.log_history
    for name, run in runs().items():
        expected, losses = alone(plain, name, run, args)
        for key, value in expected.items():
            assert relative_error(dict(model.named_parameters())[key], value) <= TOLERANCE, key
        logged = [entry[f"{name}/loss"] for entry in logs if f"{name}/loss" in entry]
        assert logged == pytest.approx(losses, rel=TOLERANCE)
        last = [entry for entry in logs if f"{name}/step" in entry][-1]
        assert last[f"{name}/step"] == len(losses) and last[f"{name}/grad_norm"] > 0
    assert not any("learning_rate" in entry or "grad_norm" in entry for entry in logs)
    assert {entry["four/learning_rate"] for entry in logs if "four/learning_rate" in entry} != {1e-3}


def test_checkpoints_and_evaluations(tmp_path):
    model = enabled()
    given = {
        name: Run(lr=1e-3, train_dataset=dataset(name), eval_dataset=dataset(name, 3, seed=1))
        for name in ("three", "eight")
    }
    args = arguments(
        tmp_path, per_device_train_batch_size=4, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, max_steps=5, per_device_eval_batch_size=2, warmup_steps=0,
    )  # fmt: skip
    trainer = MultiAdapterTrainer(model, args, given)
    trainer.train()
    trainer.save_model()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} >= {"checkpoint-2", "checkpoint-4", "three"}
    assert {path.name for path in (tmp_path / "checkpoint-4").iterdir() if path.is_dir()} == {"three", "eight"}
    again = PeftModel.from_pretrained(base_model(), tmp_path / "three", adapter_name="three")
    saved = get_peft_model_state_dict(again, adapter_name="three")
    for key, value in get_peft_model_state_dict(model, adapter_name="three").items():
        assert torch.equal(saved[key], value)
    entries = [entry for entry in trainer.state.log_history if "eval_eight_loss" in entry]
    assert [entry["step"] for entry in entries][:2] == [2, 4]
    metrics = trainer.evaluate()
    model.set_adapter("eight")
    rows = [torch.stack([row[key] for row in dataset("eight", 3, seed=1)]) for key in ("input_ids", "labels")]
    with torch.no_grad():
        parts = [model(x, labels=y).loss.item() for x, y in zip(*(each.split(2) for each in rows))]
    assert metrics["eval_eight_loss"] == pytest.approx((2 * parts[0] + parts[1]) / 3, rel=1e-5)


@pytest.mark.parametrize("step", [2, 3, 5])  # within an accumulation, between two, and at the end of an epoch
def test_resuming_changes_nothing(tmp_path, step):
    whole = enabled()
    options = {"eval_dataset": dataset("four", 2, seed=1), "patience": 3}
    args = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    first = MultiAdapterTrainer(whole, arguments(tmp_path / "whole", **args), runs(**options))
    first.train()
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "again" / f"checkpoint-{step}")
    second = enabled()
    trainer = MultiAdapterTrainer(second, arguments(tmp_path / "again", **args), runs(**options))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.optimizer.steps == first.optimizer.steps
    assert trainer.optimizer.stopped == first.optimizer.stopped
    assert trainer.early_stop.state_dict() == first.early_stop.state_dict()
    for (key, mine), theirs in zip(second.named_parameters(), whole.parameters()):
        assert torch.equal(mine, theirs), key
    timeless = [
        {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
        for entry in (*trainer.state.log_history[:-1], *first.state.log_history[:-1])
    ]
    assert timeless[: len(timeless) // 2] == timeless[len(timeless) // 2 :]


def test_an_adapter_stops_early_and_alone(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("peft_multibatch.training.optimizer.logger.warning", warnings.append)
    model, calls = enabled(), []
    given = {name: Run(lr=1e-3, batch_size=2, train_dataset=dataset(name)) for name in ("three", "eight")}
    given["three"] = Run(  # it only gets worse on these labels
        lr=0.05, batch_size=2, train_dataset=dataset("three"), patience=1, eval_dataset=dataset("three", 3, seed=1)
    )
    model.get_base_model().register_forward_pre_hook(
        lambda module, inputs, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    args = arguments(tmp_path, num_train_epochs=6, eval_strategy="steps", eval_steps=2, warmup_steps=0)
    trainer = MultiAdapterTrainer(model, args, given)
    trainer.train()
    steps = trainer.optimizer.steps
    assert 2 <= steps["three"] < steps["eight"] == 24
    assert "evaluations ago" in trainer.optimizer.stopped["three"]
    assert sum("'three' stopped" in each for each in warnings) == 1
    assert trainer.early_stop.best["three"][1] == steps["three"] - 2
    assert calls[-4:] != [4] * 4  # it has no more rows


def test_all_stop(tmp_path):
    model = enabled()
    given = {name: Run(lr=float("inf"), train_dataset=dataset(name)) for name in ("three", "eight")}
    trainer = MultiAdapterTrainer(model, arguments(tmp_path, num_train_epochs=50), given)
    trainer.train()
    assert trainer.state.global_step == 2
    assert [*trainer.optimizer.stopped] == ["three", "eight"]


def test_steps_of_its_own(tmp_path):
    model = enabled()
    given = {"three": Run(steps=3, train_dataset=dataset("three")), "eight": Run(train_dataset=dataset("eight"))}
    trainer = MultiAdapterTrainer(model, arguments(tmp_path, per_device_train_batch_size=2), given)
    trainer.train()
    assert trainer.optimizer.steps["three"] == 3 < trainer.optimizer.steps["eight"]
    trainer.train()  # a second run starts from scratch
    assert trainer.optimizer.steps["three"] == 3


@pytest.mark.parametrize("kind", ["bart", "classifier"])
def test_other_heads(tmp_path, kind):
    """Encoder-decoder models, whose labels aren't shifted, and classifiers."""
    if kind == "bart":
        model, names = peft_model("bart"), ("three", "eight")
        for each in model.modules():
            if isinstance(getattr(each, "dropout", None), float):
                each.dropout = 0.0
        rows = {name: dataset(name, 4) for name in names}
    else:
        from peft import LoraConfig, get_peft_model

        config = transformers.BertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=160,
            num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        names = ("three", "eight")
        lora = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
        model = get_peft_model(transformers.BertForSequenceClassification(config), lora, "three")
        model.add_adapter("eight", lora)
        rows = {
            name: [{"input_ids": row["input_ids"], "label": number % 3} for number, row in enumerate(dataset(name, 4))]
            for name in names
        }
    plain = copy.deepcopy(model)
    peft_multibatch.enable(model)
    sgd = {"optimizer": torch.optim.SGD, "lr": 0.1, "schedule": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0}
    given = {name: Run(batch_size=4, train_dataset=rows[name], **sgd) for name in names}
    args = arguments(tmp_path, max_steps=1, warmup_steps=0)
    MultiAdapterTrainer(model, args, given).train()
    for name in names:
        plain.set_adapter(name)
        trained = [each for each in plain.parameters() if each.requires_grad]
        batch = transformers.default_data_collator(
            [{k: v for k, v in row.items() if k != "unread"} for row in rows[name]]
        )
        for each in plain.modules():
            if isinstance(each, torch.nn.Dropout):
                each.eval()
        plain(**batch).loss.backward()
        torch.optim.SGD(trained, lr=0.1).step()
        plain.zero_grad()
    moved = 0
    for (key, mine), theirs in zip(model.named_parameters(), plain.parameters()):
        assert relative_error(mine, theirs) <= TOLERANCE, key
        moved += ".lora_B" in key and bool(mine.any())
    assert moved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 2}, r"gradient_accumulation_steps=2.*Run\(accumulate=\.\.\.\)"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}, "its own best step"),
        ({"label_smoothing_factor": 0.1}, "loss_func"),
        ({"dataloader_drop_last": True}, "Drop rows"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(tmp_path, options, message):
    with pytest.raises(errors.UnsupportedError, match=message):
        MultiAdapterTrainer(enabled(), arguments(tmp_path, **options), runs())


def test_what_else_is_refused(tmp_path):
    model, args = enabled(), arguments(tmp_path)
    with pytest.raises(errors.UnsupportedError, match=r"train_dataset=\[\].*Run\(train_dataset=\.\.\.\)"):
        MultiAdapterTrainer(model, args, runs(), train_dataset=[])
    with pytest.raises(errors.UnsupportedError, match="expected a PeftModel"):
        MultiAdapterTrainer(model.get_base_model(), args, runs())
    with pytest.raises(errors.NotEnabledError):
        MultiAdapterTrainer(peft_model(), args, runs())
    with pytest.raises(errors.UnsupportedError, match="no runs"):
        MultiAdapterTrainer(model, args, {})
    with pytest.raises(errors.UnsupportedError, match="'four' has no train_dataset"):
        MultiAdapterTrainer(model, args, {"four": Run()})
    some = {"three": Run(batch_size=1, train_dataset=dataset("three")), "four": Run(train_dataset=dataset("four"))}
    with pytest.raises(errors.UnsupportedError, match="some runs have a batch_size, but that of 'four' doesn't"):
        MultiAdapterTrainer(model, args, some)
    rows = [{"input_ids": row["input_ids"]} for row in dataset("four")]
    with pytest.raises(errors.UnsupportedError, match=r"without labels.*loss_func"):
        MultiAdapterTrainer(model, args, {"four": Run(train_dataset=rows)}).train()
