"""Which sample each image, video or audio clip of a batch belongs to, and how many of an encoder's rows are its own.

A sample brings any number of images of any size, and an encoder sees the images of all samples one after the other.
Their features replace placeholder tokens of the text in the same order, so the placeholders tell which sample an image
belongs to.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_multibatch.errors import RowMappingError


ADVICE = "Remove the adapters from this part of the model, or run them one at a time."


TEXTS = ("input_ids", "inputs")
"""Arguments of a model's forward and of ``generate`` with the tokens of all texts."""


class Kind(NamedTuple):
    """A kind of media.

    Attributes:
        name: as in messages.
        method: the method of a model that encodes it.
        placeholders: where a model's configuration may have the token that its features replace.
        inputs: the argument that holds all images, videos or clips.
        dims: dimensions of that argument if all have the same size and follow each other along the first one.
        grids: arguments that may hold the number of patches of each one along each of its dimensions.
    """

    name: str
    method: str
    placeholders: tuple[str, ...]
    inputs: str
    dims: int
    grids: tuple[str, ...] = ()


IMAGES = Kind(
    "image", "get_image_features", ("image_token_id", "image_token_index"), "pixel_values", 4,
    ("image_grid_thw", "image_grid_hws"),
)  # fmt: skip
VIDEOS = Kind(
    "video", "get_video_features", ("video_token_id", "video_token_index"), "pixel_values_videos", 5,
    ("video_grid_thw",),
)  # fmt: skip
AUDIO = Kind(
    "audio clip", "get_audio_features", ("audio_token_id", "audio_token_index"), "input_features", 3
)  # fmt: skip


class Media(NamedTuple):
    """Images, videos or audio clips, in the order in which an encoder sees them.

    Attributes:
        tokens: placeholder tokens of each.
        rows: rows of each in the encoder's layers, up to a common factor.
        is_flat: whether these are patches, which layers may get in a single row instead of one row for each image.
        is_exact: whether ``rows`` are the numbers themselves, without a common factor.
    """

    tokens: list[int]
    rows: list[int]
    is_flat: bool = False
    is_exact: bool = False


class Shares(NamedTuple):
    """Samples in the order in which an encoder sees their media.

    Attributes:
        rows: each with a number in proportion to its rows.
        media: each with the number of its images, videos or audio clips.
    """

    rows: tuple[tuple[int, int], ...]
    media: tuple[tuple[int, int], ...]


class MediaRows:
    """Finds the sample of each image, video or audio clip in the inputs that a processor made.

    Args:
        model: the model whose configuration has the placeholder token.
        kind: what is encoded.
        name: what encodes it, for messages.
    """

    def __init__(self, model: Any, kind: Kind, name: str) -> None:
        self._model, self._kind, self._name = model, kind, name

    def find(self, given: dict[str, Any], samples: int, has_text: bool) -> tuple[Media, Shares]:
        """The media, and which samples they belong to.

        Args:
            given: arguments of the model, by name.
            samples: the number of adapter ids.
            has_text: whether there is a text even if it isn't given.

        Raises:
            RowMappingError: the arguments don't tell which sample each one belongs to.
        """
        counts = self._count_placeholders(given, samples, has_text)
        if not any(counts):  # such as GLM-4V's videos, whose features replace the token of images
            token = placeholder(self._model, self._kind)
            raise self._error(f"texts without the token {token}", f"one for each feature of a {self._kind.name}")
        media = self._find(given, counts)
        ends, end, row = list(accumulate(counts)), 0, 0
        found: list[tuple[int, int]] = []
        for tokens, rows in zip(media.tokens, media.rows):
            end += tokens
            while row < len(ends) and ends[row] < end:
                row += 1
            if row == len(ends) or end - tokens < ends[row] - counts[row]:
                break
            found.append((row * samples // len(counts), rows))
        if not found or len(found) < len(media.tokens) or end != sum(counts):
            what = f"{self._kind.name}s of {_some(media.tokens)} tokens"
            raise self._error(what, f"as many placeholders in the texts, which have {_some(counts)}")
        by_sample = [(sample, [rows for _, rows in group]) for sample, group in groupby(found, lambda pair: pair[0])]
        rows_of = tuple((sample, sum(rows)) for sample, rows in by_sample if any(rows))
        return media, Shares(rows_of, tuple((sample, len(rows)) for sample, rows in by_sample))

    def check(self, media: Media, output: Any) -> None:
        """Check an encoder's output: as many features for each one as there are placeholder tokens.

        Args:
            media: what ``find`` returned.
            output: of the method; has a list of features if their numbers differ.

        Raises:
            RowMappingError: there are others, so the placeholders don't tell which sample each one belongs to.
        """
        features = getattr(output, "pooler_output", None)
        if not isinstance(features, (list, tuple)) or not all(isinstance(each, Tensor) for each in features):
            return
        found = [each.shape[:-1].numel() for each in features]
        if not {*accumulate(media.tokens)} <= {0, *accumulate(found)} or sum(found) != sum(media.tokens):
            raise self._error(
                f"{self._kind.name}s that became {_some(found)} features", f"{_some(media.tokens)}, as in the texts"
            )

    def _count_placeholders(self, given: dict[str, Any], samples: int, has_text: bool) -> list[int]:
        """Placeholder tokens in each row of the text."""
        text = next((given[name] for name in TEXTS if given.get(name) is not None), None)
        inputs = given.get(self._kind.inputs)
        has_text = has_text or text is not None or given.get("inputs_embeds") is not None
        is_one_each = isinstance(inputs, Tensor) and inputs.dim() == self._kind.dims and len(inputs) == samples
        if not has_text and is_one_each:
            return [1] * samples
        if not isinstance(text, Tensor) or text.dim() != 2:
            raise self._error("inputs without tokens", "a call of the whole model with input_ids [samples, tokens]")
        if len(text) % samples:
            raise self._error(f"{len(text)} texts", f"a multiple of the {samples} adapter ids")
        token: Any = placeholder(self._model, self._kind)
        return (text == token).sum(1).tolist()

    def _find(self, given: dict[str, Any], counts: Sequence[int]) -> Media:
        kind, total = self._kind, sum(counts)
        grid = next((given[name] for name in kind.grids if given.get(name) is not None), None)
        if grid is not None:
            return self._in_proportion(list(map(math.prod, _numbers(grid))), total, is_flat=True)
        sizes, inputs = given.get("image_sizes"), given.get(kind.inputs)
        if sizes is not None and kind is IMAGES:
            sizes, vision = _numbers(sizes), self._model.config.vision_config
            if hasattr(self._model, "pack_image_features"):
                return self._tiles(given, sizes)
            if vision.model_type == "pixtral":  # others resize all images to one size
                side = vision.patch_size
                patches = [height // side * (width // side) for height, width in sizes]
                return self._in_proportion(patches, total, is_flat=True)
        masks = (given.get(name) for name in ("feature_attention_mask", "input_features_mask"))
        mask = next((each for each in masks if each is not None), None)
        if mask is not None and kind is AUDIO:
            return self._clips(mask)
        if isinstance(inputs, Tensor) and inputs.dim() == kind.dims:
            return self._in_proportion([1] * len(inputs), total)._replace(is_exact=True)
        return Media([*counts], [*counts])  # such as images of one size, padded to one number for each sample

    def _in_proportion(self, rows: list[int], total: int, is_flat: bool = False) -> Media:
        """Media whose placeholder tokens are in proportion to their rows."""
        if not sum(rows) or any(each * total % sum(rows) for each in rows):
            raise self._error(f"{self._kind.name}s of {_some(rows)} patches", f"tokens in proportion, not {total}")
        return Media([each * total // sum(rows) for each in rows], rows, is_flat)

    def _clips(self, mask: Tensor) -> Media:
        """Audio clips that are padded to one length, and whose features are cut back to their own lengths."""
        lengths, encoder = mask.sum(-1), getattr(self._model, "audio_tower", None)
        if encoder is not None and hasattr(encoder, "_get_feat_extract_output_lengths"):
            _, lengths = encoder._get_feat_extract_output_lengths(lengths)
        return Media(lengths.tolist(), [1] * len(lengths), is_exact=True)

    def _tiles(self, given: dict[str, Any], sizes: list[list[int]]) -> Media:
        """Images cut into tiles; their features are cropped to the image's shape, with one more at each line's end."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        model, several = self._model, given.get("batch_num_images")
        vision = model.config.vision_config
        is_cut = [True] * len(sizes) if several is None else [n == 1 for n in map(int, several) for _ in range(n)]
        tiles = [
            image_size_to_num_patches(size, model.config.image_grid_pinpoints, vision.image_size) if cut else 1
            for size, cut in zip(sizes, is_cut)
        ]
        patches = (vision.image_size // vision.patch_size) ** 2
        features = [torch.zeros(number, patches, 1, dtype=torch.float32, device="cpu") for number in tiles]
        options = {}
        for name in ("vision_feature_select_strategy", "vision_aspect_ratio"):
            if name in parameters(model, "pack_image_features"):
                options[name] = given.get(name) or getattr(model.config, name)
        newline = torch.zeros(1, dtype=torch.float32, device="cpu")
        _, tokens = model.pack_image_features(features, sizes, image_newline=newline, **options)
        return Media(_numbers(tokens), tiles, is_exact=True)

    def _error(self, given: str, expected: str) -> RowMappingError:
        return RowMappingError(
            f"{self._name} received {given}, which doesn't tell the sample of each {self._kind.name}: expected "
            f"{expected}. {ADVICE}"
        )


def placeholder(model: Any, kind: Kind) -> int | None:
    """The token that a model's features of a kind replace; None if it has none."""
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in kind.placeholders)
    return next((each for each in found if isinstance(each, int)), None)


def parameters(module: nn.Module, method: str) -> list[str]:
    """Names of a method's parameters; none if it passes all of them on to another method."""
    function = getattr(type(module), method, None)
    found = [] if function is None else list(inspect.signature(function).parameters.values())[1:]
    passes_on = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in found)
    return [] if passes_on else [each.name for each in found]


def _numbers(value: Any) -> list:
    return value.tolist() if isinstance(value, Tensor) else list(value)


def _some(numbers: Sequence[int]) -> str:
    return f"{[*numbers]}" if len(numbers) <= 8 else f"{[*numbers[:8]]}... ({len(numbers)} in all)"
