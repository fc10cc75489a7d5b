"""Tiny random models of all types in transformers, with inputs: `python tests/sweep/tiny.py [TYPE ...]`.

Models are built from configurations alone, without the network. Each class's default configuration is shrunk by the
names of its attributes (`RULES`), then tried unchanged with fewer layers, then untouched; `OVERRIDES` contains
exceptions. Inputs follow the signature of `forward`, and are found by trial (`recipes`).
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import importlib
import inspect
import itertools
import logging
import math
import multiprocessing
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES


class NotBuilt(Exception):
    """This model type can't be built here; the message is the reason, in one line."""


MOST_PARAMETERS = 60_000_000
VOCABULARY, FIRST_WORD, LAST_WORD = 120, 10, 90  # token ids of words; special tokens are outside
TEXT, FRAMES = 10, 64
KEEP = object()  # an override: keep the attribute's default


@dataclasses.dataclass(frozen=True)
class Spec:
    """How to create one argument of forward: its kind, the shape of a sample, and a bound or a value."""

    kind: str
    shape: tuple[int, ...] = ()
    high: Any = None


# --- configurations -------------------------------------------------------------------------------------------------


def entries(value: Any, rule: Callable[[int], int]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(entries(entry, rule) for entry in value)
    return rule(value) if type(value) is int else value


def most(number: int) -> Callable:
    """A rule that limits a number, or every number of a list, to `number`."""
    return lambda value, width: entries(value, lambda entry: min(entry, number))


def most_wide(number: int) -> Callable:
    """The same for numbers that scale with a model's width."""
    return lambda value, width: entries(value, lambda entry: min(entry, number * width))


def exactly(number: int) -> Callable:
    """A rule that sets all numbers except small ones to `number` times the width, which is 1 for the smallest
    models."""
    return lambda value, width: entries(value, lambda entry: number * width if entry > 8 else entry)


def few_heads(value: Any, width: int) -> Any:
    if isinstance(value, (list, tuple)):  # per stage, with dimensions that are multiples of 32
        return type(value)(min(entry, 2) if type(entry) is int else entry for entry in value)
    return min(value, 4) if type(value) is int else value


def unchanged(value: Any, width: int) -> Any:
    return value


LAYERS = (
    r"(num_|n_)?layers?|(\w+_)?(num|n)_(\w+_)?layers?|(en|de)coder_layers|\w+_(en|de)coder_layers|depths?|layers"
    r"|(num_|stage_num_)?blocks|num_block_repeats|resampler_depth|layer_depths|encoder_depth|decoder_depth"
    r"|layers_count"
    r"|n_layers|num_encoder_blocks|num_res_blocks|depth_mult"
)
NOT_LAYERS = (
    r"num_feat_extract_layers|num_adapter_layers|num_kv_shared_layers|num_residual_layers|num_lstm_layers"
    r"|mlp_only_layers"
    r"|aligner_num_add_layers|num_nextn_predict_layers|max_window_layers|num_dense_layers"
    r"|speech_decoder_postnet_layers"
    r"|encode_proj_layers|lqe_layers|vision_feature_layer|num_stages|no_rope_layers"
)
# the first rule that matches the whole name applies; a level is the last one at which the rule applies
RULES: list[tuple[int, str, Callable]] = [
    (3, r"vision_feature_layers?", lambda value, width: entries(value, lambda layer: max(-2, min(layer, 1)))),
    (3, NOT_LAYERS, unchanged),
    (3, LAYERS, most(2)),
    (3, r"(\w+_)?vocab_size(_\w+)?", most(VOCABULARY)),
    (3, r"first_k_dense_replace|num_dense_layers", most(1)),
    (3, r"num_nextn_predict_layers|num_mtp_layers|mtp_num_layers|num_hash_layers", most(0)),
    (2, r"(\w+_)?qk_head_dim", most_wide(16)),
    (2, r"rotary_dim", most_wide(4)),
    (2, r"(\w+_)?(\w*head_dim|d_kv|d_head|dim_head|kv_channels|head_size|attention_head_size|dim_key"
        r"|mamba_d_head)", most_wide(8)),
    (2, r"(\w+_)?(kv|key_value|key)_heads|(\w+_)?n_head_kv|multi_query_group_num|num_kv", most(2)),
    (2, r"mamba_n(um)?_heads", most(8)),
    (2, r"(\w+_)?(n_?)?heads?|(\w+_)?num_heads", few_heads),
    (2, r"(num|n)_(\w+_)?experts|(\w+_)?num_(\w+_)?experts|n_routed_experts", most(4)),
    (2, r"(\w+_)?(num_)?experts_per_to?k(en)?|moe_top_?k|top_k_experts|num_selected_experts|moe_k", most(2)),
    (2, r"n_groups?|topk_group|num_expert_groups?|mamba_n_groups|num_groups", most(1)),
    (2, r"(\w+_)?lora_rank|\w+_rank|rank", most(16)),
    (2, r"(\w+_)?(intermediate_size|intermediate_dim|ffn_hidden_size|ffn_dim|ffn_size|d_ff|mlp_dim|n_inner|d_inner"
        r"|feedforward_dim|dim_feedforward|inner_dim|d_mlp|ff_dim)(_\w+)?", exactly(64)),
    (1, r"(\w+_)?(image_size|img_size|resolution)", exactly(32)),
    (1, r"patch_size|tubelet_size", most(8)),
    (1, r"image_grid_pinpoints", lambda value, width: [[32, 32], [64, 64]]),
    (2, r"(sliding_window|attention_window|local_attention|sliding_window_size|sliding_window_length)", most(8)),
    (3, r"max_source_positions", most(FRAMES // 2)),
    (2, r"(\w+_)?max_\w*position\w*|n_positions|n_ctx|max_seq_len|max_sequence_length", most(512)),
    (2, r"num_query_tokens", most(4)),  # equals the number of placeholders in the inputs
    (2, r"max_length|\w*num_(queries|latents|object_queries)|two_stage_num_proposals"
        r"|\w*num_learnable_queries", most(8)),
    (2, r"mm_tokens_per_image|image_seq_length|num_image_tokens|vision_soft_tokens_per_image"
        r"|default_output_length", most(4)),
    (2, r"input_feat_\w+|input_dim|feature_projection_input_dim", unchanged),
    (2, r"\w*groups?", exactly(32)),
    (2, r"num_pos_feats", most_wide(16)),
    (2, r"num_attention_heads_per_stage", few_heads),
    (3, r"blocks_per_stage", most(2)),
    (2, r"embed_dim_per_stage|backbone_channel_list", exactly(32)),
    (2, r"codebook_size|num_codevectors_per_group|num_embeddings|n_embed", most(64)),
    (2, r"(\w*_)?(kernel_size|kernel_sizes|window_size|block_size|chunk_size|num_\w+|max_\w+|batch_size|stride|strides"
        r"|hidden_size_per_layer_input_\w+|shard_\w+|sampling_rate|feature_size|pool_size|patch_sizes"
        r"|type_vocab_size)", unchanged),
    (2, r"(d_model|dim|n_embd|width|embed_dim|hidden_size|hidden_dim|(\w+_)?(size|sizes|dim|dims|dimension"
        r"|channels?|width|units|filters|hidden|features_out|dim_out|channels_list|channel_list|conv_dim"
        r"|planes)(_global|_per_layer_input)?)", exactly(32)),
]  # fmt: skip
TOKEN = (
    r"(\w+_)?(token_id|token_ids|token_index|tokens_ids?|(bos|eos|pad|unk|sep|mask|boi|eoi|boa|eoa)_index"
    r"|(bos|eos|pad|boi|eoi)_id)"
)
INDEXES = (
    r"\w*(indexes|indices|layer_ids|layers_idx|layer_indices|attention_layers|feature_layers"
    r"|fullatt_block_indexes|hook_ids)|image_grid_pinpoints"
)
MISSING = {"vocab_size": VOCABULARY, "num_experts_per_tok": 2}  # replaces None if the class has no default
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ROPES = {"full_attention": ROPE, "sliding_attention": ROPE}
TIME_SERIES = {"prediction_length": 4, "context_length": 12, "num_time_features": 2, "lags_sequence": [1, 2, 3]}
WINDOWS = {"image_size": 64, "window_size": 2}
SOUND = {"inputs": None, "input_values": Spec("floats", (1600,)), "input_features": None, "attention_mask": None}
DECODING_BERT = {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}

# model type (at any depth) -> attribute (with a dot before those of nested configurations) -> value
OVERRIDES: dict[str, dict[str, Any]] = {
    "align_vision_model": {"width_coefficient": 1.0},
    "audio-spectrogram-transformer": {
        "max_length": 64,
        "inputs": {"input_values": Spec("floats", (64, 128)), "attention_mask": None},
    },
    "autoformer": TIME_SERIES | {"label_length": 4, "moving_average": 3},
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 119},
    "blt": {"encoder_hash_byte_group_vocab": 200},
    "chameleon": {"vocabulary_map": {"<image>": 119, "IMGIMGA": 118}},
    "clap_audio_model": {"hidden_size": 256, "spec_size": 64, "num_mel_bins": 32, "window_size": 2},
    "cohere_compass_text": {"rope_parameters": ROPES},
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "depth_pro": {
        "patch_size": 32,
        "intermediate_hook_ids": [1, 0],
        "inputs": {"pixel_values": Spec("floats", (3, 128, 128))},
    },
    "dia": {"inputs": {"decoder_input_ids": Spec("words", (6, 9))}},
    "diffusion_gemma_text": {"global_head_dim": 16},
    "donut-swin": WINDOWS,
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "num_hidden_layers": 3,
        "layer_types": KEEP,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "embedding_gemma2_text": {"global_head_dim": 16, "num_global_key_value_heads": 1},
    "emu3": {"vocabulary_map": {"<image>": 119, "<|extra_200|>": 118}},
    "encoder-decoder": {"encoder": {"model_type": "bert"}, "decoder": DECODING_BERT},
    "ernie4_5_vl_moe_text": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
    "esm": {"vocab_size": 120, "pad_token_id": 1, "mask_token_id": 118},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8},
    "idefics": {
        "inputs": {"image_attention_mask": Spec("ones", (TEXT, 1)), "pixel_values": Spec("floats", (1, 3, 32, 32))}
    },
    "informer": TIME_SERIES,
    "instructblip": {"image_token_index": 119},
    "instructblipvideo": {"video_token_index": 119, "inputs": {"pixel_values": Spec("floats", (2, 3, 32, 32))}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kosmos-2": {"latent_query_num": 4, "inputs": {"image_embeds_position_mask": Spec("first", (), 4)}},
    "kosmos_2_5_vision_model": {"patch_embed_hidden_size": 192},
    "kyutai_speech_to_text": {"inputs": {"input_ids": Spec("words", (TEXT, 33))}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lightglue": {"inputs": {"pixel_values": Spec("floats", (2, 3, 64, 64))}},
    "llama4_vision_model": {"intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "lw_detr_vit": {"num_windows": 4, "num_windows_side": 2},
    "mamba2": {"num_heads": 8},
    "maskformer-swin": WINDOWS,
    "mistral4": {"head_dim": 16},
    "mllama_vision_model": {
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 96,
    },
    "musicgen": {"inputs": {"decoder_input_ids": Spec("word_rows", (4, 6))}},
    "musicgen_decoder": {"inputs": {"input_ids": Spec("word_rows", (4, TEXT))}},
    "musicgen_melody": {"inputs": {"decoder_input_ids": Spec("word_rows", (4, 6))}},
    "musicgen_melody_decoder": {"inputs": {"input_ids": Spec("word_rows", (4, TEXT))}},
    "oneformer": {"inputs": {"task_inputs": Spec("words", (77,))}},
    "paddleocr_vl_text": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "perceiver": {"d_latents": 32, "num_self_attends_per_block": 2},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 192},
    "qwen3_asr_encoder": {"n_window": 16},
    "rag": {"question_encoder": {"model_type": "dpr"}, "generator": {"model_type": "bart"}},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "sam2_hiera_det_model": {
        "embed_dim_per_stage": [32] * 4,
        "num_attention_heads_per_stage": [2] * 4,
        "blocks_per_stage": [1, 2, 2, 1],
        "global_attention_blocks": [2],
    },
    "speech-encoder-decoder": {"encoder": {"model_type": "wav2vec2"}, "decoder": DECODING_BERT, "inputs": SOUND},
    "SpeechT5Model": {
        "input_values": Spec("floats", (TEXT, 32)),
        "decoder_input_values": Spec("floats", (6, 32)),
        "attention_mask": None,
    },
    "superglue": {"inputs": {"pixel_values": Spec("floats", (2, 3, 64, 64))}},
    "superpoint": {"keypoint_decoder_dim": 65},
    "swin": WINDOWS,
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "time_series_transformer": TIME_SERIES,
    "tvp": {"visual_prompt_size": 4, "max_img_size": 32},
    "unlimited_ocr_text": {"mlp_layer_types": ["dense", "sparse"]},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": DECODING_BERT},
    "vitmatte": {"convstream_hidden_sizes": [32, 32, 32], "fusion_hidden_sizes": [32, 32, 32, 16]},
    "voxtral": {"audio_token_id": 119},
    "xclip_vision_model": {"inputs": {"pixel_values": Spec("patches", (8, 3, 32, 32))}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
}


def default(config_class: type, value: Any = None) -> dict[str, Any]:
    """Return the fields of a configuration class with their defaults."""
    fields = {}
    for field in dataclasses.fields(config_class):
        fields[field.name] = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            fields[field.name] = field.default_factory()
    return fields


GENERAL = set(default(PreTrainedConfig))


class Shrinking:
    """Shrinks a configuration; equal special tokens stay equal in all of its parts."""

    def __init__(self, level: int, width: int = 1):
        self.level = level
        self.width = width
        self.tokens: dict[int, int] = {}

    def token(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self.token(entry) for entry in value)
        if type(value) is not int or value < FIRST_WORD:
            return value
        return self.tokens.setdefault(value, VOCABULARY - 1 - len(self.tokens) % (VOCABULARY - LAST_WORD - 1))

    def layers(self, config: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
        """Cut lists with an entry per layer to the shortest that still contain every kind of layer."""
        count = getattr(config, "num_hidden_layers", None)
        field = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        if type(count) is not int or count <= 2 or field not in values:
            return {}
        lists = {
            name: value
            for name, value in values.items()
            if isinstance(value, (list, tuple)) and len(value) == count and not isinstance(value[0], (list, tuple))
        }
        indexed = [v for n, v in values.items() if re.fullmatch(INDEXES, n) and isinstance(v, (list, tuple))]
        if not lists:
            wanted = max([2, *(len(value) for value in indexed)])
            return {field: wanted} if wanted > 2 else {}
        rows = list(zip(*lists.values()))
        kept = [index for index, row in enumerate(rows) if row not in rows[:index]][:4]
        while len(kept) < 2:
            kept.append(len(rows) - 1)
        cut = {name: type(value)(value[index] for index in kept) for name, value in lists.items()}
        return {name: self.by_rule(name, value) for name, value in cut.items()} | {field: len(kept)}

    def smaller(self, config: PreTrainedConfig) -> PreTrainedConfig:
        config_class = type(config)
        if config_class.__name__ == "TimmBackboneConfig":  # from another package; a ResNet is the closest substitute
            stages = [f"stage{index}" for index in (2, 3, 4)][-max(1, min(3, len(config.out_indices or [0]))) :]
            sizes = {"embedding_size": 32, "hidden_sizes": [32, 32, 32, 32], "depths": [1, 1, 1, 1]}
            return transformers.ResNetConfig(**sizes, layer_type="basic", out_features=stages)
        defaults = default(config_class)
        values = {name: vars(config)[name] for name in defaults if name not in GENERAL and name in vars(config)}
        try:
            fresh = vars(config_class())
        except Exception:
            fresh = {}
        arguments: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, PreTrainedConfig):
                arguments[name] = self.smaller(value)
            elif value is None and name in MISSING:
                arguments[name] = MISSING[name]
            elif self.level == 4 or value is None:
                continue
            elif (
                defaults[name] is None
                and (name == "head_dim" or isinstance(value, (list, tuple, dict)))
                and not re.fullmatch(INDEXES, name)
            ):
                continue  # the class computes it from others
            else:
                small = self.by_rule(name, value)
                if re.fullmatch(INDEXES, name) or small is not value or repr(value) != repr(fresh.get(name)):
                    arguments[name] = small
        if self.level < 3:
            self.relations(config, values, arguments)
        if self.level < 4:
            if self.level != 2:
                arguments |= self.layers(config, values)
            for name, value in arguments.items():
                if (
                    re.fullmatch(INDEXES, name)
                    and isinstance(value, (list, tuple))
                    and all(type(v) is int for v in value)
                ):
                    arguments[name] = type(value)(v if v < 0 else index for index, v in enumerate(value))
            if "stage_names" in vars(config):
                self.stages(config, values, arguments)
        own = OVERRIDES.get(config_class.model_type, {}) | OVERRIDES.get(config_class.__name__, {})
        for name, value in own.items():
            if name == "inputs":
                continue
            if value is KEEP:
                arguments.pop(name, None)
            elif isinstance(value, dict) and "model_type" in value:
                rest = {key: entry for key, entry in value.items() if key != "model_type"}
                part = self.smaller(CONFIG_MAPPING[value["model_type"]]())
                arguments[name] = self.changed(part, rest)
            else:
                arguments[name] = copy.deepcopy(value)
        return config_class(**arguments)

    def stages(self, config: PreTrainedConfig, values: dict[str, Any], arguments: dict[str, Any]) -> None:
        """Keep the number of a backbone's output features, from stages that the smaller one has."""
        name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        wanted = len(config.out_indices)
        if type(values.get(name)) is int and len(config.stage_names) == values[name] + 1:  # every layer is a stage
            arguments[name] = max(2, wanted)
            arguments["out_indices"] = list(range(arguments[name] + 1))[-wanted:]
        else:
            arguments["out_indices"] = list(config.out_indices)

    def relations(self, config: PreTrainedConfig, values: dict[str, Any], arguments: dict[str, Any]) -> None:
        """Adjust numbers that depend on others: key heads, sections of rotary dimensions."""
        heads, keys = values.get("num_attention_heads"), values.get("num_key_value_heads")
        if "num_key_value_heads" in values and keys in (None, heads) and "num_attention_heads" in arguments:
            arguments["num_key_value_heads"] = arguments["num_attention_heads"]
        if "head_dim" in vars(config) and values.get("head_dim") is None and heads is not None:
            arguments["head_dim"] = 8 * self.width
        rope = dict(values.get("rope_parameters") or {})
        if "mrope_section" in (*rope, *(getattr(config, "ignore_keys_at_rope_validation", None) or ())):
            half = int(8 * self.width * rope.get("partial_rotary_factor", 1)) // 2
            rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
            arguments["rope_parameters"] = rope

    def changed(self, config: PreTrainedConfig, rest: dict[str, Any]) -> PreTrainedConfig:
        for name, value in rest.items():
            setattr(config, name, value)
        return config

    def by_rule(self, name: str, value: Any) -> Any:
        if re.fullmatch(TOKEN, name):
            return self.token(value)
        for level, pattern, rule in RULES:
            if re.fullmatch(pattern, name):
                return rule(value, self.width) if self.level <= level else value
        return value


def starting_config(model_type: str) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    first = {n: v for n, v in OVERRIDES.get(model_type, {}).items() if isinstance(v, dict) and "model_type" in v}
    try:
        return config_class()
    except Exception:
        return config_class(**{name: CONFIG_MAPPING[value["model_type"]]() for name, value in first.items()})


# --- classes --------------------------------------------------------------------------------------------------------

HEADS = [  # the most common first
    f"MODEL_FOR_{name}_MAPPING_NAMES"
    for name in (
        "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM", "CAUSAL_LM",
        "CTC", "RNNT", "TDT", "TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM", "SEQUENCE_CLASSIFICATION",
        "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
        "AUDIO_CLASSIFICATION", "OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION", "INSTANCE_SEGMENTATION",
        "UNIVERSAL_SEGMENTATION", "SEMANTIC_SEGMENTATION", "IMAGE_SEGMENTATION", "DEPTH_ESTIMATION",
        "ZERO_SHOT_IMAGE_CLASSIFICATION", "VISUAL_QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING",
        "TABLE_QUESTION_ANSWERING", "MASKED_IMAGE_MODELING", "IMAGE_TO_IMAGE", "KEYPOINT_DETECTION",
        "KEYPOINT_MATCHING", "POSE_ESTIMATION", "MASK_GENERATION", "IMAGE_MATTING", "TIME_SERIES_PREDICTION",
        "TIME_SERIES_CLASSIFICATION", "TIME_SERIES_REGRESSION", "RETRIEVAL", "PRETRAINING",
        "AUDIO_FRAME_CLASSIFICATION", "AUDIO_XVECTOR", "BACKBONE", "TEXT_ENCODING", "TABLE_RECOGNITION",
        "TEXT_RECOGNITION", "NORMAL_ESTIMATION", "POINTMAP_ESTIMATION", "CAUSAL_IMAGE_MODELING", "DECISION",
        "IMAGE",
    )
]  # fmt: skip


def named(model_type: str, mapping: str) -> list[str]:
    names = getattr(modeling_auto, mapping, {}).get(model_type, ())
    return [names] if isinstance(names, str) else list(names)


def own_classes(model_type: str) -> list[str]:
    """Return model classes in the configuration's module, for types without an auto class."""
    config_class = CONFIG_MAPPING[model_type]
    module = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    return [
        name
        for name, found in vars(module).items()
        if isinstance(found, type(PreTrainedModel))
        and issubclass(found, PreTrainedModel)
        and found.config_class is config_class
        and found.forward is not PreTrainedModel.forward
        and "PreTrainedModel" not in name
    ]


def class_named(name: str, model_type: str) -> type[PreTrainedModel]:
    found = getattr(transformers, name, None)
    if found is None:
        config_class = CONFIG_MAPPING[model_type]
        module = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
        found = getattr(module, name)
    if not issubclass(found, PreTrainedModel):
        try:
            found(None)  # a placeholder for a class that needs another package: it raises an error that names it
        except ImportError as error:
            raise NotBuilt(reason(error)) from None
    return found


def model_class(model_type: str, head: bool) -> type[PreTrainedModel]:
    bases = named(model_type, "MODEL_MAPPING_NAMES")
    heads = [name for mapping in HEADS for name in named(model_type, mapping)]
    encoder = named(model_type, "MODEL_FOR_MASKED_LM_MAPPING_NAMES") and not named(
        model_type, "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"
    )
    if encoder:  # their classifiers are the most common heads
        heads = named(model_type, "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES") + heads
    names = list(dict.fromkeys(bases[:1] + heads))
    if not bases or len(names) == 1:
        try:
            own = own_classes(model_type)
        except ImportError as error:
            raise NotBuilt(reason(error)) from None
        except AttributeError:
            own = []
        plain = [name for name in own if re.search(r"(Model|Encoder|Decoder|Backbone|Transformer)$", name)]
        names = list(
            dict.fromkeys(
                [*bases[:1], *([] if bases else plain[:1]), *heads, *sorted(own, key=lambda name: "For" not in name)]
            )
        )
    if not names:
        raise NotBuilt("it is a configuration without a model class of its own")
    if head and len(names) == 1:
        raise NotBuilt(f"it has no class but {names[0]}")
    fitting_classes = [
        found for found in (class_named(name, model_type) for name in names) if takes(found, model_type)
    ]
    if len(fitting_classes) <= head:
        raise NotBuilt(f"no class of it takes its configuration alone: {', '.join(names)}")
    return fitting_classes[1 if head else 0]


def takes(found: type[PreTrainedModel], model_type: str) -> bool:
    """Whether the class takes this configuration, and not only a part of it."""
    return found.config_class is None or issubclass(CONFIG_MAPPING[model_type], found.config_class)


# --- weights --------------------------------------------------------------------------------------------------------


def reseed(*_: Any) -> None:
    torch.manual_seed(0)


@torch.no_grad()
def useful_weights(model: PreTrainedModel) -> None:
    """Make weights large enough that every layer affects the outputs; initializations are often tiny or zero."""
    generator = torch.Generator().manual_seed(1)

    def normal(like: Tensor, std: float) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like) * std

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        unset = not parameter.isfinite().all() or parameter.abs().max() > 1e4
        if parameter.numel() == max(parameter.shape, default=1):
            if name.endswith(("original0", "weight_g")):  # the norms of weight_norm
                parameter.fill_(1)
            elif unset:
                parameter.copy_(1 + normal(parameter, 0.1))
            elif parameter.abs().max() < 0.3:  # zero biases, layer scales close to zero
                parameter.copy_(normal(parameter, 0.1) + (0.5 if parameter.max() == parameter.min() != 0 else 0))
            elif parameter.min() == parameter.max() == 1:  # norms
                parameter.add_(normal(parameter, 0.1))
            continue
        fan_in = math.prod(parameter.shape[1:]) if parameter.ndim != 3 else max(parameter.shape[1:])
        std = 0.3 if id(parameter) in embeddings else min(0.5, 1 / math.sqrt(fan_in))
        if unset or not parameter.std() > 0.7 * std:
            parameter.copy_(normal(parameter, std))
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.ndim > 1 and not buffer.nan_to_num().any():  # codebooks, for example
            buffer.copy_(normal(buffer, 1))


def parameters_of(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def built(found: type[PreTrainedModel], config: PreTrainedConfig, careful: bool) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            count = parameters_of(found(copy.deepcopy(config)))
    except (NotBuilt, ImportError):
        raise
    except Exception:
        if careful:
            raise
        count = 0
    if count > MOST_PARAMETERS:
        raise NotBuilt(f"the smallest configuration that works has {count:.1e} parameters")
    torch.manual_seed(0)
    model = found(config).float().eval()
    if config.is_encoder_decoder and model.can_generate() and model.generation_config.decoder_start_token_id is None:
        model.generation_config.decoder_start_token_id = 0
    useful_weights(model)
    return model


# --- inputs ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Recipe:
    """The arguments of a forward, and how many text tokens stand for images, videos and audio."""

    specs: dict[str, Spec]
    placeholders: dict[str, int] = dataclasses.field(default_factory=dict)
    tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    last_word: int = LAST_WORD
    left: bool = False
    unequal_text: bool = True
    unequal_images: bool = False
    before_and_after: tuple[int | None, int | None] = (None, None)

    def make(self, samples: int, seed: int, equal: bool) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        counts = [1 + (i % 2) * (self.unequal_images and not equal) for i in range(samples)]
        cut = [2 * (i % 3) * (self.unequal_text and not equal) for i in range(samples)]
        special = [self.special(count) for count in counts]
        length = TEXT + max(map(len, special))
        made: dict[str, Any] = {}
        for name, spec in self.specs.items():
            made[name] = self.one(spec, samples, counts, cut, special, length, generator)
        return made

    def special(self, images: int) -> list[int]:
        ids = []
        for modality, count in self.placeholders.items():
            part = [self.tokens[modality]] * count
            if modality == "image" and self.before_and_after[0] is not None:
                part = [t for t in (self.before_and_after[0],) if t is not None] + part
                part += [t for t in (self.before_and_after[1],) if t is not None]
            ids += part * (images if modality == "image" else 1)
        return ids

    def one(
        self, spec: Spec, samples: int, counts: list, cut: list, special: list, length: int, generator: Any
    ) -> Any:
        kind, shape, high = spec.kind, spec.shape, spec.high
        rows = (samples, *shape)
        if kind == "text":
            ids = torch.randint(FIRST_WORD, self.last_word, (samples, length), generator=generator)
            for row in range(samples):
                kept = length - cut[row]
                start = cut[row] if self.left else 0
                ids[row, start : start + len(special[row])] = torch.tensor(special[row], dtype=torch.long)
                ids[row, : cut[row]] = high if self.left else ids[row, : cut[row]]
                if not self.left:
                    ids[row, kept:] = high
            return ids
        if kind in ("text_mask", "text_types"):
            mask = torch.ones(samples, length, dtype=torch.long)
            for row in range(samples):
                pads = slice(0, cut[row]) if self.left else slice(length - cut[row], length)
                mask[row, pads] = 0
            if kind == "text_mask":
                return mask
            types = torch.zeros_like(mask)
            kinds = {self.tokens.get(m): n for m, n in (("image", 1), ("video", 2), ("audio", 3))}
            for row in range(samples):
                start = cut[row] if self.left else 0
                for index, token in enumerate(special[row]):
                    types[row, start + index] = kinds.get(token, 0)
            return types
        if kind == "first":  # positions of an image's tokens
            return (torch.arange(length) < high).long().repeat(samples, 1)
        if kind == "zeros":
            return torch.zeros(samples, *(shape or (length,)), dtype=torch.long)
        if kind == "ids":
            return torch.randint(0, high or LAST_WORD, rows, generator=generator)
        if kind == "words":
            return torch.randint(FIRST_WORD, self.last_word, rows, generator=generator)
        if kind == "word_rows":  # several rows per sample, such as codebooks
            return torch.randint(FIRST_WORD, self.last_word, (samples * shape[0], *shape[1:]), generator=generator)
        if kind == "floats":
            return torch.randn(rows, generator=generator)
        if kind == "placed":  # patches that start with their row and column
            patches = torch.randn(rows, generator=generator)
            patches[..., 0], patches[..., 1] = torch.arange(shape[0]) // 4 + 1, torch.arange(shape[0]) % 4 + 1
            return patches
        if kind == "unit":
            return torch.rand(rows, generator=generator)
        if kind == "images":  # a flat list, however many a sample has
            return torch.randn(sum(counts), *shape, generator=generator)
        if kind == "patches":
            return torch.randn(sum(counts) * shape[0], *shape[1:], generator=generator)
        if kind == "per_image":
            return (
                torch.tensor([list(high)] * sum(counts))
                if isinstance(high, tuple)
                else torch.tensor([high] * sum(counts))
            )
        if kind == "per_sample":
            return torch.tensor([list(high)] * samples)
        if kind == "boxes":
            corners = torch.randint(0, min(high, 500), (samples, length, 4), generator=generator).sort(-1).values
            return corners[..., [0, 1, 2, 3]]
        if kind == "ones":
            return torch.ones(rows, dtype=torch.long)
        if kind == "true":
            return torch.ones(rows, dtype=torch.bool)
        if kind == "frames":  # a mask of audio frames
            mask = torch.ones(rows, dtype=torch.long)
            for row in range(samples):
                mask[row, shape[-1] - cut[row] * shape[-1] // 16 :] = 0
            return mask
        if kind == "value":
            return high
        raise ValueError(f"unknown kind {kind!r}")


def parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a configuration and nested ones, the outermost first."""
    waiting = [config]
    while waiting:
        here = waiting.pop(0)
        yield here
        waiting += [value for value in vars(here).values() if isinstance(value, PreTrainedConfig)]


def find(config: PreTrainedConfig, *names: str, within: str = "") -> Any:
    """Return the first value that is set, preferably from a part whose type contains `within`."""
    for wanted in dict.fromkeys([within, ""]):
        for part in parts(config):
            if wanted in (part.model_type or ""):
                for name in names:
                    if (value := getattr(part, name, None)) is not None:
                        return value
    return None


def single(value: Any) -> Any:
    return single(value[-1]) if isinstance(value, (list, tuple)) and value else value


SKIPPED = (
    r"inputs_embeds|position_ids|cache|past_key_values|use_cache|labels|encoder_outputs|head_mask"
    r"|output_\w+|return_dict|return_\w+|kwargs|self|interpolate_pos_encoding"
)


def candidates(name: str, config: PreTrainedConfig, names: list[str], required: bool) -> list[Spec | None]:
    """Return possible values for an argument of this name, the most likely first; empty if it should be left out."""
    text = "input_ids" in names
    size = single(find(config, "image_size", "img_size", "input_size", "crop_size", within="vision"))
    channels = find(config, "num_channels", "in_channels", "num_input_channels", within="vision") or 3
    channels = channels if type(channels) is int and channels < 20 else 3
    patch = single(find(config, "patch_size", within="vision")) or 8
    frames = find(config, "num_frames", "frames_per_clip", "image_model_input_frames") or 2
    mels = (
        find(
            config,
            "feature_projection_input_dim",
            "num_mel_bins",
            "feature_size",
            "input_feat_size",
            "input_feat_per_channel",
            "mel_bins",
            "n_mels",
            "input_dim",
            "audio_in_channel",
            within="audio",
        )
        or 80
    )
    mels = mels if type(mels) is int else 80
    merge = single(find(config, "spatial_merge_size", "merge_kernel_size", within="vision")) or 1
    temporal = single(find(config, "temporal_patch_size", within="vision")) or 1
    side = 2 * merge if type(merge) is int else 4
    sizes = list(dict.fromkeys([s for s in (size, 32, 64, 224) if type(s) is int and s <= 256]))
    sound = next((n for n in ("input_values", "input_features", "audio_values") if n in names), None)
    pad = find(config, "pad_token_id")
    pad = pad if type(pad) is int and 0 <= pad < VOCABULARY else 0
    frames_of_sound = [(FRAMES,)]
    if re.fullmatch(SKIPPED, name) and not required:
        return []
    match name:
        case "input_ids":
            return [Spec("text", (), pad)]
        case "attention_mask":
            if text:
                return [Spec("text_mask"), None]
            return [Spec("frames", (FRAMES,)), None] if sound else []
        case "mm_token_type_ids" | "moe_mm_token_type_ids":
            return [Spec("text_types")]
        case "token_type_ids":
            return [Spec("zeros")] if text and required else []
        case "decoder_input_ids":
            if config.is_encoder_decoder or required or find(config, "decoder_start_token_id") is not None:
                return [Spec("words", (6,))]
            return []
        case "bbox":
            return [Spec("boxes", (), find(config, "max_2d_position_embeddings") or 500)]
        case "image_grid_thw":
            return [Spec("per_image", (), (1, side, side))]
        case "grid_thw":
            return [Spec("per_image", (), (1, side, side)), Spec("per_image", (), (side, side))]
        case "image_grid_hws" | "grid_hws":
            return [Spec("per_image", (), (side, side))]
        case "hidden_states" | "pixel_values" if {"image_grid_thw", "grid_thw", "image_grid_hws"} & set(names):
            numbers = channels * temporal * patch * patch
            hidden = find(config, "hidden_size", "embed_dim", within="vision") or 32
            return [
                Spec("patches", (side * side, numbers)),
                Spec("patches", (side * side, channels, patch, patch)),
                Spec("patches", (side * side, hidden)),
                Spec("patches", (side * side, channels * patch * patch * 2)),
                Spec("patches", (side * side, channels * patch * patch)),
            ]
        case "pixel_values" if "spatial_shapes" in names:
            return [Spec("floats", (16, channels * patch * patch))]
        case "spatial_shapes":
            return [Spec("per_sample", (), (4, 4))]
        case "pixel_attention_mask":
            return [Spec("ones", (16,))] if "spatial_shapes" in names else []
        case "pixel_values" if "aspect_ratio_ids" in names:
            return [Spec("floats", (1, find(config, "max_num_tiles") or 4, channels, size, size))]
        case "aspect_ratio_ids":
            return [Spec("ones", (1,))]
        case "aspect_ratio_mask":
            return [Spec("ones", (1, find(config, "max_num_tiles") or 4))]
        case "target_sizes":
            return [Spec("per_image", (), (4, 4))]
        case "pixel_values" | "pixel_values_videos" | "pixel_values_images" | "image" | "images" | "prompt_masks":
            video = name == "pixel_values_videos"
            if video and not required and "pixel_values" in names:
                return []
            flat = [Spec("images" if text else "floats", (channels, s, s)) for s in sizes]
            more = [Spec("floats", (count, channels, s, s)) for s in sizes[:2] for count in (frames, 1)]
            patches = [Spec("floats", (16, channels * patch * patch))]
            first = [*more[:1], *flat[:1]] if video else [*flat[:1], *more[:1]]
            return [*first, *(spec for spec in flat + more + patches if spec not in first)]
        case "flattened_patches":
            return [Spec("placed", (16, 2 + channels * patch * patch))]
        case "merge_sizes" | "image_merge_sizes":
            return [Spec("per_image", (), 2)]
        case "image_sizes":
            return [Spec("per_image", (), (sizes[0], sizes[0])), None]
        case "noise":
            return [Spec("unit", ((sizes[0] // patch) ** 2,))]
        case "input_features" | "audio_mel" | "audio_features" | "fbank":
            same = [Spec("floats", (mels, FRAMES)), Spec("floats", (FRAMES, mels))]
            stacked = [Spec("floats", (FRAMES, mels * n)) for n in (2, 4, find(config, "num_stacked_frames") or 2)]
            return [*same, Spec("floats", (1, 64, mels)), Spec("floats", (mels, 3000)), *stacked]
        case "input_features_mask" | "feature_attention_mask" | "audio_mel_mask" | "input_features_attention_mask":
            return [Spec("frames", frames_of_sound[0])]
        case "padding_mask" | "input_values_mask":
            return [Spec("frames", (1600,))] if required else []
        case "input_values" | "audio_values" | "audio":
            tall = find(config, "max_length") or FRAMES
            return [
                Spec("floats", shape)
                for shape in ((1600,), (1, 1600), (tall, mels), (FRAMES, mels), (1, 9600), (9600,))
            ]
        case "past_values":
            context = find(config, "context_length") or 16
            lags = max(find(config, "lags_sequence") or [0])
            width = find(config, "num_input_channels", "num_channels")
            return [Spec("floats", (context, width))] if width else [Spec("floats", (context + lags,))]
        case "past_observed_mask":
            context, lags = find(config, "context_length") or 16, max(find(config, "lags_sequence") or [0])
            return [Spec("ones", (context + lags,))] if required else []
        case "past_time_features":
            context, lags = find(config, "context_length") or 16, max(find(config, "lags_sequence") or [0])
            return [Spec("floats", (context + lags, find(config, "num_time_features") or 0))]
        case "future_values" if "past_time_features" in names:
            return [Spec("floats", (find(config, "prediction_length") or 4,))]
        case "future_time_features":
            return [Spec("floats", (find(config, "prediction_length") or 4, find(config, "num_time_features") or 0))]
        case "freq" | "past_values_padding":
            return (
                [Spec("zeros", (1,) if name == "freq" else (find(config, "context_length") or 16,))]
                if required
                else []
            )
        case "states":
            return [Spec("floats", (5, config.state_dim))]
        case "actions":
            return [Spec("floats", (5, config.act_dim))]
        case "rewards" | "returns_to_go":
            return [Spec("floats", (5, 1))]
        case "timesteps":
            return [Spec("ids", (5,), 16)]
        case "visual_feats":
            return [Spec("floats", (3, config.visual_feat_dim))]
        case "visual_pos":
            return [Spec("unit", (3, config.visual_pos_dim))]
        case "visual_embeds":
            return [Spec("floats", (3, config.visual_embedding_dim))]
        case "xpath_tags_seq" | "xpath_subs_seq":
            return []
        case "input_points":
            return [Spec("unit", (1, 2, 2))]
        case "classes_input_ids" | "tasks_input_ids" | "qformer_input_ids" | "task_inputs" | "audio_input_ids":
            return [Spec("words", (6,))] if required or name.startswith("qformer") else []
        case "query_embeds":
            return [Spec("floats", (4, config.hidden_size))]
        case "encoder_hidden_states":
            required = required or "query_embeds" in names
            width = find(config, "encoder_hidden_size", "cross_attention_hidden_size", "hidden_size", "d_model")
            return [Spec("floats", (5, width))] if required or find(config, "add_cross_attention") else []
        case "inputs":
            return [Spec("floats", (TEXT, find(config, "d_model") or 32))]
        case "latents" | "hidden_states" | "inputs_embeds" | "query_embeds" | "spectrogram" | "embeddings":
            width = find(config, "hidden_size", "d_model", "embed_dim", "model_in_dim", "hidden_dim") or 32
            width = single(width)
            return [Spec("floats", (TEXT, width)), Spec("floats", (width, TEXT))] if required else []
    return []


MODALITIES = {
    "image": r"pixel_\w+|image_\w+|images|flattened_patches|spatial_shapes|aspect_ratio_\w+|grid_\w+"
    r"|prompt_pixel_values|qformer_\w+",
    "audio": r"input_features\w*|input_values\w*|audio_\w+|feature_attention_mask|padding_mask",
    "text": r"input_ids|mm_token_type_ids|moe_mm_token_type_ids|bbox|decoder_input_ids|token_type_ids",
}
MODES = [("text", "image", "audio"), ("text", "image"), ("text", "audio"), ("text",), ("image",), ("audio",)]


def recipes(model: PreTrainedModel, each: int = 16) -> Iterator[Recipe]:
    """Yield recipes for the arguments of forward: `each` for every choice of modalities."""
    config = model.config
    signature = inspect.signature(model.forward).parameters
    required = {
        name
        for name, p in signature.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    given = OVERRIDES.get(config.model_type, {}).get("inputs", {}) | OVERRIDES.get(type(model).__name__, {})
    left = not config.is_encoder_decoder and model.can_generate()
    tokens = {
        modality: find(config, f"{modality}_token_id", f"{modality}_token_index", f"{modality}_patch_id")
        for modality in ("image", "video", "audio")
    }
    around = (find(config, "vision_start_token_id"), find(config, "vision_end_token_id"))
    vocabulary = find(config, "vocab_size", within="text")
    last = min(LAST_WORD, vocabulary) if type(vocabulary) is int and vocabulary > FIRST_WORD else LAST_WORD
    seen = []
    lacking = {
        m for m, part in (("image", "vision_config"), ("audio", "audio_config")) if getattr(config, part, 0) is None
    }
    for mode in MODES:
        if lacking & set(mode):
            continue
        names = []
        for name in signature:
            modality = next((m for m, pattern in MODALITIES.items() if re.fullmatch(pattern, name)), None)
            if modality is None or modality in mode or name in required:
                names.append(name)
        options = {
            name: [given[name]] if name in given else candidates(name, config, names, name in required)
            for name in names
        }
        options = {name: specs for name, specs in options.items() if specs}
        if options in seen or not options:
            continue
        seen.append(options)
        has = {m: any(re.fullmatch(MODALITIES[m], name) for name in options) for m in ("image", "audio")}
        placeholders = {
            m: 4 for m in ("image", "audio") if has[m] and "input_ids" in options and tokens[m] is not None
        }
        for choice in itertools.islice(itertools.product(*options.values()), each):
            specs = {name: spec for name, spec in zip(options, choice) if spec is not None}
            if "attention_mask" in specs and "input_ids" not in specs:  # as long as the audio
                long = next((s for n, s in specs.items() if n in ("input_values", "input_features")), None)
                if long is not None:
                    specs["attention_mask"] = Spec("frames", (FRAMES if FRAMES in long.shape else max(long.shape),))
            yield Recipe(specs, dict(placeholders), tokens, last, left, before_and_after=around)


MISMATCH = re.compile(r"tokens?[^0-9]*(\d+)[^0-9]*features?\D*(\d+)", re.IGNORECASE | re.DOTALL)


def repaired(recipe: Recipe, error: Exception, samples: int, hidden: int) -> Recipe | None:
    """Return the recipe with the number of placeholders, or the audio length, that the model's error asks for."""
    message = str(error)
    if (match := MISMATCH.search(message)) and recipe.placeholders:
        have, want = int(match[1]), int(match[2])
        modality = "audio" if "audio" in message.lower() else "image"
        if modality not in recipe.placeholders:
            modality = next(iter(recipe.placeholders))
        held = recipe.placeholders[modality]
        if have == want and held % hidden == 0:  # the error gave numbers of values, not of tokens
            return dataclasses.replace(recipe, placeholders=recipe.placeholders | {modality: held // hidden})
        if have != want and have % samples == 0:
            ratio = have / (held * samples) if held else 1
            number = want / samples / (ratio if ratio >= 1 else 1)
            if number == int(number) and 0 < number < 3000 and number != held:
                return dataclasses.replace(recipe, placeholders=recipe.placeholders | {modality: int(number)})
    if match := re.search(r"mel input features to be of length (\d+)", message):
        specs = dict(recipe.specs)
        for name, spec in specs.items():
            if name == "input_features" and spec.shape[-1] != int(match[1]):
                specs[name] = dataclasses.replace(spec, shape=(spec.shape[0], int(match[1])))
                return dataclasses.replace(recipe, specs=specs)
    return None


# --- outputs --------------------------------------------------------------------------------------------------------


def tensors(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in a forward's output."""
    if isinstance(output, Tensor):
        return [output.detach()] if output.is_floating_point() and output.numel() else []
    if isinstance(output, dict):
        return [
            t for name, value in output.items() if "cache" not in name and "past" not in name for t in tensors(value)
        ]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in tensors(value)]
    return []


def same(first: Any, second: Any) -> bool:
    one, two = tensors(first), tensors(second)
    return len(one) == len(two) and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, two))


def checked(model: PreTrainedModel, recipe: Recipe) -> Recipe:
    """Return the recipe if forward runs with it as described; unequal samples only if these run too."""

    def run(samples: int, seed: int = 0, equal: bool = True) -> Any:
        with torch.no_grad():
            return model(**recipe.make(samples, seed, equal))

    for samples in (3, 4):
        for equal in (True, False):
            try:
                output = run(samples, equal=equal)
            except Exception:
                if equal or not recipe.unequal_text:
                    raise
                recipe = dataclasses.replace(recipe, unequal_text=False)
                output = run(samples, equal=equal)
            found = tensors(output)
            if not found:
                raise ValueError("forward returned no numbers")
            if equal and not all(t.isfinite().any() for t in found):
                raise ValueError("outputs aren't finite")
    if any(t.isnan().any() for t in found):
        if recipe.unequal_text:
            return checked(model, dataclasses.replace(recipe, unequal_text=False))
        raise ValueError("outputs have NaNs")
    if not same(run(4), run(4)):
        model.register_forward_pre_hook(reseed)  # forward itself draws random numbers
        if not same(run(4), run(4)):
            raise ValueError("two runs of the same inputs differ")
    if same(run(4), run(4, seed=1)):
        raise ValueError("outputs don't depend on inputs")
    if any(spec.kind in ("images", "patches") for spec in recipe.specs.values()):
        equal_images, recipe = recipe, dataclasses.replace(recipe, unequal_images=True)
        try:
            for samples in (3, 4):
                run(samples, equal=False)
        except Exception:
            recipe = equal_images
    return recipe


@dataclasses.dataclass
class Tiny:
    """A tiny model and its inputs."""

    model_type: str
    class_name: str
    model: PreTrainedModel
    recipe: Recipe

    def inputs(self, samples: int, seed: int = 0, equal: bool = True) -> dict[str, Any]:
        """Create keyword arguments of forward.

        Args:
            samples: number of samples, which all differ.
            seed: determines the content, not the shapes.
            equal: False for samples with different numbers of tokens, frames and images, if the model supports
                this.
        """
        return self.recipe.make(samples, seed, equal)

    @functools.cached_property
    def generates(self) -> bool:
        """Whether `model.generate(**inputs(...), max_new_tokens=4, do_sample=False)` runs and is deterministic."""
        if not self.model.can_generate():
            return False
        try:
            with torch.no_grad():
                runs = [self.model.generate(**self.inputs(3), max_new_tokens=4, do_sample=False) for _ in range(2)]
        except Exception:
            return False
        return all(isinstance(run, Tensor) for run in runs) and torch.equal(*runs)


# --- building -------------------------------------------------------------------------------------------------------


def reason(error: BaseException) -> str:
    """Return the reason in one line."""
    text = str(error).strip()
    if match := re.search(r"requires the (\w+) library", text) or re.search(r"No module named '(\w+)'", text):
        return f"needs the package {match[1]}"
    if isinstance(error, NotBuilt):
        return text
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:160]}"


def model_types() -> list[str]:
    """Return all model types of the installed transformers."""
    return sorted(CONFIG_MAPPING_NAMES)


UNFIT = {"qwen2_5_omni_thinker": "no sound is known that has as many features as its text has placeholders"}
"""Types whose models run with inputs that don't fit."""


def build(model_type: str, head: bool = False) -> Tiny:
    """Build a tiny model of a type.

    Args:
        model_type: one of `model_types()`.
        head: whether to build its most common class with a head, instead of the base model.

    Raises:
        NotBuilt: it can't be built; the message is the reason, in one line.
    """
    if model_type in UNFIT:
        raise NotBuilt(UNFIT[model_type])
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            found = model_class(model_type, head)
        except NotBuilt:
            raise
        except Exception as error:
            raise NotBuilt(reason(error)) from error
        reasons = []
        for level, width, tries in ((1, 1, 16), (1, 4, 4), (2, 1, 4), (2, 4, 4), (3, 1, 2), (4, 1, 2)):
            try:
                config = Shrinking(level, width).smaller(starting_config(model_type))
                model = built(found, config, careful=level > 2)
            except Exception as error:
                reasons.append(f"{reason(error)} [{level}, {width}, build]")
                continue
            try:
                return Tiny(model_type, found.__name__, model, fitting(model, tries))
            except Exception as error:
                reasons.append(f"{reason(error)} [{level}, {width}, forward]")
    told = NotBuilt(next((r for r in reasons if r.startswith("needs the package")), reasons[0]))
    told.add_note("\n".join(reasons))
    raise told


def fitting(model: PreTrainedModel, each: int) -> Recipe:
    first: Exception | None = None
    for recipe in recipes(model, each):
        for _ in range(4):
            try:
                return checked(model, recipe)
            except Exception as error:
                first = first or error
                better = repaired(recipe, error, 3, find(model.config, "hidden_size", "d_model", within="text") or 32)
                if better is None:
                    break
                recipe = better
    raise first or NotBuilt(f"no inputs are known for {list(inspect.signature(model.forward).parameters)}")


# --- the command line -----------------------------------------------------------------------------------------------


def attempt(task: tuple[str, bool]) -> tuple[str, bool, str]:
    """Try one type; returns the result in one line."""
    model_type, head = task
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("it took longer than a minute")))
    signal.alarm(60)
    began = time.monotonic()
    try:
        tiny = build(model_type, head)
        with torch.no_grad():
            shapes = [tuple(t.shape) for t in tensors(tiny.model(**tiny.inputs(3)))][:3]
        taken = {name: tuple(v.shape) if isinstance(v, Tensor) else v for name, v in tiny.inputs(3).items()}
        generates = " generates" if tiny.generates else ""
        seconds = time.monotonic() - began
        count = parameters_of(tiny.model)
        return model_type, True, f"{tiny.class_name} {count:.1e} {seconds:.1f}s {taken} -> {shapes}{generates}"
    except Exception as error:
        notes = "".join(f"\n     {line}" for note in getattr(error, "__notes__", []) for line in note.splitlines())
        return model_type, False, f"{reason(error)} ({time.monotonic() - began:.0f}s){notes}"
    finally:
        signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--head", action="store_true", help="a class with a head instead of the base model")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    tasks = [(model_type, arguments.head) for model_type in arguments.types or model_types()]
    groups = collections.defaultdict(list)
    done = 0
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=100) as pool:
        for model_type, fine, line in pool.imap(attempt, tasks):
            print("built" if fine else "NOT", model_type, line, flush=True)
            done += fine
            if not fine:
                groups[re.sub(r"\d+(\.\d+)?", "#", line.splitlines()[0])[:90]].append(model_type)
    print(f"\n{done} of {len(tasks)} built")
    for line, types in sorted(groups.items(), key=lambda group: -len(group[1])):
        print(f"{len(types):4} {line}: {' '.join(types[:12])}")


if __name__ == "__main__":
    main()
