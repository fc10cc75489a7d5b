"""Which model types were tried beside PEFT, one adapter at a time, and which of their layers can't take part.

`make sweep` tries every model type of transformers and writes `architectures.json`; tests/sweep/sweep.py says how.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

POSITIONS_FIRST = "its rows are positions first and samples second"
TILED_ROWS = "its rows are tiled, so that a sample's don't stand side by side"

# By model type, layers whose names (with # for numbers) match, and why adapters in them can't take part.
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

# By model type, layers that have the samples in a later dimension, and in which.
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

# By model type, layers that are given all samples, and then all of them again: as prompts, patches, groups of queries.
TILED: dict[str, str] = {
    "depth_pro": "",
    "lw_detr": r"decoder\..*self_attn",
    "rf_detr": r"decoder\..*self_attn",
    "seggpt": "",
}


@functools.cache
def tried() -> frozenset[str]:
    """The model types that were tried."""
    found = json.loads(files("peft_multibatch.layers").joinpath("architectures.json").read_text())
    return frozenset(found["tried"])


def look_up(model: nn.Module) -> bool:
    """Whether models of this type were tried, so that what isn't refused is known to be right; once, a word if not."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    is_tried = any(model_type in known for known in (tried(), REFUSED, SAMPLES_BEHIND, TILED))
    if not is_tried:
        logger.warning_once(
            f"{type(model).__name__} is of a type that peft_multibatch wasn't tried with: call mb.verify(...) with a "
            "small batch to compare it with PEFT."
        )
    return is_tried


def types_around(model: Any, name: str) -> dict[str, None]:
    """The model types that a layer belongs to, from that of the model to that of the innermost one that holds it.

    Args:
        model: it may be made of others, as an ``EncoderDecoderModel`` is.
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
    """Why adapters in a layer can't take part, and the model type of which that is known; empty strings if nothing is.

    Args:
        types: those around it.
        name: the layer's name in the model.
    """
    numbered = re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)
    known = (
        (why, each) for each in types for layers, why in REFUSED.get(each, {}).items() if re.search(layers, numbered)
    )
    return next(known, ("", ""))


def dim_of_samples(types: Iterable[str], name: str) -> int:
    """The dimension in which a layer has the samples, 0 where nothing else is known."""
    parts = name.split(".")
    return next((dim for each in types for part, dim in SAMPLES_BEHIND.get(each, {}).items() if part in parts), 0)


def is_tiled(types: Iterable[str], name: str) -> bool:
    """Whether a layer is given all samples again and again, one after the other each time."""
    return any(re.search(TILED[each], name) for each in types if each in TILED)
