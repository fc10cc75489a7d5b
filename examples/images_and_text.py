"""Mix adapters that also train the image encoder, with any number of images per prompt.

    python examples/images_and_text.py

A small LLaVA with random weights stands for yours. Its adapters have weights in the vision tower, in the projector and
in the language model; every image runs under the adapter of its own prompt. The logits and the generated tokens of
every prompt are compared with PEFT, one prompt at a time.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import peft_multibatch


IMAGE, PATCHES = 99, 16
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}

torch.manual_seed(0)
config = LlavaConfig(
    vision_config=CLIPVisionConfig(**SIZES, image_size=32, patch_size=8),
    text_config=LlamaConfig(**SIZES, vocab_size=100, pad_token_id=0, eos_token_id=None),
    image_token_id=IMAGE,
    vision_feature_layer=-1,
)
lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
model = get_peft_model(LlavaForConditionalGeneration(config), lora, adapter_name="charts")
model.add_adapter("x-rays", lora)
model.eval()

# Two images, none, one and one: what your processor makes of them.
adapters = ["charts", "x-rays", "x-rays", "__base__"]
images = [torch.randn(count, 3, 32, 32) for count in (2, 0, 1, 1)]
question = [5, 6, 7, 8]


def batch(samples):
    rows = [[IMAGE] * PATCHES * len(images[sample]) + question for sample in samples]
    longest = max(map(len, rows))
    made = {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }
    if any(len(images[sample]) for sample in samples):
        made["pixel_values"] = torch.cat([images[sample] for sample in samples])
    return made


def run(samples, **ids):
    """The logits of each prompt, without its padding, and eight generated tokens."""
    made = batch(samples)
    with torch.no_grad():
        logits = model(**made, **ids).logits
    tokens = model.generate(**made, **ids, max_new_tokens=8, do_sample=False)[:, -8:]
    return [(row[mask.bool()], new) for row, mask, new in zip(logits, made["attention_mask"], tokens)]


alone = []
for sample, name in enumerate(adapters):
    if name == "__base__":
        with model.disable_adapter():
            alone += run([sample])
    else:
        model.set_adapter(name)
        alone += run([sample])

mb = peft_multibatch.enable(model)
print(mb.report())
mixed = run(range(4), adapter_ids=adapters)
for name, count, (logits, tokens), (expected, same) in zip(adapters, map(len, images), mixed, alone):
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.equal(tokens, same)
    print(f"{count} images, adapter {name}: tokens {tokens.tolist()} (matches PEFT)")
