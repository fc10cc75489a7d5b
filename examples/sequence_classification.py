"""Classify texts with several tasks in one batch; every adapter has its own head.

    python examples/sequence_classification.py

A small BERT with random weights stands for yours. Each adapter has LoRA weights and a head (`modules_to_save`).
"""

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

import peft_multibatch


torch.manual_seed(0)
config = BertConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=500, num_labels=3
)
task = LoraConfig(r=4, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS, init_lora_weights=False)
model = get_peft_model(BertForSequenceClassification(config), task, adapter_name="topic")
model.add_adapter("mood", task)
for name, parameter in model.named_parameters():
    if "modules_to_save.mood" in name:
        torch.nn.init.normal_(parameter, std=0.1)  # as if trained for another task
model.eval()

peft_multibatch.enable(model)
texts = torch.randint(5, 500, (4, 12))
tasks = ["topic", "mood", "mood", "topic"]
with torch.no_grad():
    labels = model(input_ids=texts, adapter_ids=tasks).logits.argmax(-1)
    for row, (name, label) in enumerate(zip(tasks, labels)):
        model.set_adapter(name)
        alone = model(input_ids=texts[row : row + 1]).logits.argmax(-1)
        assert alone == label
        print(f"text {row}, adapter {name}: label {int(label)} (matches PEFT)")
