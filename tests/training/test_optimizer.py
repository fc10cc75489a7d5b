"""AdapterOptimizer: adapters match separate runs by PEFT and torch; stopping and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from models import base_model, lora_configs, peft_model
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from tolerances import assert_close, relative_error
from training_runs import ADAPTERS, STEPS, adamw_runs, alone, batch_of, has_rows, mixed_batch, sgd_runs

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.training import AdapterOptimizer, Run, sample_losses


TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}


def enabled(dtype=torch.float32):
    """Build Llama, or GPT-2 in float64, because Llama's norms and rotations are in float32. No dropout, in eval
    mode."""
    model = peft_model("gpt2" if dtype == torch.float64 else "llama", dtype)
    return model, peft_multibatch.enable(model)


def train(model, optimizer, steps=range(STEPS), names=ADAPTERS, scale=1.0, own=None):
    """Train with a typical loop; returns the results of `step` for each adapter. `own`: only the rows of one
    adapter."""
    found = {name: [] for name in names}
    for step in steps:
        mixed = mixed_batch(step, names)
        if mixed is None:
            continue
        batch, ids = mixed
        if own is not None:
            rows = [row for row, name in enumerate(ids) if name == own]
            batch, ids = {key: value[rows] for key, value in batch.items()}, [own] * len(rows)
        if not ids:
            continue
        labels = batch.pop("labels")
        losses, items = sample_losses(model(**batch, adapter_ids=ids).logits, labels)
        (optimizer.loss(losses, items, ids) * scale).backward()
        for name, metrics in optimizer.step().items():
            found[name].append(metrics)
    return found


def weights(model):
    return {name: each.detach().clone() for name, each in model.named_parameters()}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("runs", [adamw_runs, sgd_runs], ids=["adamw", "sgd"])
def test_equal_to_separate_runs(dtype, runs):
    model, _ = enabled(dtype)
    before, plain = weights(model), copy.deepcopy(model)
    optimizer = AdapterOptimizer(model, runs())
    found = train(model, optimizer)
    after = weights(model)
    moved = 0
    for name, run in runs().items():
        expected, losses = alone(plain, name, run)
        assert (
            optimizer.steps[name]
            == len(losses)
            == sum(has_rows(name, step) for step in range(STEPS)) // run.accumulate
        )
        assert [each["loss"] for each in found[name]] == pytest.approx(losses, rel=TOLERANCES[dtype])
        for key, value in expected.items():
            assert relative_error(after[key], value) <= TOLERANCES[dtype], key
            # also compares the change itself, not only the sum with the initial weights
            changed = value - before[key]
            assert relative_error(after[key] - before[key], changed) <= 1e-2, key
            moved += bool(changed.any())
    assert moved == sum(name.count(".lora_") for name in after)
    assert all(torch.equal(after[key], before[key]) for key in after if ".lora_" not in key)


RATES = {"three": 0.5, "four": 0.1, "eight": 0.0}


def with_dropout(dtype=torch.float32):
    """Like ``enabled``, with the adapters' dropout layers inside PEFT's layers in train mode."""
    configs = lora_configs("gpt2" if dtype == torch.float64 else "llama")
    model, options = base_model("gpt2" if dtype == torch.float64 else "llama", dtype), {}
    for name, config in configs.items():
        config.lora_dropout = RATES[name]
        model = model if options else get_peft_model(model, config, name)
        if options:
            model.add_adapter(name, config)
        options = {"added": True}
    for key, module in model.eval().named_modules():
        module.train("lora_dropout" in key)
    peft_multibatch.enable(model)
    return model


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("runs", [adamw_runs, sgd_runs], ids=["adamw", "sgd"])
def test_with_dropout_equal_to_separate_runs(dtype, runs):
    """Over 20 steps, every adapter has the same masks as when trained alone with the same seed."""
    model, before = with_dropout(dtype), weights(with_dropout(dtype))
    optimizer = AdapterOptimizer(model, runs())
    found = train(model, optimizer)
    after, plain = weights(model), enabled(dtype)[0]
    train(plain, AdapterOptimizer(plain, runs()))
    for name, run in runs().items():
        own = with_dropout(dtype)
        losses = train(own, AdapterOptimizer(own, {name: run}), own=name)[name]
        assert [each["loss"] for each in found[name]] == pytest.approx(
            [each["loss"] for each in losses], rel=TOLERANCES[dtype]
        )
        keys = [key for key in after if f".{name}." in key]
        for key in keys:
            value = own.get_parameter(key)
            assert relative_error(after[key], value) <= TOLERANCES[dtype], key
            assert relative_error(after[key] - before[key], value - before[key]) <= 1e-2, key
        # an adapter without dropout is trained as without it, and the others aren't
        assert all(torch.equal(after[key], plain.get_parameter(key)) for key in keys) == (name == "eight")


def test_a_wrong_normalization_is_seen():
    """The mean over the whole batch, as in `outputs.loss`, doesn't match separate runs; AdamW would hide this."""
    model, _ = enabled(torch.float64)
    plain = copy.deepcopy(model)
    optimizer = AdapterOptimizer(model, sgd_runs())
    for step in range(3):
        batch, ids = mixed_batch(step)
        labels = batch.pop("labels")
        losses, items = sample_losses(model(**batch, adapter_ids=ids).logits, labels)
        optimizer.loss(losses, torch.full_like(items, items.sum() / len(items)), ids).backward()
        optimizer.step()
    expected, _ = alone(plain, "three", sgd_runs()["three"], steps=3)
    after = weights(model)
    assert max(relative_error(after[key], value) for key, value in expected.items()) > 1e-6


def test_a_factor_on_the_loss_cancels_out():
    """Such as that of gradient accumulation."""
    (one, _), (other, _) = enabled(torch.float64), enabled(torch.float64)
    found = train(one, AdapterOptimizer(one, sgd_runs()), range(6))
    scaled = train(other, AdapterOptimizer(other, sgd_runs()), range(6), scale=1 / 3)
    for name, steps in found.items():
        for key in ("loss", "items", "grad_norm"):
            assert [each[key] for each in scaled[name]] == pytest.approx([each[key] for each in steps], rel=1e-12)
    for mine, theirs in zip(one.parameters(), other.parameters()):
        assert relative_error(mine, theirs) <= 1e-12


def test_several_backwards_are_one_batch():
    (one, _), (other, _) = enabled(torch.float64), enabled(torch.float64)
    for model in (one, other):
        optimizer = AdapterOptimizer(model, {name: Run(lr=0.1, optimizer=torch.optim.SGD) for name in ADAPTERS})
        batch, ids = mixed_batch(0)
        parts = [range(len(ids))] if model is one else [[0, 3], [1, 2, 4], [5]]
        for part in parts:
            rows = {key: value[list(part)] for key, value in batch.items()}
            labels, own = rows.pop("labels"), [ids[row] for row in part]
            losses, items = sample_losses(model(**rows, adapter_ids=own).logits, labels)
            optimizer.loss(losses, items, own).backward()
        assert optimizer.step().keys() == {*ADAPTERS}
    for mine, theirs in zip(one.parameters(), other.parameters()):
        assert relative_error(mine, theirs) <= 1e-12


@pytest.mark.parametrize("build", [lambda: enabled()[0], with_dropout], ids=["", "with dropout"])
@pytest.mark.parametrize("runs", [adamw_runs, sgd_runs], ids=["adamw", "sgd"])
@pytest.mark.parametrize("middle", [7, 10])  # within an accumulation, and between two
def test_resuming_changes_nothing(tmp_path, runs, middle, build):
    whole = build()
    train(whole, AdapterOptimizer(whole, runs()))
    first = build()
    optimizer = AdapterOptimizer(first, runs())
    train(first, optimizer, range(middle))
    torch.save((optimizer.state_dict(), first.state_dict()), tmp_path / "state.pt")
    state, tensors = torch.load(tmp_path / "state.pt", weights_only=True)
    second = build()
    torch.manual_seed(5)  # simulates another process
    second.load_state_dict(tensors)
    optimizer = AdapterOptimizer(second, runs())
    optimizer.load_state_dict(state)
    train(second, optimizer, range(middle, STEPS))
    for mine, theirs in zip(second.parameters(), whole.parameters()):
        assert torch.equal(mine, theirs)


def test_a_new_optimizer_begins_anew():
    """In the same process with the same seed, a run drops the same elements as the first time."""
    model = with_dropout()
    before, found = copy.deepcopy(model.state_dict()), []
    for _ in range(2):
        model.load_state_dict(before)
        with AdapterOptimizer(model, sgd_runs()) as optimizer:
            train(model, optimizer, range(4))
        found.append(weights(model))
    assert all(torch.equal(each, found[1][key]) for key, each in found[0].items())
    torch.manual_seed(1)
    model.load_state_dict(before)
    with AdapterOptimizer(model, sgd_runs()) as optimizer:
        train(model, optimizer, range(4))
    assert any(not torch.equal(each, found[1][key]) for key, each in weights(model).items())


def test_state_of_other_adapters():
    model, _ = enabled()
    state = AdapterOptimizer(model, {"three": Run()}).state_dict()
    with pytest.raises(errors.ModelStateError, match=r"state of \['three'\]: expected that of \['four'\]"):
        AdapterOptimizer(model, {"four": Run()}).load_state_dict(state)


def warned(monkeypatch):
    """Collect logged warnings."""
    found = []
    monkeypatch.setattr("peft_multibatch.training.optimizer.logger.warning", found.append)
    return found


@pytest.mark.parametrize("fault", ["loss", "weights", "gradient"])
def test_an_adapter_that_is_not_finite_stops_alone(monkeypatch, fault):
    (model, _), (others, _) = enabled(), enabled()
    names = ("three", "eight")
    warnings = warned(monkeypatch)
    optimizer = AdapterOptimizer(model, adamw_runs())
    train(model, optimizer, range(2))
    kept = {key: value for key, value in weights(model).items() if ".four." in key}
    if fault == "weights":
        broken = next(each for key, each in model.named_parameters() if ".four." in key)
        with torch.no_grad():
            broken.view(-1)[0] = float("nan")
        kept = {key: value for key, value in weights(model).items() if ".four." in key}
    batch, ids = mixed_batch(2)
    labels = batch.pop("labels")
    losses, items = sample_losses(model(**batch, adapter_ids=ids).logits, labels)
    if fault == "loss":
        losses = losses * torch.tensor([float("inf") if name == "four" else 1.0 for name in ids])
    if fault == "gradient":  # infinite, with a finite loss
        rows = zip(ids, losses)
        losses = torch.stack([row + (row - row.detach()).sqrt() if name == "four" else row for name, row in rows])
    optimizer.loss(losses, items, ids).backward()
    optimizer.step()
    train(model, optimizer, range(3, STEPS))
    assert "multiplied" not in optimizer.stopped["four"]
    message = "its gradient had a norm of" if fault == "gradient" else "its loss was"
    assert optimizer.stopped["four"].startswith(message) and optimizer.steps["four"] == 0
    assert "eight" in optimizer.running and optimizer.steps["three"] == 20
    assert sum("'four' stopped" in each for each in warnings) == 1
    after = weights(model)
    assert all(torch.equal(after[key].nan_to_num(), value.nan_to_num()) for key, value in kept.items())
    train(others, AdapterOptimizer(others, {name: adamw_runs()[name] for name in names}), names=names)
    for (key, one), two in zip(model.named_parameters(), others.parameters()):
        if ".four." not in key:
            assert relative_error(one, two) <= TOLERANCES[torch.float32], key


def test_a_factor_that_overflows_in_float16(monkeypatch):
    """The reason names the factor, as that of a gradient scaler."""
    model, _ = enabled()
    warned(monkeypatch)
    optimizer = AdapterOptimizer(model, {name: Run() for name in ADAPTERS})
    batch, ids = mixed_batch(0)
    labels = batch.pop("labels")
    with torch.autocast("cpu", torch.float16):
        losses, items = sample_losses(model(**batch, adapter_ids=ids).logits, labels)
    (optimizer.loss(losses, items, ids) * 2.0**18).backward()
    optimizer.step()
    assert optimizer.stopped["three"].endswith("computed from a loss that was multiplied by 262144")


def test_when_all_have_stopped(monkeypatch):
    model, _ = enabled()
    warnings = warned(monkeypatch)
    optimizer = AdapterOptimizer(model, {name: Run() for name in ADAPTERS})
    batch, ids = mixed_batch(0)
    labels = batch.pop("labels")
    losses, items = sample_losses(model(**batch, adapter_ids=ids).logits, labels)
    optimizer.loss(losses * float("nan"), items, ids).backward()
    assert optimizer.step() == {}
    assert (optimizer.running, [*optimizer.stopped]) == ([], [*ADAPTERS])
    assert len(warnings) == 4 and warnings[-1] == "all adapters have stopped."
    before = weights(model)
    train(model, optimizer, range(3))
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
    assert len(warnings) == 4


def test_groups_as_in_lora_plus():
    """Groups with different learning rates, as PEFT's create_loraplus_optimizer makes them for one adapter."""
    model, _ = enabled(torch.float64)
    plain, names = copy.deepcopy(model), {each: key for key, each in model.named_parameters()}

    def lora_plus(parameters, lr, **options):
        groups = [[each for each in parameters if part in names[each]] for part in (".lora_A.", ".lora_B.")]
        return torch.optim.SGD([{"params": groups[0], "lr": lr}, {"params": groups[1], "lr": 16 * lr}])

    optimizer = AdapterOptimizer(model, {name: Run(lr=0.01, optimizer=lora_plus) for name in ADAPTERS})
    train(model, optimizer, [0])
    for name in ADAPTERS:
        plain.set_adapter(name)
        own = create_loraplus_optimizer(plain, torch.optim.SGD, lr=0.01, loraplus_lr_ratio=16)
        plain(**batch_of(name, 0)).loss.backward()
        own.step()
        plain.zero_grad()
    for (key, mine), theirs in zip(model.named_parameters(), plain.parameters()):
        assert relative_error(mine, theirs) <= 1e-7, key


def test_steps_end_a_run():
    model, _ = enabled()
    optimizer = AdapterOptimizer(model, {name: Run(steps=3) for name in ADAPTERS})
    train(model, optimizer, range(6))
    assert optimizer.steps == dict.fromkeys(ADAPTERS, 3)
    assert optimizer.stopped["three"] == "it has finished its 3 steps"


def test_an_adapter_without_rows_does_not_move():
    """Its schedule doesn't advance either, and AdamW doesn't decay its weights."""
    model, _ = enabled()
    runs = {name: Run(lr=0.1, weight_decay=0.5, schedule="linear", steps=9) for name in ADAPTERS}
    optimizer = AdapterOptimizer(model, runs)
    before = weights(model)
    for each in model.parameters():
        each.grad = torch.zeros_like(each) if each.requires_grad else None  # as compiled code leaves them
    train(model, optimizer, [0], names=("three",))
    after = weights(model)
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved and all(".three." in key for key in moved)
    assert optimizer.steps == {"three": 1, "four": 0, "eight": 0}
    assert optimizer.lrs["four"] == 0.1 > optimizer.lrs["three"]
    assert all(each.grad is None for each in model.parameters())


def test_rows_of_the_base_model_count_for_nothing():
    (one, _), (other, _) = enabled(), enabled()
    for model in (one, other):
        batch, ids = mixed_batch(0)
        labels = batch.pop("labels")
        if model is other:
            kept = [row for row, name in enumerate(ids) if name != "four"]
            batch, labels = {key: value[kept] for key, value in batch.items()}, labels[kept]
            ids = [ids[row] for row in kept]
        else:
            ids = ["__base__" if name == "four" else name for name in ids]
        optimizer = AdapterOptimizer(model, adamw_runs())
        losses, items = sample_losses(model(**batch, adapter_ids=ids).logits, labels)
        optimizer.loss(losses, items, ids).backward()
        assert optimizer.step().keys() == {"three", "eight"}
    for mine, theirs in zip(one.parameters(), other.parameters()):
        assert relative_error(mine, theirs) <= TOLERANCES[torch.float32]
    optimizer.loss(torch.zeros(2), torch.ones(2), [-1, -1]).backward()
    assert optimizer.step() == {}


def test_rows_without_labels_are_no_batch():
    """For an adapter that accumulates, or that has a schedule."""
    model, _ = enabled()
    optimizer, ids = AdapterOptimizer(model, {name: Run(lr=0.1) for name in ADAPTERS}), ["three", "four", "eight"]
    batch = batch_of("eight", 0)
    labels = batch.pop("labels")
    labels[1] = -100
    losses, items = sample_losses(model(**batch, adapter_ids=ids).logits, labels)
    optimizer.loss(losses, items, ids).backward()
    assert optimizer.step().keys() == {"three", "eight"}
    assert optimizer.steps["four"] == 0


def test_rows_without_labels_whose_gradients_are_not_finite():
    """Infinite weights, in rows that count for nothing, stop neither their adapter nor the others."""
    model, _ = enabled()
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for key, each in model.named_parameters():
            if ".four." in key:
                each.fill_(float("inf"))
    runs = {name: Run(lr=0.1, optimizer=torch.optim.SGD) for name in ADAPTERS}
    optimizer, ids = AdapterOptimizer(model, runs), ["three", "four", "three"]
    batch = batch_of("eight", 0)
    labels = batch.pop("labels")
    labels[1] = -100
    losses, items = sample_losses(model(**batch, adapter_ids=ids).logits, labels)
    optimizer.loss(losses, items, ids).backward()
    assert any(each.grad.isnan().any() for each in model.parameters() if each.grad is not None)
    assert optimizer.step().keys() == {"three"}
    assert not optimizer.stopped and all(each.grad is None for each in model.parameters())
    plain.set_adapter("three")
    own = {key: value[[0, 2]] for key, value in batch.items()}
    plain(**own, labels=labels[[0, 2]]).loss.backward()
    for key, value in plain.named_parameters():
        if ".three." in key:
            assert relative_error(model.get_parameter(key), value - 0.1 * value.grad) <= TOLERANCES[torch.float32], key


def test_a_loss_over_no_items_stops_its_adapter():
    model, _ = enabled()
    optimizer, ids = AdapterOptimizer(model, {name: Run(lr=0.1) for name in ADAPTERS}), ["three", "four", "eight"]
    batch = batch_of("eight", 0)
    losses, items = sample_losses(model(batch["input_ids"], adapter_ids=ids).logits, batch["labels"])
    optimizer.loss(losses, items * torch.tensor([1, 0, 1]), ids).backward()
    assert optimizer.step().keys() == {"three", "eight"}
    assert "over no items" in optimizer.stopped["four"]


@pytest.mark.parametrize("where", ["backward", "step", "clip"])
def test_continuing_after_an_interrupt(monkeypatch, where):
    """What was interrupted counts for nothing: neither incomplete gradients nor a batch without them."""
    (model, _), (other, _) = enabled(torch.float64), enabled(torch.float64)
    runs = {name: Run(lr=0.1, optimizer=torch.optim.SGD) for name in ADAPTERS}
    optimizer = AdapterOptimizer(model, runs)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if where == "backward":
            first = next(each for key, each in model.named_parameters() if ".h.0." in key and ".eight." in key)
            handle = first.register_hook(interrupt)
        elif where == "clip":
            patched.setattr("torch.nn.utils.get_total_norm", interrupt)
        else:
            patched.setattr("peft_multibatch.training.progress.Progress.take", interrupt)
        train(model, optimizer, [0])
    if where == "backward":
        handle.remove()
        assert any(each.grad is not None for each in model.parameters())
    train(model, optimizer, range(1, 4))
    train(other, AdapterOptimizer(other, runs), range(1, 4))
    for (key, mine), theirs in zip(model.named_parameters(), other.parameters()):
        assert relative_error(mine, theirs) <= 1e-12, key


def test_an_interrupt_while_flushing(monkeypatch):
    model, _ = enabled()
    optimizer = AdapterOptimizer(model, {"three": Run(accumulate=2)})
    train(model, optimizer, [0], names=("three",))
    before = weights(model)
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr("torch.nn.utils.get_total_norm", lambda *_: 1 / 0)
        optimizer.flush()
    assert optimizer.flush() == {} and all(each.grad is None for each in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())


def test_an_error_in_a_step_leaves_no_gradients():
    model, _ = enabled()
    optimizer = AdapterOptimizer(model, adamw_runs())
    model(**batch_of("three", 0), adapter_ids=["three"] * 2).loss.backward()
    with pytest.raises(errors.ModelStateError, match="unknown loss"):
        optimizer.step()
    assert all(each.grad is None for each in model.parameters())


def test_close_restores_what_has_gradients():
    model, _ = enabled()
    model.set_adapter("four")
    before = {key: each.requires_grad for key, each in model.named_parameters()}
    with AdapterOptimizer(model, {"three": Run(), "eight": Run()}):
        trained = {key for key, each in model.named_parameters() if each.requires_grad}
        assert trained == {key for key in before if ".three." in key or ".eight." in key}
    assert before == {key: each.requires_grad for key, each in model.named_parameters()}
    with pytest.raises(errors.UnknownAdapterError), AdapterOptimizer(model, {"three": Run(), "nobody": Run()}):
        pass
    assert before == {key: each.requires_grad for key, each in model.named_parameters()}


def test_a_reference_runs_beside_what_is_trained():
    """Rows with and without gradients share a forward pass; the reference gets none."""
    model, _ = enabled()
    with AdapterOptimizer(model, {"three": Run(lr=0.1)}) as optimizer:
        batch = batch_of("three", 0)
        labels = batch.pop("labels")
        twice = {key: torch.cat([value, value]) for key, value in batch.items()}
        logits = model(**twice, adapter_ids=["three"] * 2 + ["eight"] * 2).logits
        with torch.no_grad():
            assert_close(logits[2:], model(**batch, adapter_ids=["eight"] * 2).logits)
        losses, items = sample_losses(logits, torch.cat([labels, labels]))
        (optimizer.loss(losses[:2], items[:2], ["three"] * 2) + 0 * losses[2:].sum()).backward()
        assert {key.split(".")[-2] for key, each in model.named_parameters() if each.grad is not None} == {"three"}
        assert optimizer.step()["three"]["items"] == int((labels[:, 1:] != -100).sum())


def test_a_classifier():
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=160, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(transformers.BertForSequenceClassification(config), lora, "a").train()
    model.add_adapter("b", lora)
    plain = copy.deepcopy(model)
    peft_multibatch.enable(model)
    optimizer = AdapterOptimizer(model, {name: Run(lr=0.1, optimizer=torch.optim.SGD) for name in "ab"})
    inputs, labels, ids = torch.randint(2, 160, (5, 7)), torch.tensor([0, 2, 1, 1, 0]), ["a", "b", "b", "a", "b"]
    losses, items = sample_losses(model(inputs, adapter_ids=ids).logits, labels)
    optimizer.loss(losses, items, ids).backward()
    optimizer.step()
    for name in "ab":
        rows = [row for row, each in enumerate(ids) if each == name]
        plain.set_adapter(name)
        sgd = torch.optim.SGD([each for each in plain.parameters() if each.requires_grad], lr=0.1)
        plain(inputs[rows], labels=labels[rows]).loss.backward()
        sgd.step()
        plain.zero_grad()
    for (key, mine), theirs in zip(model.named_parameters(), plain.parameters()):
        assert relative_error(mine, theirs) <= TOLERANCES[torch.float32], key
    assert any("modules_to_save.b" in key for key, _ in model.named_parameters())


class TestRefused:
    def losses(self, model, ids):
        batch = batch_of("eight", 0)
        labels = batch.pop("labels")
        return sample_losses(model(**batch, adapter_ids=ids).logits, labels)

    def test_a_model_that_is_not_enabled(self):
        with pytest.raises(errors.NotEnabledError, match="Call enable"):
            AdapterOptimizer(peft_model(), {"three": Run()})

    def test_no_runs(self):
        with pytest.raises(errors.UnsupportedError, match="no runs"):
            AdapterOptimizer(enabled()[0], {})

    def test_the_base_model(self):
        with pytest.raises(errors.UnsupportedError, match="names of adapters"):
            AdapterOptimizer(enabled()[0], {"__base__": Run()})

    def test_router_losses(self):
        model = get_peft_model(base_model("mixtral"), lora_configs("mixtral")["eight"], "eight")
        peft_multibatch.enable(model)
        model.config.output_router_logits = True
        with pytest.raises(errors.UnsupportedError, match=r"output_router_logits = False"):
            AdapterOptimizer(model, {"eight": Run()})
        model.config.output_router_logits = False
        AdapterOptimizer(model, {"eight": Run()}).close()

    def test_a_loss_that_compares_samples(self):
        model, _ = enabled()
        optimizer, ids = AdapterOptimizer(model, adamw_runs()), ["three", "four", "eight"]
        losses, items = self.losses(model, ids)
        with pytest.raises(errors.AdapterIdsLengthError, match=r"contrastive ones, would mix.*one adapter at a time"):
            optimizer.loss(losses.mean(), items.sum(), ids)

    def test_a_mixture(self):
        model, _ = enabled()
        optimizer, ids = AdapterOptimizer(model, adamw_runs()), [{"three": 0.5, "four": 0.5}, "four", "eight"]
        with pytest.raises(errors.UnsupportedError, match=r"mixture 0.5 three \+ 0.5 four"):
            optimizer.loss(*self.losses(model, ids), ids)

    def test_an_adapter_without_a_run(self):
        model, _ = enabled()
        optimizer, ids = AdapterOptimizer(model, {"three": Run(), "four": Run()}), ["three", "four", "eight"]
        with pytest.raises(
            errors.UnknownAdapterError, match="'eight', which has no run: expected rows of three, four"
        ):
            optimizer.loss(*self.losses(model, ids), ids)

    def test_batch_norm(self):
        model, _ = enabled()
        model.get_base_model().norm = norm = torch.nn.BatchNorm1d(4)
        for each in norm.parameters():
            each.requires_grad_(False)
        optimizer, ids = AdapterOptimizer(model, adamw_runs()), ["three", "four", "eight"]
        with pytest.raises(errors.UnsupportedError, match=r"BatchNorm.*Call eval\(\)"):
            optimizer.loss(*self.losses(model, ids), ids)
        norm.eval()
        optimizer.loss(*self.losses(model, ids), ids)

    def test_a_parameter_that_all_would_train(self):
        model, _ = enabled()
        model.get_base_model().lm_head.weight.requires_grad_(True)
        with pytest.raises(errors.UnsupportedError, match=r"lm_head\.weight is trainable but belongs to no adapter"):
            AdapterOptimizer(model, adamw_runs())

    def test_a_loss_that_nobody_counted(self):
        model, _ = enabled()
        optimizer = AdapterOptimizer(model, adamw_runs())
        model(**batch_of("three", 0), adapter_ids=["three"] * 2).loss.backward()
        with pytest.raises(errors.ModelStateError, match=r"gradients of 'three' from an unknown loss"):
            optimizer.step()

    def test_a_negative_factor(self):
        """It would cancel out: gradient ascent would descend."""
        model, _ = enabled()
        optimizer, ids = AdapterOptimizer(model, adamw_runs()), ["three", "four", "eight"]
        (-optimizer.loss(*self.losses(model, ids), ids)).backward()
        with pytest.raises(errors.ModelStateError, match=r"negative factor.*Negate the losses"):
            optimizer.step()

    def test_a_loss_beside_those_that_were_counted(self):
        model, _ = enabled()
        optimizer, ids = AdapterOptimizer(model, adamw_runs()), ["three", "four", "eight"]
        losses, items = self.losses(model, ids)
        (optimizer.loss(losses[:2], items[:2], ids[:2]) + losses[2]).backward()
        with pytest.raises(errors.ModelStateError, match=r"gradients of 'eight' from an unknown loss"):
            optimizer.step()

    def test_an_adapter_that_was_frozen(self):
        model, _ = enabled()
        optimizer = AdapterOptimizer(model, adamw_runs())
        model.set_adapter("three")
        ids = ["three", "four", "eight"]
        losses, items = self.losses(model, ids)
        optimizer.loss(losses, items, ids).backward()
        with pytest.raises(
            errors.ModelStateError, match=r"'four' had rows in a batch but got no gradients.*set_adapter"
        ):
            optimizer.step()

    def test_a_stored_adapter(self, tmp_path):
        model, mb = enabled()
        model.save_pretrained(tmp_path)
        mb.adapter_store(max_host_memory="10MB").register("stored", tmp_path / "eight")
        with pytest.raises(errors.UnsupportedError, match="stored adapters can't be trained"):
            AdapterOptimizer(model, {"stored": Run()})

    def test_an_optimizer_of_other_adapters_too(self):
        """Such as one made from the whole model."""
        model, _ = enabled()

        def made(parameters, **options):
            return torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)

        before = {key: each.requires_grad for key, each in model.named_parameters()}
        with pytest.raises(errors.UnsupportedError, match=r"SGD, has \d+ parameters besides.*LoRA\+"):
            AdapterOptimizer(model, {"three": Run(optimizer=made), "four": Run()})
        assert before == {key: each.requires_grad for key, each in model.named_parameters()}

    def test_a_schedule_that_needs_metrics(self):
        with pytest.raises(errors.UnsupportedError, match="ReduceLROnPlateau"):
            AdapterOptimizer(enabled()[0], {"three": Run(schedule="reduce_lr_on_plateau")})

    @pytest.mark.parametrize(
        "options", [{"accumulate": 0}, {"steps": -1}, {"batch_size": 0}, {"weight": 0.0}], ids=str
    )
    def test_settings(self, options):
        with pytest.raises(ValueError, match="expected a positive"):
            Run(**options)

    def test_labels_of_another_kind(self):
        with pytest.raises(errors.UnsupportedError, match=r"logits \[2, 1\] and labels \[2\] of torch.float32"):
            sample_losses(torch.zeros(2, 1), torch.zeros(2))
        with pytest.raises(errors.UnsupportedError, match="two classes or more"):
            sample_losses(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
