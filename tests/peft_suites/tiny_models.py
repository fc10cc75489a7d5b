"""Write random models, under the names of those that PEFT's tests load, to a folder like the Hugging Face hub's cache.

python tests/peft_suites/tiny_models.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers


LLAMA_LIKE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}
GPT_LIKE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {**LLAMA_LIKE, "head_dim": 8, "num_local_experts": 4}
BART_SIZES = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 99}

# name on the hub: (model class, its configuration)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        {
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 32,
            "max_position_embeddings": 64,
        },
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT_LIKE),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**GPT_LIKE, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", LLAMA_LIKE),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", LLAMA_LIKE),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", {**LLAMA_LIKE, "head_dim": 8}),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        {**BART_SIZES, "decoder_start_token_id": 2, "forced_eos_token_id": None},
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM",
        {**EXPERTS, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 1},
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssForCausalLM", EXPERTS),
}


def make(cache: Path) -> None:
    """Save every model that doesn't exist yet."""
    for name, (kind, sizes) in MODELS.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        if (folder / "refs" / "main").exists():
            continue
        torch.manual_seed(0)
        model_class = getattr(transformers, kind)
        config = model_class.config_class(vocab_size=100, **TOKENS, **sizes)
        model = model_class(config)
        model.save_pretrained(folder / "snapshots" / "made-here")
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text("made-here")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
