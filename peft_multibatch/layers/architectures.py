"""The model types that were compared with PEFT, and those of their layers that need special treatment.

`make sweep` compares every model type of transformers with PEFT, one adapter at a time, and writes
`architectures.json`; see tests/sweep/sweep.py.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

POSITIONS_FIRST = "its rows are ordered by position before sample"
TILED_ROWS = "its rows are tiled, so the rows of a sample aren't contiguous"

# For each model type: a pattern for layer names (with # for numbers) -> why these layers can't run mixed batches.
REFUSED: dict[str, dict[str, str]] = {
    "dia": {"": TILED_ROWS},
    "mask2former": {"": POSITIONS_FIRST},
    "musicgen": {"": TILED_ROWS},
    "musicgen_decoder": {"": TILED_ROWS},
    "musicgen_melody": {"": TILED_ROWS},
    "musicgen_melody_decoder": {"": TILED_ROWS},
    "oneformer": {"": POSITIONS_FIRST},
    "vibevoice": {"": TILED_ROWS},
}

LONGFORMER = ("query", "key", "value", "query_global", "key_global", "value_global")

# For each model type: part of a layer's name -> the dimension of its samples, where that isn't 0.
SAMPLES_BEHIND: dict[str, dict[str, int]] = {
    "bros": {
        "bbox_projection": 2,
        "entity_linker": 1,
        "initial_token_classifier": 1,
        "subsequent_token_classifier": 1,
    },
    "fsmt": dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), 1),
    "led": dict.fromkeys(LONGFORMER, 1),
    "longformer": dict.fromkeys(LONGFORMER, 1),
    "xlnet": dict.fromkeys(("layer_1", "layer_2"), 1),
}

# For each model type: a pattern for layers whose input repeats all samples, once per prompt, patch or query group.
TILED: dict[str, str] = {
    "depth_pro": "",
    "lw_detr": r"decoder\..*self_attn",
    "rf_detr": r"decoder\..*self_attn",
    "seggpt": "",
}


# Parts of the names of modules that encode images, videos or audio, and attributes of their models' configurations.
MEDIA_PARTS = (
    "aligner", "audio", "codec", "connector", "image_", "language_projection", "merger", "perceiver", "projector",
    "qformer", "resampler", "talker", "token2wav", "tokenizer_encoder", "video_tower", "vision", "visual",
)  # fmt: skip
MEDIA_CONFIGS = (
    "acoustic_tokenizer_encoder_config", "audio_config", "codec_config", "projector_config", "vision_config",
)  # fmt: skip

# Model types that pad every sample's images to one number, and keep them in the sample's own row.
MEDIA_BY_SAMPLE = frozenset({"mllama"})


@functools.cache
def _found() -> dict[str, list[str]]:
    return json.loads(files("peft_multibatch.layers").joinpath("architectures.json").read_text())


@functools.cache
def tried() -> frozenset[str]:
    """The model types that the sweep compared with PEFT."""
    return frozenset(_found()["tried"])


@functools.cache
def media() -> frozenset[str]:
    """Model types that the sweep compared with PEFT with adapters in the parts that encode images, videos or audio."""
    return frozenset(_found()["media"])


def look_up(model: nn.Module) -> bool:
    """Whether this model type was compared with PEFT. If not, warns once."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    is_tried = any(model_type in known for known in (tried(), REFUSED, SAMPLES_BEHIND, TILED))
    if not is_tried:
        logger.warning_once(
            f"peft_multibatch hasn't been tested with the model type of {type(model).__name__}: call mb.verify(...) "
            "with a small batch to compare it with PEFT."
        )
    return is_tried


def types_around(model: Any, name: str) -> dict[str, None]:
    """The types of all models that contain a layer, from the outermost to the innermost.

    Args:
        model: the model, which may contain other models, as an ``EncoderDecoderModel`` does.
        name: the layer's name in it.
    """
    found: dict[str, None] = {}
    for part in ("", *name.split(".")):
        model = getattr(model, part, None) if part else model
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if isinstance(model_type, str):
            found[model_type] = None
    return found


def why_refused(types: Iterable[str], name: str) -> tuple[str, str]:
    """Why a layer can't run mixed batches, and the model type this applies to; two empty strings if it can.

    Args:
        types: the model types that contain the layer.
        name: the layer's name in the model.
    """
    numbered = re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)
    known = (
        (why, each) for each in types for layers, why in REFUSED.get(each, {}).items() if re.search(layers, numbered)
    )
    return next(known, ("", ""))


def dim_of_samples(types: Iterable[str], name: str) -> int:
    """The dimension of the samples in a layer's input; 0 unless listed above."""
    parts = name.split(".")
    return next((dim for each in types for part, dim in SAMPLES_BEHIND.get(each, {}).items() if part in parts), 0)


def is_tiled(types: Iterable[str], name: str) -> bool:
    """Whether a layer's input repeats the whole batch several times."""
    return any(re.search(TILED[each], name) for each in types if each in TILED)


def _has_media(config: Any) -> bool:
    """Whether a configuration, or one nested in it, belongs to a model that reads images or audio besides text."""
    inner = (getattr(config, key, None) for key in getattr(config, "sub_configs", ()))
    return any(hasattr(config, name) for name in MEDIA_CONFIGS) or any(map(_has_media, inner))


def _is_spliced(model: Any) -> bool:
    """Whether a model inserts images or audio into its text, any number of them per sample.

    The configuration alone isn't enough: image classifiers share that of the dual encoder that their tower comes from.
    """
    reads_text = "input_ids" in inspect.signature(type(model).forward).parameters
    return reads_text and _has_media(model.config) and not is_dual_encoder(model)


def encodes_media(model: Any, name: str) -> bool:
    """Whether a layer is in a part of the model whose rows are those of images, videos or audio clips.

    Args:
        model: the model.
        name: the layer's name in it.
    """
    parts = name.split(".")
    while parts and not _has_media(getattr(model, "config", None)):  # it may be inside another model
        model, *parts = getattr(model, parts[0], None), *parts[1:]
    config: Any = getattr(model, "config", None)
    if not parts or config.model_type in MEDIA_BY_SAMPLE:
        return False
    words = (*MEDIA_PARTS, "encoder") if hasattr(config, "projector_config") else MEDIA_PARTS  # Granite Speech's
    return any(word in part for part in parts for word in words) and _is_spliced(model)


def is_dual_encoder(model: Any) -> bool:
    """Whether a model encodes text and images or audio separately, one of each per sample, as CLIP does."""
    own = getattr(model, "_parameters", ())
    is_scaled = any(name.startswith(("logit_scale", "temperature")) for name in own)
    return is_scaled and _has_media(getattr(model, "config", None))
