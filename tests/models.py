"""Tiny random models of common architectures, with adapters that differ in every respect."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
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

BLOOM_LIKE = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
BART_LIKE = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
MLA = ["q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "o_proj"]
LATENT_SIZES = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
EXPERT_SIZES = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
T5_SIZES = {"d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4}
BART_SIZES = {
    f"{side}_{size}": number
    for side in ("encoder", "decoder")
    for size, number in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 80))
}
OPT_SIZES = {"ffn_dim": 80, "word_embed_proj_dim": 48}
BLOOM_SIZES = {"hidden_size": 48, "n_layer": 2, "n_head": 4, "vocab_size": 160, "initializer_range": 0.1}
MIXTRAL_SIZES = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK_SIZES = {**LATENT_SIZES, **EXPERT_SIZES, "num_key_value_heads": 4, "moe_intermediate_size": 24}
NO_END = {"eos_token_id": None, "pad_token_id": 0}
# for the generation modes in test_generation_modes.py
MORE_ARCHITECTURES = {
    "gemma3": (
        "Gemma3TextConfig", SIZES | {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}, LLAMA_LIKE,
    ),
    "gpt_neox": ("GPTNeoXConfig", SIZES, BLOOM_LIKE),
    "opt": ("OPTConfig", SIZES | OPT_SIZES, BART_LIKE),
    "bloom": ("BloomConfig", BLOOM_SIZES | NO_END, BLOOM_LIKE),
    "mixtral": ("MixtralConfig", SIZES | MIXTRAL_SIZES, LLAMA_LIKE[:4]),
    "deepseek_v3": (
        "DeepseekV3Config", SIZES | DEEPSEEK_SIZES | {"first_k_dense_replace": 1}, MLA,
    ),
    "t5": ("T5Config", T5_SIZES | NO_END | {"vocab_size": 160, "decoder_start_token_id": 0},
           ["q", "k", "v", "o", "wi", "wo"]),
    "bart": ("BartConfig", BART_SIZES | NO_END | {"d_model": 48, "vocab_size": 160, "max_position_embeddings": 64,
             "decoder_start_token_id": 1, "forced_eos_token_id": None}, BART_LIKE),
}  # fmt: skip
EVERY_ARCHITECTURE = ARCHITECTURES | MORE_ARCHITECTURES


def base_model(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, **sizes: int
) -> transformers.PreTrainedModel:
    config_class, arguments, _ = EVERY_ARCHITECTURE[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**arguments | sizes)
    auto = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    return getattr(transformers, auto).from_config(config).to(dtype).eval()


def lora_configs(architecture: str = "llama") -> dict[str, LoraConfig]:
    """Ranks 3, 4 and 8, rslora, rank_pattern and alpha_pattern, and different target modules for each adapter."""
    targets = EVERY_ARCHITECTURE[architecture][2]
    task = "SEQ_2_SEQ_LM" if architecture in ("t5", "bart") else "CAUSAL_LM"
    shared = {"init_lora_weights": False, "task_type": task, "fan_in_fan_out": architecture == "gpt2"}
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
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    autocast_adapter_dtype: bool = True,
    **sizes: int,
) -> PeftModel:
    """Build the architecture with three adapters, in eval mode; sizes replace those of its config."""
    model = None
    for name, config in lora_configs(architecture).items():
        options = {"adapter_name": name, "autocast_adapter_dtype": autocast_adapter_dtype}
        if model is None:
            model = get_peft_model(base_model(architecture, dtype, **sizes), config, **options)
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


@contextlib.contextmanager
def draws_by_row(copies: int) -> Iterator[None]:
    """`torch.multinomial` with noise that depends on the step and the copy of a sample, not on the rest of the
    batch."""
    steps = iter(range(10**6))

    def multinomial(probs: Tensor, num_samples: int, **_: Any) -> Tensor:
        generator = torch.Generator().manual_seed(next(steps))
        uniform = torch.rand(copies, probs.shape[-1], generator=generator)
        noise = -(-uniform.log()).log()  # argmax of log p + Gumbel noise is a draw from p
        return (probs.log() + noise.repeat(len(probs) // copies, 1)).topk(num_samples).indices

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        yield


def alone(model: PeftModel, name: str | None, call):
    """Run `call` with one adapter, or with none, as PEFT's users do."""
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
    """The reference: every row by itself, with its own adapter, through PEFT."""
    return [
        alone(model, name, lambda row=row: call({key: value[row : row + 1] for key, value in inputs.items()}))
        for row, name in enumerate(names)
    ]
