"""Translate with an encoder-decoder, beam search and an adapter per sentence.

    python examples/translation.py

A small T5 with random weights stands for yours. The encoder sees one row per sample, the decoder one per beam.
"""

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

import peft_multibatch


torch.manual_seed(0)
config = T5Config(
    d_model=64,
    d_kv=16,
    d_ff=128,
    num_layers=2,
    num_heads=4,
    vocab_size=500,
    decoder_start_token_id=0,
    eos_token_id=None,
)
lora = LoraConfig(r=4, target_modules=["q", "k", "v", "o"], task_type=TaskType.SEQ_2_SEQ_LM, init_lora_weights=False)
model = get_peft_model(T5ForConditionalGeneration(config), lora, adapter_name="legal")
model.add_adapter("medical", lora)
model.eval()

peft_multibatch.enable(model)
sentences = torch.randint(2, 500, (3, 9))
adapters = ["medical", "legal", "medical"]
options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
translations = model.generate(input_ids=sentences, adapter_ids=adapters, **options)
for row, name in enumerate(adapters):
    model.set_adapter(name)
    alone = model.generate(input_ids=sentences[row : row + 1], **options)[0]
    assert torch.equal(alone, translations[row])
    print(f"sentence {row}, adapter {name}: {translations[row].tolist()} (matches PEFT)")
