"""Reinforcement learning of two policies in one process: rollouts of both in one batch, then a step for both.

    python examples/rl_two_policies.py

A small Llama with random weights stands for yours. One policy is rewarded for even tokens, the other for odd ones.
Rollouts come from continuous batching with the adapters that are being trained: a step updates the weights in place,
and the next requests use them, without copying or reloading. The loss is REINFORCE with the mean of a group of
rollouts as the baseline, as in GRPO.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import ContinuousBatchingConfig

import peft_multibatch
from peft_multibatch.training import AdapterOptimizer, Run


STEPS, GROUP, NEW = 15, 16, 8
REWARDS = {
    "even": lambda tokens: (tokens % 2 == 0).float().mean(-1),
    "odd": lambda tokens: (tokens % 2).float().mean(-1),
}

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, eos_token_id=None, initializer_range=0.1,
)  # fmt: skip
targets = ["q_proj", "v_proj", "down_proj"]
lora = LoraConfig(r=16, lora_alpha=32, target_modules=targets)
model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name="even")
model.add_adapter("odd", LoraConfig(r=4, lora_alpha=16, target_modules=targets))
mb = peft_multibatch.enable(model.eval())

prompt = torch.arange(2, 12)
owners = [name for name in REWARDS for _ in range(GROUP)]
settings = GenerationConfig(max_new_tokens=NEW, do_sample=True, pad_token_id=0)
history = {name: [] for name in REWARDS}

runs = {"even": Run(lr=1e-2), "odd": Run(lr=2e-2)}
cache = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512)  # enough for this small model
batching = {"generation_config": settings, "continuous_batching_config": cache}
with AdapterOptimizer(model, runs) as optimizer, mb.continuous_batching(**batching) as manager:
    for _ in range(STEPS):
        names = [manager.add_request(prompt.tolist(), adapter_id=name) for name in owners]
        found = {}
        while len(found) < len(names):
            output = manager.get_result(timeout=1)
            if output is not None and output.is_finished():
                assert output.error is None, output.error
                found[output.request_id] = output.generated_tokens
        rollouts = torch.tensor([found[name] for name in names])

        rewards = torch.cat([REWARDS[name](part) for name, part in zip(REWARDS, rollouts.split(GROUP))])
        for name, own in zip(REWARDS, rewards.split(GROUP)):
            history[name].append(own.mean().item())
        advantages = torch.cat([(own - own.mean()) / (own.std() + 1e-4) for own in rewards.split(GROUP)])

        rows = torch.cat([prompt.expand(len(rollouts), -1), rollouts], 1)
        logits = model(rows, adapter_ids=owners).logits[:, len(prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1).gather(-1, rollouts[..., None]).squeeze(-1)
        losses = -(advantages[:, None] * log_probs).sum(-1)
        optimizer.loss(losses, torch.full((len(rows),), NEW), owners).backward()
        optimizer.step()

greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
mixed = model.generate(prompt.expand(2, -1), adapter_ids=[*REWARDS], generation_config=greedy)
for row, (name, rewards) in enumerate(history.items()):
    model.set_adapter(name)
    alone = model.generate(prompt[None], generation_config=greedy)
    assert torch.equal(mixed[row : row + 1], alone)
    assert sum(rewards[-3:]) > sum(rewards[:3])
    tokens = alone[0, len(prompt) :].tolist()
    print(f"{name}: reward {rewards[0]:.2f} → {rewards[-1]:.2f}, greedy tokens {tokens} (matches PEFT)")
