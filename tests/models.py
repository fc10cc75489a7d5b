"""Tiny random models of the architectures that users have, with adapters that differ in all that they can."""

from __future__ import annotations

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor


SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA_LIKE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_SIZES = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 160, "n_positions": 64}

# name: (config class, its arguments, projections in the order in which a layer calls them)
ARCHITECTURES = {
    "llama": ("LlamaConfig", SIZES, LLAMA_LIKE),
    "qwen2": ("Qwen2Config", SIZES, LLAMA_LIKE),
    "qwen3": ("Qwen3Config", SIZES | {"head_dim": 16}, LLAMA_LIKE),
    "mistral": ("MistralConfig", SIZES | {"sliding_window": 8}, LLAMA_LIKE),
    "gemma2": ("Gemma2Config", SIZES | {"head_dim": 16, "sliding_window": 8}, LLAMA_LIKE),
    "phi3": ("Phi3Config", SIZES, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gpt2": ("GPT2Config", GPT2_SIZES | {"eos_token_id": None, "bos_token_id": 1}, ["c_attn", "c_fc", "c_proj"]),
}


def base_model(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    config_class, arguments, _ = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**arguments)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


def lora_configs(architecture: str = "llama") -> dict[str, LoraConfig]:
    """Ranks 3, 4 and 8, rslora, rank_pattern and alpha_pattern, and no two adapters with the same target modules."""
    targets = ARCHITECTURES[architecture][2]
    fan_in_fan_out = architecture == "gpt2"
    shared = {"init_lora_weights": False, "task_type": "CAUSAL_LM", "fan_in_fan_out": fan_in_fan_out}
    return {
        "three": LoraConfig(r=3, lora_alpha=12, use_rslora=True, target_modules=targets[::2], **shared),
        "four": LoraConfig(
            r=4,
            lora_alpha=16,
            target_modules=targets[1:],
            rank_pattern={targets[-1]: 2},
            alpha_pattern={targets[1]: 24},
            **shared,
        ),
        "eight": LoraConfig(r=8, lora_alpha=32, target_modules=targets, **shared),
    }


def peft_model(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, autocast_adapter_dtype: bool = True
) -> PeftModel:
    """The architecture with three adapters, in eval mode."""
    model = None
    for name, config in lora_configs(architecture).items():
        options = {"adapter_name": name, "autocast_adapter_dtype": autocast_adapter_dtype}
        if model is None:
            model = get_peft_model(base_model(architecture, dtype), config, **options)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=autocast_adapter_dtype)
    return model.eval()


def left_padded(rows: int = 6, length: int = 9) -> dict[str, Tensor]:
    """Prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(2, SIZES["vocab_size"], (rows, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(rows):
        attention_mask[row, : row % 4] = 0
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


def alone(model: PeftModel, name: str | None, call):
    """Run `call` under one adapter, or under none, the way PEFT's users do."""
    if name is None or name == "__base__":
        with model.disable_adapter():
            return call()
    before = model.active_adapter
    model.set_adapter(name)
    try:
        return call()
    finally:
        model.set_adapter(before)


def row_by_row(model: PeftModel, names: list[str], inputs: dict[str, Tensor], call) -> list:
    """The oracle: every row by itself, under its own adapter, through PEFT."""
    return [
        alone(model, name, lambda row=row: call({key: value[row : row + 1] for key, value in inputs.items()}))
        for row, name in enumerate(names)
    ]
