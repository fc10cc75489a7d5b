"""Run adapters inside experts: every token uses its sample's adapter in the expert that it is routed to.

    python examples/mixture_of_experts.py

A small Mixtral with random weights stands for yours. The experts' weights are one parameter, which PEFT adapts through
`target_parameters`.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

import peft_multibatch


torch.manual_seed(0)
config = MixtralConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    vocab_size=500,
    eos_token_id=None,
    pad_token_id=0,
)
lora = LoraConfig(
    r=4,
    target_modules=["q_proj", "v_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    init_lora_weights=False,
)
model = get_peft_model(MixtralForCausalLM(config), lora, adapter_name="sql")
model.add_adapter("poet", lora)
model.eval()

mb = peft_multibatch.enable(model)
print(mb.report())
prompts = torch.randint(1, 500, (3, 8))
adapters = ["sql", "poet", "sql"]
options = {"max_new_tokens": 6, "do_sample": False}
answers = model.generate(input_ids=prompts, adapter_ids=adapters, **options)[:, 8:]
for row, name in enumerate(adapters):
    model.set_adapter(name)
    alone = model.generate(input_ids=prompts[row : row + 1], **options)[0, 8:]
    assert torch.equal(alone, answers[row])
    print(f"prompt {row}, adapter {name}: {answers[row].tolist()} (matches PEFT)")
