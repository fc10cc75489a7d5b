"""Two ranks with different rows: DistributedDataParallel, FSDP, and `generate` with `synced_gpus`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from models import base_model, left_padded, peft_model, row_by_row
from peft import PeftModel
from ranks import launched, main, report
from tolerances import assert_close
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import peft_multibatch
from peft_multibatch import errors


NAMES = [
    ["three", "__base__", "eight", "four", "eight", "three"],
    ["eight", "eight", "__base__", "__base__", "four", "four"],
]


def own():
    """Return the ids of this rank."""
    return NAMES[dist.get_rank()]


def inputs_on(device):
    return {key: value.to(device) for key, value in left_padded().items()}


def logits(model, inputs, **ids):
    with torch.no_grad():
        return model(**inputs, **ids).logits


def oracle(model, names, inputs):
    return torch.cat(row_by_row(model, names, inputs, lambda row: logits(model, row)))


def distributed(model, device, **options):
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None, **options)


def sharded(device):
    """Build a model whose layers FSDP shards one by one, and the same model unsharded."""
    model = peft_model().to(device)
    whole = copy.deepcopy(model)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model.get_base_model())
    return model, whole


def ddp_forward(_, device):
    model, inputs = peft_model().to(device), inputs_on(device)
    expected = oracle(model, own(), inputs)
    model.set_requires_grad(["three", "four", "eight"])
    wrapped = distributed(model, device)
    mb = peft_multibatch.enable(model)
    indices = [-1 if name == "__base__" else mb.adapter_names.index(name) for name in own()]
    mixture = [{name: 1.0} if name != "__base__" else -1 for name in own()]
    for ids in (own(), indices, tuple(indices), torch.tensor(indices), mixture):
        assert_close(logits(wrapped, inputs, adapter_ids=ids), expected)
    with mb.batch(own()):
        assert_close(logits(wrapped, inputs), expected)
    with pytest.raises(errors.AdapterIdsLengthError):
        logits(wrapped, inputs, adapter_ids=own()[:3])
    assert_close(logits(wrapped, inputs, adapter_ids=own()), expected)


def ddp_gradients(_, device):
    """Compare with the mean of PEFT's gradients for each rank's rows, including adapters without rows on one rank."""
    model, inputs = peft_model().to(device), inputs_on(device)
    model.set_requires_grad(["three", "four", "eight"])
    whole, adapters = copy.deepcopy(model), {"three", "four", "eight"}
    assert len({frozenset({*names} & adapters) for names in NAMES}) == 2
    for names in NAMES:
        for row, name in enumerate(names):
            if name != "__base__":
                whole.set_adapter(name)
                whole.set_requires_grad(list(adapters))
                alone = whole(**{key: value[row : row + 1] for key, value in inputs.items()}).logits
                (alone.square().sum() / len(NAMES)).backward()
    peft_multibatch.enable(model)
    wrapped = distributed(model, device, find_unused_parameters=True)
    for _ in range(2):  # the second call shows whether the first one left anything behind
        model.zero_grad()
        wrapped(**inputs, adapter_ids=own()).logits.square().sum().backward()
        found = 0
        for (name, mine), theirs in zip(model.named_parameters(), whole.parameters()):
            if theirs.grad is not None and theirs.grad.any():
                assert_close(mine.grad, theirs.grad)
                found += "lora_" in name
        assert found > 40


def ddp_without_unused_parameters(_, device):
    """An adapter without rows leaves parameters without gradients, which DDP must be told; its error says so."""
    model, inputs = peft_model().to(device), inputs_on(device)
    model.set_requires_grad(["three", "four", "eight"])
    peft_multibatch.enable(model)
    wrapped = distributed(model, device)
    wrapped(**inputs, adapter_ids=["four"] * 6).logits.sum().backward()
    with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
        wrapped(**inputs, adapter_ids=["four"] * 6)


def accelerate_prepare(_, device):
    model, inputs = peft_model().to(device), inputs_on(device)
    expected = oracle(model, own(), inputs)
    model.set_requires_grad(["three", "four", "eight"])
    accelerator = Accelerator(cpu=device.type == "cpu")
    for order in ("enable", "prepare"):
        mb = peft_multibatch.enable(model) if order == "enable" else None
        prepared = accelerator.prepare(model)
        assert isinstance(prepared, DistributedDataParallel)
        mb = mb or peft_multibatch.enable(model)
        assert_close(logits(prepared, inputs, adapter_ids=own()), expected)
        model = accelerator.unwrap_model(prepared)
        assert_close(logits(model, inputs, adapter_ids=own()), expected)
        mb.disable()


def synced_gpus(_, device):
    """Ranks that are done keep calling the model until all are done; otherwise FSDP would wait forever."""
    model, whole = sharded(device)
    inputs, steps = inputs_on(device), 4 + 5 * dist.get_rank()
    options = {"max_new_tokens": steps, "do_sample": False}
    expected = row_by_row(whole, own(), inputs, lambda row: whole.generate(**row, **options))
    mb = peft_multibatch.enable(model)
    for ids in (own(), own()):
        actual = model.generate(**inputs, **options, adapter_ids=ids, synced_gpus=True)
        assert torch.equal(actual, torch.cat(expected))
    with mb.batch(own()):
        assert torch.equal(model.generate(**inputs, **options, synced_gpus=True), torch.cat(expected))


def sharded_before_enable(_, device):
    model, whole = sharded(device)
    inputs = inputs_on(device)
    mb = peft_multibatch.enable(model)
    assert {(entry.how, entry.reason) for entry in mb.report()} == {
        ("per segment", "FSDP gathers its weights when it runs")
    }
    for names in (own(), own()[::-1]):
        assert_close(logits(model, inputs, adapter_ids=names), oracle(whole, names, inputs))
    mixture = [{"four": 0.5}, {"three": 0.5, "eight": 0.5}, *own()[2:]]
    peft_multibatch.enable(whole)
    assert_close(logits(model, inputs, adapter_ids=mixture), logits(whole, inputs, adapter_ids=mixture))


def sharded_by_transformers(folder, device):
    """Adapters are added to a sharded model, and are whole on every rank."""
    whole, inputs = peft_model().to(device), inputs_on(device)
    if dist.get_rank() == 0:
        base_model().save_pretrained(folder / "base")
        whole.save_pretrained(folder / "adapters")
    dist.barrier()
    how = DistributedConfig(fsdp_size=dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=how).eval()
    model = PeftModel.from_pretrained(model, folder / "adapters" / "three", adapter_name="three")
    for name in ("four", "eight"):
        model.load_adapter(folder / "adapters" / name, adapter_name=name)
    peft_multibatch.enable(model.eval())
    assert_close(logits(model, inputs, adapter_ids=own()), oracle(whole, own(), inputs))


def sharded_after_enable(_, device):
    """The next call notices it, and doesn't read the missing weights."""
    for root in ("base model", "layers", "PeftModel"):
        model, inputs = peft_model().to(device), inputs_on(device)
        whole = copy.deepcopy(model)
        mb = peft_multibatch.enable(model)
        assert_close(logits(model, inputs, adapter_ids=own()), oracle(whole, own(), inputs))
        if root == "layers":
            for layer in model.get_base_model().model.layers:
                fully_shard(layer)
        else:
            fully_shard(model if root == "PeftModel" else model.get_base_model())
        for _ in range(2):
            assert_close(logits(model, inputs, adapter_ids=own()), oracle(whole, own(), inputs))
        assert {entry.how for entry in mb.report()} == {"per segment"}


def what_fsdp_cannot_run_is_refused(_, device):
    (model, _), inputs = sharded(device), inputs_on(device)
    model.set_requires_grad(["three", "four", "eight"])
    peft_multibatch.enable(model)
    with pytest.raises(errors.UnsupportedError, match=r"sharded by FSDP.*with gradients.*torch\.no_grad"):
        model(**inputs, adapter_ids=own())
    for part in ("q_proj.base_layer", "q_proj.lora_A.three"):  # ranks would gather once per adapter
        for root in (True, False):
            model = peft_model().to(device)
            fully_shard(model.get_base_model().model.layers[0].self_attn.get_submodule(part))
            if root:
                fully_shard(model.get_base_model())
            message = rf"by itself \({part[7:]}\).*decoder layers.*fully_shard"
            peft_multibatch.enable(model)
            with pytest.raises(errors.UnsupportedError, match=message):
                logits(model, inputs, adapter_ids=["three"] * 6)
    options = {"use_orig_params": True, "device_id": device}
    model = peft_model().to(device)
    layers = model.get_base_model().model.layers
    layers[0] = FullyShardedDataParallel(layers[0], **options)
    with pytest.raises(errors.UnsupportedError, match=r"FullyShardedDataParallel.*fully_shard"):
        peft_multibatch.enable(model)
    with pytest.raises(errors.UnsupportedError, match="FullyShardedDataParallel"):
        peft_multibatch.enable(FullyShardedDataParallel(peft_model().to(device), **options))
    model = peft_model().to(device)
    peft_multibatch.enable(model)
    layers = model.get_base_model().model.layers
    layers[0] = FullyShardedDataParallel(layers[0], **options)
    with pytest.raises(errors.UnsupportedError, match="FullyShardedDataParallel"):
        logits(model, inputs, adapter_ids=own())


CASES = [
    ddp_forward, ddp_gradients, ddp_without_unused_parameters, accelerate_prepare, synced_gpus, sharded_before_enable,
    sharded_by_transformers, sharded_after_enable, what_fsdp_cannot_run_is_refused,
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
