"""Direct preference optimization (DPO) of two policies, with their references as rows of the same batch.

    python examples/dpo_reference.py

A small Llama with random weights stands for yours. Each policy has its own preferences and starts as a copy of its
reference, a separate adapter that isn't trained. One forward pass runs each policy's chosen and rejected answers, and
the same answers with its reference.
"""

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM

import peft_multibatch
from peft_multibatch.training import AdapterOptimizer, Run, sample_losses


BETA, STEPS, PAIRS, LENGTH = 0.1, 15, 4, 12
POLICIES = {"formal": "formal-reference", "casual": "casual-reference"}

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=200,
)  # fmt: skip
lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name="formal")
for name in ("casual", *POLICIES.values()):
    model.add_adapter(name, lora)
parameters = dict(model.named_parameters())
for policy, reference in POLICIES.items():
    for name, parameter in parameters.items():
        if f".{policy}." in name:
            parameters[name.replace(f".{policy}.", f".{reference}.")].data.copy_(parameter)

# prompts of four tokens; answers of the formal style use tokens above 100, those of the casual style tokens below
prompts = torch.randint(0, 200, (PAIRS, 4))
high, low = torch.randint(100, 200, (PAIRS, LENGTH - 4)), torch.randint(0, 100, (PAIRS, LENGTH - 4))
preferences = {"formal": (high, low), "casual": (low, high)}
answers = {name: [torch.cat([prompts, answer], 1) for answer in pair] for name, pair in preferences.items()}


def dpo_losses(policy_log_probs, reference_log_probs):
    """Compute the loss of every pair from log-probabilities ``[chosen and rejected, pairs]``."""
    ratios = policy_log_probs - reference_log_probs
    return -logsigmoid(BETA * (ratios[0] - ratios[1]))


def log_probs(rows, **ids):
    """Compute the log-probabilities of the answers, without the prompts."""
    labels = rows.clone()
    labels[:, :4] = -100
    return -sample_losses(model(rows, **ids).logits, labels)[0]


mb = peft_multibatch.enable(model)
plain = copy.deepcopy(model)
rows, ids, owners = [], [], []
for policy, reference in POLICIES.items():
    for name in (policy, reference):
        rows += answers[policy]
        ids += [name] * 2 * PAIRS
    owners += [policy] * PAIRS
rows = torch.cat(rows)

runs = {name: Run(lr=1e-3, max_grad_norm=1.0) for name in POLICIES}
with AdapterOptimizer(model, runs) as optimizer:  # only the policies are trainable
    for _ in range(STEPS):
        # policy or reference, chosen or rejected
        found = log_probs(rows, adapter_ids=ids).view(len(POLICIES), 2, 2, PAIRS)
        losses = torch.cat([dpo_losses(one[0], one[1].detach()) for one in found])
        optimizer.loss(losses, torch.ones_like(losses), owners).backward()
        metrics = optimizer.step()

model, trained = plain, model
for policy, reference in POLICIES.items():  # the same with PEFT and torch, one policy at a time
    model.set_adapter(policy)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(own, lr=1e-3)
    for _ in range(STEPS):
        model.set_adapter(reference)
        with torch.no_grad():
            expected = log_probs(torch.cat(answers[policy])).view(2, PAIRS)
        model.set_adapter(policy)
        loss = dpo_losses(log_probs(torch.cat(answers[policy])).view(2, PAIRS), expected).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        adamw.step()
        adamw.zero_grad()
    assert abs(metrics[policy]["loss"] - loss.item()) < 1e-4
    print(f"{policy}: loss {metrics[policy]['loss']:.4f} after {STEPS} steps, from 0.6931 (matches PEFT)")
