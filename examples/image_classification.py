"""Classify images with a vision transformer and an adapter per image.

    python examples/image_classification.py

A small ViT with random weights stands for yours.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

import peft_multibatch


torch.manual_seed(0)
config = ViTConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
    num_labels=10,
)
lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "query", "value"], init_lora_weights=False)
model = get_peft_model(ViTForImageClassification(config), lora, adapter_name="birds")
model.add_adapter("cars", lora)
model.eval()

mb = peft_multibatch.enable(model)
print(mb.report())
images = torch.randn(4, 3, 32, 32)
adapters = ["birds", "__base__", "cars", "birds"]
with torch.no_grad():
    scores = model(pixel_values=images, adapter_ids=adapters).logits
    for row, name in enumerate(adapters):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(pixel_values=images[row : row + 1]).logits[0]
        else:
            model.set_adapter(name)
            alone = model(pixel_values=images[row : row + 1]).logits[0]
        assert torch.allclose(alone, scores[row], atol=1e-5)
        print(f"image {row}, adapter {name}: class {int(scores[row].argmax())} (matches PEFT)")
