"""MultiAdapterTrainer beside transformers' own Trainer, with one adapter at a time and the same settings."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from models import peft_model
from peft import LoraConfig, get_peft_model
from test_multi_adapter_trainer import LENGTH, arguments, dataset
from tolerances import relative_error
from torch.utils.data import DataLoader
from transformers import Trainer

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.training import AdapterBatchSampler, AdapterOptimizer, MultiAdapterTrainer, Run


TOLERANCE = 2e-5
NAMES = ("three", "eight")
SGD = {"optimizer": torch.optim.SGD, "lr": 0.05}


class InOrder(Trainer):
    """Trainer with the batches that the sampler gives to its adapter."""

    def get_train_dataloader(self):
        sampler = AdapterBatchSampler({self.name: len(self.train_dataset)}, {self.name: 2}, seed=self.args.seed)

        class Epochs:
            epoch = 0

            def __len__(self):
                return len(sampler)

            def __iter__(self):
                sampler.set_epoch(self.epoch)
                self.epoch += 1
                return iter(sampler)

        collator = self._get_collator_with_removed_columns(self.data_collator, "training")
        return DataLoader(self.train_dataset, batch_sampler=Epochs(), collate_fn=collator)


def without_dropout(model):
    for each in model.modules():
        if isinstance(each, torch.nn.Dropout):
            each.p = 0.0
    return model


def alone(model, name, rows, args):
    """Train one adapter with transformers' Trainer; returns all weights and the losses that it logged."""
    model = copy.deepcopy(model)
    model.set_adapter(name)
    made = (torch.optim.SGD, {"lr": args.learning_rate})
    trainer = InOrder(model, args, train_dataset=rows, optimizer_cls_and_kwargs=made)
    trainer.name = name
    trainer.train()
    return dict(model.named_parameters()), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def classifier():
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=160,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(config)
    base.classifier.bias.data.fill_(0.5)
    lora = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(base, lora, NAMES[0])
    model.add_adapter(NAMES[1], lora)
    return model


@pytest.mark.parametrize(("kind", "decay", "accumulate"), [("llama", 0.5, 3), ("classifier", 0.5, 1)])
def test_the_same_steps_as_trainer(tmp_path, kind, decay, accumulate):
    """Weight decay leaves out biases, and an epoch's incomplete accumulation is a step. Without accumulation for
    classifiers, whose losses Trainer would sum instead of averaging them."""
    rows = {name: dataset(name) for name in NAMES}
    if kind == "classifier":
        model = classifier()
        rows = {
            name: [{"input_ids": row["input_ids"], "label": place % 3} for place, row in enumerate(own)]
            for name, own in rows.items()
        }
    else:
        model = peft_model()
    plain, given = copy.deepcopy(model), {"weight_decay": decay, "learning_rate": 0.05, "logging_steps": 1}
    peft_multibatch.enable(model)
    runs = {name: Run(**SGD, batch_size=2, accumulate=accumulate, train_dataset=rows[name]) for name in NAMES}
    trainer = MultiAdapterTrainer(model, arguments(tmp_path, **given), runs)
    trainer.train()
    for name in NAMES:
        args = arguments(tmp_path, gradient_accumulation_steps=accumulate, **given)
        expected, losses = alone(plain, name, rows[name], args)
        entries = [entry for entry in trainer.state.log_history if f"{name}/loss" in entry]
        assert [entry[f"{name}/loss"] for entry in entries] == pytest.approx(losses, rel=TOLERANCE)
        for key, value in model.named_parameters():
            if f".{name}." in key:
                assert relative_error(value, expected[key]) <= TOLERANCE, key


@pytest.mark.parametrize("kind", ["gpt2", "bart", "mask", "xlnet"])
def test_the_loss_of_the_model(tmp_path, kind):
    """GPT-2 shifts labels although its class's name isn't that of a causal language model; XLNet doesn't."""
    if kind in ("gpt2", "bart"):
        model = without_dropout(peft_model(kind))
        for each in model.modules():
            if isinstance(getattr(each, "dropout", None), float):
                each.dropout = 0.0
    else:
        torch.manual_seed(0)
        if kind == "mask":
            config = transformers.BertConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=160
            )
            base, targets = transformers.BertForMaskedLM(config), ["query", "value"]
        else:
            config = transformers.XLNetConfig(vocab_size=160, d_model=32, n_layer=1, n_head=4, d_inner=48)
            base, targets = transformers.XLNetLMHeadModel(config), ["layer_1", "layer_2"]
        model = get_peft_model(without_dropout(base), LoraConfig(r=4, target_modules=targets), NAMES[0])
        model.add_adapter(NAMES[1], LoraConfig(r=8, target_modules=targets))
    plain = copy.deepcopy(model)
    peft_multibatch.enable(model)
    rows = {name: dataset(name, 4) for name in NAMES}
    runs = {
        name: Run(**SGD, batch_size=4, schedule="constant", max_grad_norm=0.0, train_dataset=rows[name])
        for name in NAMES
    }
    args = arguments(tmp_path, max_steps=1, warmup_steps=0, weight_decay=0.0)
    trainer = MultiAdapterTrainer(model, args, runs)
    trainer.train()
    moved = 0
    for name in NAMES:
        plain.set_adapter(name)
        batch = {key: torch.stack([row[key] for row in rows[name]]) for key in ("input_ids", "labels")}
        loss = plain.train()(**batch).loss
        (logged,) = [entry[f"{name}/loss"] for entry in trainer.state.log_history if f"{name}/loss" in entry]
        assert logged == pytest.approx(loss.item(), rel=TOLERANCE)
        loss.backward()
        torch.optim.SGD([each for each in plain.parameters() if each.requires_grad], lr=0.05).step()
        plain.zero_grad()
        for key, value in plain.named_parameters():
            if f".{name}." in key:
                assert relative_error(dict(model.named_parameters())[key], value) <= TOLERANCE, key
                moved += ".lora_B." in key and bool(value.any())
    assert moved


def test_another_loss_of_the_model(tmp_path):
    """A model whose loss isn't the mean cross entropy would train something else."""
    model = peft_model()
    peft_multibatch.enable(model)
    inner = model.get_base_model()
    shifted = type(inner).loss_function.fget(inner)
    inner._loss_function = lambda **options: 2 * shifted(**options)
    trainer = MultiAdapterTrainer(model, arguments(tmp_path), {"three": Run(train_dataset=dataset("three"))})
    with pytest.raises(errors.UnsupportedError, match=r"computed a loss of .* whose mean cross entropy.*loss_func"):
        trainer.train()


def test_a_first_batch_without_labels(tmp_path):
    """Whether labels are shifted shows in a later batch."""
    rows = [{**row, "labels": torch.full((LENGTH,), -100)} for row in dataset("three", 2)] + dataset("three", 2)
    model = without_dropout(peft_model("gpt2"))
    peft_multibatch.enable(model)
    run = Run(**SGD, batch_size=4, train_dataset=rows)
    trainer = MultiAdapterTrainer(model, arguments(tmp_path, max_steps=2), {"three": run})
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    collated = [trainer.data_collator([{**row, "adapter_ids": "three"} for row in some]) for some in (rows[:2], rows)]
    model.eval()
    with torch.no_grad():
        assert trainer.compute_loss(model, collated[0]).isnan()
        loss = trainer.compute_loss(model, collated[1])
        expected = model(**collated[1]).loss
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE)


def test_resuming_into_the_adapters_of_the_runs(tmp_path):
    """Adapter 'default' is saved beside the folders of others, and the active adapter has no run."""
    for names, trained in ((("default", "other"), ("default", "other")), (("default", "other"), ("default",))):
        folder = tmp_path / "-".join(trained)
        found = []
        for resumed in (False, True):
            model = peft_model()
            for name in names:
                model.add_adapter(name, model.peft_config["eight"])
            model.set_adapter(names[-1])
            for key, each in model.named_parameters():
                if any(f".{name}." in key for name in names):
                    torch.nn.init.normal_(each, std=0.1, generator=torch.Generator().manual_seed(len(key)))
            peft_multibatch.enable(model)
            args = arguments(folder, save_strategy="steps", save_steps=2, num_train_epochs=2)
            runs = {name: Run(batch_size=2, train_dataset=dataset("eight")) for name in trained}
            trainer = MultiAdapterTrainer(model, args, runs)
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resumed else None)
            found.append({key: each.detach().clone() for key, each in model.named_parameters()})
        assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_resuming_with_another_adapter(tmp_path):
    model = peft_model()
    peft_multibatch.enable(model)
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    rows = dataset("eight")
    MultiAdapterTrainer(model, args, {"three": Run(train_dataset=rows)}).train()
    with pytest.raises(errors.ModelStateError, match="doesn't contain the adapter 'four'"):
        both = {name: Run(train_dataset=rows) for name in ("three", "four")}
        MultiAdapterTrainer(model, args, both).train(resume_from_checkpoint=True)


def test_more_epochs_for_a_finished_run(tmp_path):
    """Like Trainer, resuming with more epochs continues, and with the steps of a longer run."""
    found = []
    for epochs in ((4,), (2, 4)):
        model = peft_model()
        peft_multibatch.enable(model)
        for number in epochs:
            options = {"save_strategy": "epoch", "num_train_epochs": number, "lr_scheduler_type": "constant"}
            runs = {name: Run(batch_size=2, train_dataset=dataset(name)) for name in NAMES}
            trainer = MultiAdapterTrainer(model, arguments(tmp_path / str(epochs), **options), runs)
            trainer.train(resume_from_checkpoint=True if number != epochs[0] else None)
        assert trainer.optimizer.steps == {"three": 20, "eight": 16}
        found.append({key: each.detach().clone() for key, each in model.named_parameters()})
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_a_second_run_has_all_rows_from_its_first_batch(tmp_path):
    """Adapters that stopped in the first run, and its best evaluations, are forgotten."""
    model, seen = peft_model(), []
    peft_multibatch.enable(model)
    given = {"three": Run(steps=2, batch_size=2, train_dataset=dataset("three"))}
    given["eight"] = Run(batch_size=2, train_dataset=dataset("eight"), eval_dataset=dataset("eight"), patience=9)
    trainer = MultiAdapterTrainer(model, arguments(tmp_path, eval_strategy="epoch"), given)
    trainer.train()
    model.get_base_model().register_forward_pre_hook(
        lambda module, inputs, kwargs: seen.append(len(kwargs["input_ids"])) if module.training else None,
        with_kwargs=True,
    )
    trainer.early_stop.best["eight"] = (-1.0, 0)
    trainer.train()
    assert seen[:2] == [4, 4]
    assert trainer.optimizer.steps == {"three": 2, "eight": 8}
    assert trainer.early_stop.best["eight"][0] > 0


def test_an_evaluation_that_is_not_a_number(tmp_path):
    """It counts as worse than any other, instead of better than all that follow."""
    model = peft_model()
    peft_multibatch.enable(model)
    run = Run(batch_size=2, train_dataset=dataset("three"), eval_dataset=dataset("three", 3, seed=1), patience=2)
    trainer = MultiAdapterTrainer(model, arguments(tmp_path), {"three": run})
    trainer.is_in_train, state = True, trainer.state
    trainer.create_optimizer()
    for loss in (float("nan"), 3.0, float("nan"), 2.0, 4.0):
        trainer.early_stop.on_evaluate(trainer.args, state, trainer.control, {"eval_three_loss": loss})
        assert not trainer.optimizer.stopped
    assert trainer.early_stop.best["three"][0] == 2.0
    trainer.early_stop.on_evaluate(trainer.args, state, trainer.control, {"eval_three_loss": float("nan")})
    assert "lowest" in trainer.optimizer.stopped["three"]


def test_options_of_a_schedule_from_the_arguments(tmp_path):
    model = peft_model()
    peft_multibatch.enable(model)
    run = Run(batch_size=2, train_dataset=dataset("three"), schedule_options={"min_lr": 1e-3})
    args = arguments(tmp_path, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-4})
    trainer = MultiAdapterTrainer(model, args, {"three": run})
    trainer.train()
    assert trainer.optimizer.lrs["three"] == pytest.approx(1e-3)


def test_more_steps_than_batches(tmp_path, monkeypatch):
    warnings, model = [], peft_model()
    monkeypatch.setattr("peft_multibatch.training.arguments.logger.warning", warnings.append)
    peft_multibatch.enable(model)
    runs = {"three": Run(steps=30, train_dataset=dataset("three")), "eight": Run(train_dataset=dataset("eight"))}
    MultiAdapterTrainer(model, arguments(tmp_path, max_steps=2), runs).train()
    assert ["'three' has steps=30, but there are batches for only 2" in each for each in warnings] == [True]


def test_parts_that_stay_frozen(tmp_path):
    """A user who froze lora_A trains only lora_B, as with PEFT alone; resuming too."""
    model = peft_model()
    model.set_adapter("three")
    for key, each in model.named_parameters():
        if ".lora_A." in key:
            each.requires_grad_(False)
    before, plain = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    peft_multibatch.enable(model)
    rows = {name: dataset(name, 4) for name in NAMES}
    runs = {name: Run(**SGD, batch_size=4, train_dataset=rows[name]) for name in NAMES}
    args = arguments(tmp_path, max_steps=2, weight_decay=0.1, save_strategy="steps", save_steps=1)
    for checkpoint in (None, str(tmp_path / "checkpoint-1")):
        MultiAdapterTrainer(model, args, runs).train(resume_from_checkpoint=checkpoint)
        after = model.state_dict()
        moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
        assert {key.split(".")[-3] for key in moved if ".three." in key} == {"lora_B"}
        assert {key.split(".")[-3] for key in moved if ".eight." in key} == {"lora_A", "lora_B"}
    batch = {key: torch.stack([row[key] for row in rows["three"]]) for key in ("input_ids", "labels")}
    with AdapterOptimizer(model, {"three": Run()}):
        trained = {key for key, each in model.named_parameters() if each.requires_grad}
    plain(**batch).loss.backward()
    assert trained == {key for key, each in plain.named_parameters() if each.grad is not None}
