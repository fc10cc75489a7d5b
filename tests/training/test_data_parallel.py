"""Two processes with different rows and adapters: gradients are those of all rows together."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from models import peft_model
from ranks import launched, main, report
from test_multi_adapter_trainer import EPOCHS, arguments, runs, weights
from test_multi_adapter_trainer import alone as run_alone
from tolerances import relative_error
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training_runs import ADAPTERS, STEPS, adamw_runs, alone, batch_of, mixed_batch, sgd_runs

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.training import AdapterOptimizer, MultiAdapterTrainer, Run, sample_losses


TOLERANCE = 2e-5


def enabled(device):
    torch.manual_seed(dist.get_rank())  # weights differ until the optimizer copies the first process's
    model = peft_model().to(device)
    if dist.get_rank():
        for key, each in model.named_parameters():
            if ".lora_" in key:
                each.data.add_(torch.randn_like(each) * 0.01)
    peft_multibatch.enable(model)
    return model


def part(step, device):
    """Return the rows of one process: every other one, or a row of the base model if there is none."""
    batch, ids = mixed_batch(step)
    mine = slice(dist.get_rank(), None, 2)
    batch, ids = {key: value[mine].to(device) for key, value in batch.items()}, ids[mine]
    if not ids:
        batch, ids = {key: value[:1].to(device) for key, value in mixed_batch(step)[0].items()}, ["__base__"]
    return batch, ids


def train(model, wrapped, optimizer, device, backward=torch.Tensor.backward):
    lacking = 0
    for step in range(STEPS):
        batch, ids = part(step, device)
        lacking += len({*ids} & {*ADAPTERS}) < len({*mixed_batch(step)[1]})
        labels = batch.pop("labels")
        losses, items = sample_losses(wrapped(**batch, adapter_ids=ids).logits, labels)
        backward(optimizer.loss(losses, items, ids))
        optimizer.step()
    assert lacking > 5  # often only one process has rows of an adapter


def compare(model, made):
    for name, run in made.items():
        expected, _ = alone(peft_model(), name, run)
        for key, value in expected.items():
            found = dict(model.named_parameters())[key].cpu()
            assert relative_error(found, value) <= TOLERANCE, key
            everywhere = [torch.empty_like(found) for _ in range(2)] if found.device.type == "cpu" else None
            if everywhere and dist.get_backend() == "gloo":
                dist.all_gather(everywhere, found.detach())
                assert torch.equal(*everywhere), key


def separate_runs_with_adamw(_, device):
    model = enabled(device)
    train(model, model, AdapterOptimizer(model, adamw_runs()), device)
    compare(model, adamw_runs())


def separate_runs_with_sgd(_, device):
    model = enabled(device)
    train(model, model, AdapterOptimizer(model, sgd_runs()), device)
    compare(model, sgd_runs())


def wrapped_in_ddp(_, device):
    model = enabled(device)
    optimizer = AdapterOptimizer(model, sgd_runs())
    ids = [device] if device.type == "cuda" else None
    train(model, DistributedDataParallel(model, ids, find_unused_parameters=True), optimizer, device)
    compare(model, sgd_runs())


def prepared_by_accelerate(_, device):
    """accelerate's backward divides the loss by its own accumulation steps; with DistributedDataParallel and
    without."""
    handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=device.type == "cpu", gradient_accumulation_steps=3, kwargs_handlers=[handler])
    for is_evaluated in (True, False):
        model = enabled(device)
        optimizer = AdapterOptimizer(model, sgd_runs())
        prepared = accelerator.prepare_model(model, evaluation_mode=is_evaluated)
        assert isinstance(prepared, DistributedDataParallel) != is_evaluated
        train(model, prepared, optimizer, device, accelerator.backward)
        compare(model, sgd_runs())


def a_process_without_rows(_, device):
    """A process with only a row of the base model gets the gradients of the others' rows."""
    model = enabled(device)
    optimizer = AdapterOptimizer(model, {"three": Run(lr=0.1, optimizer=torch.optim.SGD), "four": Run()})
    alone = copy.deepcopy(model)
    batch = {key: value.to(device) for key, value in batch_of("three", 0).items()}
    labels, ids = batch.pop("labels"), ["three"] * 2 if dist.get_rank() else [-1, -1]
    losses, items = sample_losses(model(**batch, adapter_ids=ids).logits, labels)
    optimizer.loss(losses, items, ids).backward()
    assert optimizer.step().keys() == {"three"}
    alone.set_adapter("three")
    alone(**batch, labels=labels).loss.backward()
    for (key, mine), theirs in zip(model.named_parameters(), alone.parameters()):
        if ".three." in key:
            assert relative_error(mine, theirs - 0.1 * theirs.grad) <= TOLERANCE, key


def a_process_without_rows_in_float64(_, device):
    """Its sums have the dtype of the other's."""
    torch.manual_seed(0)
    model = peft_model("gpt2", torch.float64).to(device)
    peft_multibatch.enable(model)
    optimizer = AdapterOptimizer(model, {"three": Run(lr=0.1, optimizer=torch.optim.SGD)})
    alone = copy.deepcopy(model)
    batch = {key: value.to(device) for key, value in batch_of("three", 0).items()}
    labels, ids = batch.pop("labels"), ["three"] * 2 if dist.get_rank() else [-1, -1]
    losses, items = sample_losses(model(**batch, adapter_ids=ids).logits, labels)
    optimizer.loss(losses, items, ids).backward()
    moved = optimizer.step()
    alone.set_adapter("three")
    loss = alone(**batch, labels=labels).loss
    assert abs(moved["three"]["loss"] - loss.item()) <= 1e-5
    loss.backward()
    for (key, mine), theirs in zip(model.named_parameters(), alone.parameters()):
        if ".three." in key:
            assert relative_error(mine, theirs - 0.1 * theirs.grad) <= TOLERANCE, key


def an_adapter_that_is_not_finite(_, device):
    """An adapter fails on one process only, and stops on both."""
    model = enabled(device)
    optimizer = AdapterOptimizer(model, {name: Run(lr=1e-3) for name in ADAPTERS})
    batch, ids = part(0, device)
    labels = batch.pop("labels")
    losses, items = sample_losses(model(**batch, adapter_ids=ids).logits, labels)
    wrong = [float("nan") if name == "eight" and dist.get_rank() == 0 else 1.0 for name in ids]
    assert "eight" in ids
    optimizer.loss(losses * torch.tensor(wrong, device=device), items, ids).backward()
    assert "eight" not in optimizer.step()
    assert optimizer.running == ["three", "four"]


def other_runs_are_refused(_, device):
    model = enabled(device)
    names = ADAPTERS[: 1 + dist.get_rank()]
    with pytest.raises(errors.ModelStateError, match="processes started runs of different adapters"):
        AdapterOptimizer(model, {name: Run() for name in names})
    groups = [dist.new_group([rank]) for rank in range(2)]  # each trains independently
    AdapterOptimizer(model, {name: Run() for name in names}, groups[dist.get_rank()]).close()


def fsdp_is_refused(_, device):
    model = peft_model().to(device)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model.get_base_model())
    peft_multibatch.enable(model)
    with pytest.raises(errors.UnsupportedError, match=r"sharded by FSDP.*DistributedDataParallel"):
        AdapterOptimizer(model, {"three": Run()})


def trainer(folder, device):
    """Evaluations, checkpoints, and resuming in the middle of an accumulation."""
    model = enabled(device)
    args = {"save_strategy": "steps", "save_steps": 3, "use_cpu": device.type == "cpu", "eval_strategy": "epoch"}
    rows = runs()["four"].train_dataset[:3]
    first = MultiAdapterTrainer(model, arguments(folder / "run", **args), runs(eval_dataset=rows))
    assert first.args.world_size == 2
    first.train()
    assert first.state.global_step == EPOCHS * 5
    for name, run in runs().items():
        expected, losses = run_alone(peft_model(), name, run, first.args)
        for key, value in expected.items():
            assert relative_error(dict(model.named_parameters())[key].cpu(), value) <= TOLERANCE, key
        logged = [entry[f"{name}/loss"] for entry in first.state.log_history if f"{name}/loss" in entry]
        assert logged == pytest.approx(losses, rel=TOLERANCE)
    dist.barrier()
    again = enabled(device)
    second = MultiAdapterTrainer(again, arguments(folder / "run", **args), runs(eval_dataset=rows))
    second.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3"))
    for (key, mine), theirs in zip(weights(again).items(), weights(model).values()):
        assert torch.equal(mine, theirs), key


CASES = [
    separate_runs_with_adamw, separate_runs_with_sgd, wrapped_in_ddp, prepared_by_accelerate,
    a_process_without_rows, a_process_without_rows_in_float64, an_adapter_that_is_not_finite, other_runs_are_refused,
    fsdp_is_refused, trainer,
]  # fmt: skip


on_cpus, on_gpus = launched(__file__, "gloo"), launched(__file__, "nccl")


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_two_ranks(on_cpus, case):
    report(on_cpus[case])


@pytest.mark.multi_gpu
@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_two_gpus(on_gpus, case):
    report(on_gpus[case])


if __name__ == "__main__":
    main(CASES)
