"""Training with different base models and modes: 4 bit, bfloat16, checkpointing, compiled."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import transformers
from models import LLAMA_LIKE, SIZES, peft_model
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tolerances import RELATIVE_ERROR, relative_error

import peft_multibatch
from peft_multibatch.training import AdapterOptimizer, Run, sample_losses


NAMES = ("a", "b")
ROWS = {"a": 2, "b": 3}
RUNS = {
    "a": Run(lr=0.05, optimizer=torch.optim.SGD, max_grad_norm=1.0, schedule="linear", steps=9),
    "b": Run(lr=1e-3, accumulate=2, options={"eps": 1e-5}),
}
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def rows(name, step):
    generator = torch.Generator().manual_seed(10 * step + NAMES.index(name))
    return torch.randint(2, SIZES["vocab_size"], (ROWS[name], 8), generator=generator)


def mixed(model, steps, forward=None):
    peft_multibatch.enable(model)
    with AdapterOptimizer(model, RUNS) as optimizer:
        for step in range(steps):
            inputs = torch.cat([rows(name, step) for name in NAMES]).to(model.device)
            ids = [name for name in NAMES for _ in range(ROWS[name])]
            losses, items = sample_losses((forward or model)(inputs, adapter_ids=ids).logits, inputs)
            optimizer.loss(losses, items, ids).backward()
            optimizer.step()
    return {key: each.detach().clone() for key, each in model.named_parameters() if ".lora_" in key}


def alone(model, name, steps):
    """PEFT and torch with one adapter."""
    model.set_adapter(name)
    run, parameters = RUNS[name], [each for each in model.parameters() if each.requires_grad]
    optimizer = (run.optimizer or torch.optim.AdamW)(parameters, lr=run.lr, **run.options)
    schedule = transformers.get_scheduler(run.schedule or "constant", optimizer, 0, run.steps)
    for step in range(steps):
        inputs = rows(name, step).to(model.device)
        (model(inputs, labels=inputs).loss / run.accumulate).backward()
        if (step + 1) % run.accumulate == 0:
            if run.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, run.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return {key: each.detach() for key, each in model.named_parameters() if f".{name}." in key}


def compare(found, model, steps, tolerance):
    for name in NAMES:
        for key, value in alone(model, name, steps).items():
            assert relative_error(found[key], value) <= tolerance, key


def with_adapters(model):
    model = get_peft_model(model, LoraConfig(r=4, target_modules=LLAMA_LIKE, init_lora_weights=False), "a")
    model.add_adapter("b", LoraConfig(r=8, target_modules=LLAMA_LIKE[:3], init_lora_weights=False))
    return model


def four_bits(folder, device):
    config = transformers.LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1})
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "load_in_4bit": True}
    quantization = transformers.BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map=device, dtype=torch.float32
    )
    return with_adapters(prepare_model_for_kbit_training(model))


@needs_bitsandbytes
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_qlora(tmp_path, device):
    found = mixed(four_bits(tmp_path, device), steps=6)
    compare(found, four_bits(tmp_path, device), 6, 2e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    config = transformers.LlamaConfig(**SIZES)
    torch.manual_seed(0)
    model = with_adapters(transformers.LlamaForCausalLM(config)).train()
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    compare(mixed(model, 4), plain, 4, 2e-5)


def test_compiled_training():
    """Compiled code leaves zero gradients for adapters without rows, which must not change."""
    torch._dynamo.reset()
    model = peft_model()
    plain = copy.deepcopy(model)
    mb = peft_multibatch.enable(model)
    compiled = torch.compile(model.get_base_model(), backend="aot_eager")
    run = Run(lr=0.05, optimizer=torch.optim.SGD, weight_decay=0.1)
    before = {key: each.detach().clone() for key, each in model.named_parameters()}
    inputs = torch.cat([rows("a", 0), rows("b", 0)])
    ids = ["three"] * 2 + ["eight"] * 3
    with AdapterOptimizer(model, dict.fromkeys(("three", "four", "eight"), run)) as optimizer:
        with mb.batch(ids):
            losses, items = sample_losses(compiled(inputs).logits, inputs)
            optimizer.loss(losses, items, ids).backward()
        assert optimizer.step().keys() == {"three", "eight"}
    for name, own in (("three", inputs[:2]), ("eight", inputs[2:])):
        plain.set_adapter(name)
        parameters = [each for each in plain.parameters() if each.requires_grad]
        sgd = torch.optim.SGD(parameters, lr=0.05, weight_decay=0.1)
        plain(own, labels=own).loss.backward()
        sgd.step()
        plain.zero_grad()
    for (key, mine), theirs in zip(model.named_parameters(), plain.parameters()):
        assert relative_error(mine, theirs) <= 2e-5, key
        assert torch.equal(mine, before[key]) or ".three." in key or ".eight." in key


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_autograd():
    """Compiled backward passes count like others."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = with_adapters(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1})))
    plain = copy.deepcopy(model)
    peft_multibatch.enable(model)
    inputs, ids = torch.cat([rows("a", 0), rows("b", 0)]), ["a"] * 2 + ["b"] * 3
    run = Run(lr=0.05, optimizer=torch.optim.SGD)
    with AdapterOptimizer(model, dict.fromkeys(NAMES, run)) as optimizer:
        losses, items = sample_losses(model(inputs, adapter_ids=ids).logits, inputs)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            optimizer.loss(losses, items, ids).backward()
        assert optimizer.step().keys() == {"a", "b"}
    for name, own in (("a", inputs[:2]), ("b", inputs[2:])):
        plain.set_adapter(name)
        sgd = torch.optim.SGD([each for each in plain.parameters() if each.requires_grad], lr=0.05)
        plain(own, labels=own).loss.backward()
        sgd.step()
        plain.zero_grad()
    for (key, mine), theirs in zip(model.named_parameters(), plain.parameters()):
        assert relative_error(mine, theirs) <= 2e-5, key


def test_bfloat16_base():
    """Losses and gradient norms are in float32, and match single runs within bfloat16's rounding."""
    torch.manual_seed(0)
    model = with_adapters(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(torch.bfloat16))
    assert {each.dtype for key, each in model.named_parameters() if ".lora_" in key} == {torch.float32}
    plain = copy.deepcopy(model)
    peft_multibatch.enable(model)
    inputs = torch.cat([rows(name, 0) for name in NAMES])
    ids = [name for name in NAMES for _ in range(ROWS[name])]
    with AdapterOptimizer(model, RUNS) as optimizer:
        losses, items = sample_losses(model(inputs, adapter_ids=ids).logits, inputs)
        assert losses.dtype == torch.float32
        optimizer.loss(losses, items, ids).backward()
        moved = optimizer.step()
    plain.set_adapter("a")
    loss = plain(inputs[:2], labels=inputs[:2]).loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([each.grad for each in plain.parameters() if each.requires_grad]).item()
    assert moved["a"]["loss"] == pytest.approx(loss.item(), rel=RELATIVE_ERROR[torch.bfloat16])
    assert moved["a"]["grad_norm"] == pytest.approx(norm, rel=RELATIVE_ERROR[torch.bfloat16])
