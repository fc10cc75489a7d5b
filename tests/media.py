"""Tiny models that read images or audio besides text, and batches with unequal numbers and sizes of them.

Every sample comes as it would be given alone, so that PEFT can run it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, get_peft_model
from sweep.tiny import FIRST_WORD, build
from torch import Tensor


RANKS = {"a": 2, "b": 3, "c": 4}
WORDS = 5
PADDING = 0


class Part(NamedTuple):
    """What a processor makes of the images of one sample.

    Attributes:
        tokens: placeholders of each image.
        inputs: arguments of the model, with rows for the images.
        words: of its text.
    """

    tokens: list[int]
    inputs: dict[str, Tensor]
    words: tuple[int, ...] = ()


class Family:
    """Tiny models of one kind, and their inputs.

    Args:
        model_type: a type of transformers, for ``build``; or what makes such a tiny model.
        media: makes the images of one sample, from a generator and their number.
        kind: what the placeholders stand for.
        join: makes the inputs of a batch from those of its samples.
        counts: images of each sample.
        mixes: whether samples change with the padding of their batch, so that PEFT has to run the whole batch.
    """

    def __init__(
        self, model_type: str | Callable, media: Callable, kind: str = "image", join: Callable | None = None,
        counts: Sequence[int] = (2, 0, 1, 3, 1), mixes: bool = False,
    ) -> None:  # fmt: skip
        self.model_type, self.media, self.kind, self.join = model_type, media, kind, join or side_by_side
        self.counts, self.mixes = counts, mixes

    def model(self, modules_to_save: Sequence[str] = (), leave_out: str = "", targets: str = "all-linear") -> Any:
        """A model with three adapters, by default on all of its linear layers."""
        self.tiny: Any = self.model_type() if callable(self.model_type) else build(self.model_type, head=True)
        model = None
        for name, rank in RANKS.items():
            config = LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False,
                modules_to_save=[*modules_to_save] or None, exclude_modules=leave_out or None,
            )  # fmt: skip
            if model is None:
                model = get_peft_model(self.tiny.model, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        return model.eval()

    def samples(self, changed: int | None = None) -> list[Part]:
        """The images of each sample.

        Args:
            changed: a sample whose images are others, of the same sizes.
        """
        found = []
        for sample, count in enumerate(self.counts):
            generator = torch.Generator().manual_seed(sample)
            part = self.media(self, generator, count)
            words = torch.randint(FIRST_WORD, 60, (WORDS + sample % 3,), generator=generator)
            part = part._replace(words=tuple(words.tolist()))
            if sample == changed:
                part = part._replace(inputs={
                    key: value + 1 if value.is_floating_point() else value for key, value in part.inputs.items()
                })  # fmt: skip
            found.append(part)
        return found

    def batch(self, parts: Sequence[Part]) -> dict[str, Tensor]:
        """Inputs of a batch, padded on the left."""
        token = self.tiny.recipe.tokens[self.kind]
        before, after = self.tiny.recipe.before_and_after
        texts = []
        for part in parts:
            ids = [*part.words[:2]]
            for number in part.tokens:
                ids += [each for each in (before,) if each is not None] + [token] * number
                ids += [FIRST_WORD if after is None else after]
            texts.append([*ids, *part.words[2:]])
        length = max(map(len, texts))

        def padded(row: list[int]) -> list[int]:
            return [PADDING] * (length - len(row)) + row

        made = {
            "input_ids": torch.tensor([padded(ids) for ids in texts]),
            "attention_mask": torch.tensor([padded([1] * len(ids)) for ids in texts]),
        }
        if "mm_token_type_ids" in self.tiny.recipe.specs:
            made["mm_token_type_ids"] = (made["input_ids"] == token).long() * (2 if self.kind == "video" else 1)
        return made | self.join([part.inputs for part in parts], length)


def side_by_side(parts: Sequence[dict[str, Tensor]], length: int) -> dict[str, Tensor]:
    """Images of all samples, one after the other."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}


def in_rows(parts: Sequence[dict[str, Tensor]], length: int) -> dict[str, Tensor]:
    """A row for each sample, padded with images of zeros."""
    most = max(len(part["pixel_values"]) if part else 0 for part in parts)
    if not most:
        return {}
    blank = next(part["pixel_values"] for part in parts if part)[:1] * 0
    rows = [torch.cat([*([part["pixel_values"]] if part else []), *[blank] * most])[:most] for part in parts]
    return {"pixel_values": torch.stack(rows)}


def uniform(name: str, *shape: int, tokens: int = 0) -> Callable:
    """Images that all have the same size."""

    def media(family: Family, generator: torch.Generator, count: int) -> Part:
        number = tokens or family.tiny.recipe.placeholders[family.kind]
        return Part([number] * count, {name: torch.randn(count, *shape, generator=generator)} if count else {})

    return media


def grid(family: Family, generator: torch.Generator, count: int) -> Part:
    """Images or videos as rows of patches, each of its own size."""
    if not count:
        return Part([], {})
    width = family.tiny.recipe.specs["pixel_values"].shape[-1]
    is_video = family.kind == "video"
    frames = [1 + (count + video) % 2 if is_video else 1 for video in range(count)]
    grids = [[frames[image], 2 * (1 + (count + image) % 3), 2 * (1 + image % 2)] for image in range(count)]
    patches = torch.randn(sum(t * h * w for t, h, w in grids), width, generator=generator)
    name = "pixel_values_videos" if is_video else "pixel_values"
    inputs = {name: patches, f"{family.kind}_grid_thw": torch.tensor(grids)}
    if family.model_type == "qwen3_vl":  # has text between the frames of a video
        return Part([h * w // 4 for t, h, w in grids for _ in range(t)], inputs)
    return Part([t * h * w // 4 for t, h, w in grids], inputs)


def sized(merge: int) -> Callable:
    """Images of their own sizes, padded to the largest one that there is."""

    def media(family: Family, generator: torch.Generator, count: int) -> Part:
        if not count:
            return Part([], {})
        sizes = [[16 * (1 + (count + image) % 2), 16 * (1 + image % 2)] for image in range(count)]
        pixels = torch.randn(count, 3, 32, 32, generator=generator)
        for image, (height, width) in enumerate(sizes):
            pixels[image, :, height:] = pixels[image, :, :, width:] = 0
        tokens = [height * width // (8 * merge) ** 2 for height, width in sizes]
        return Part(tokens, {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)})

    return media


def tiles(family: Family, generator: torch.Generator, count: int) -> Part:
    """Images that are cut into tiles: one for the whole, and one for each part of the size that fits best."""
    if not count:
        return Part([], {})
    sizes = [[(64, 64), (64, 40), (32, 32)][(count + image) % 3] for image in range(count)]
    found = [5 if max(size) > 32 else 2 for size in sizes]
    pixels = torch.randn(count, 5, 3, 32, 32, generator=generator)
    for image, number in enumerate(found):
        pixels[image, number:] = 0
    lines = {(64, 64): 8 * 9, (64, 40): 8 * 7, (32, 32): 4 * 5}  # rows of patches, each with the end of a line
    return Part([16 + lines[size] for size in sizes], {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)})


def clips(family: Family, generator: torch.Generator, count: int) -> Part:
    """Audio clips of their own lengths, padded to one."""
    if not count:
        return Part([], {})
    lengths = [64 - 12 * ((count + clip) % 3) for clip in range(count)]
    mask = torch.tensor([[1] * length + [0] * (64 - length) for length in lengths])
    inputs = {"input_features": torch.randn(count, 128, 64, generator=generator), "feature_attention_mask": mask}
    return Part([((length - 1) // 2 + 1 - 2) // 2 + 1 for length in lengths], inputs)


def blocks(family: Family, generator: torch.Generator, count: int) -> Part:
    """Audio clips of one or two blocks of frames, each of which becomes as many features."""
    if not count:
        return Part([], {})
    config = family.tiny.model.config
    features = config.window_size // config.downsample_rate
    found = [1 + (count + clip) % 2 for clip in range(count)]
    sound = torch.randn(count, 2 * config.window_size, config.encoder_config.input_dim, generator=generator)
    mask = torch.arange(2 * features)[None] < torch.tensor(found)[:, None] * features
    return Part([features * each for each in found], {"input_features": sound, "input_features_mask": mask})


def crossed(parts: Sequence[dict[str, Tensor]], length: int) -> dict[str, Tensor]:
    """As ``in_rows``, for text that attends to the images of its sample from beside."""
    made = in_rows(parts, length)
    if made:
        shape = made["pixel_values"].shape[:3]
        there = torch.tensor(
            [[image < len(part.get("pixel_values", ())) for image in range(shape[1])] for part in parts]
        )
        made["aspect_ratio_ids"] = there.long()
        made["aspect_ratio_mask"] = torch.ones(shape, dtype=torch.long)
        made["cross_attention_mask"] = there.long()[:, None, :, None].expand(-1, length, -1, shape[2]).contiguous()
    return made


def llava_with_pixtral() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.PixtralVisionConfig(**sizes, head_dim=16, image_size=32, patch_size=8),
        text_config=transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=120),
        image_token_id=119, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    recipe = SimpleNamespace(tokens={"image": 119}, before_and_after=(None, None), specs={})
    return SimpleNamespace(model=transformers.LlavaForConditionalGeneration(config), recipe=recipe)


FAMILIES = {
    "LLaVA": Family("llava", uniform("pixel_values", 3, 32, 32)),
    "LLaVA with Pixtral": Family(llava_with_pixtral, sized(1)),
    "PaliGemma": Family("paligemma", uniform("pixel_values", 3, 32, 32), mixes=True),
    "ColPali": Family(lambda: build("colpali", head=False), uniform("pixel_values", 3, 32, 32), mixes=True),
    "Gemma 3": Family("gemma3", uniform("pixel_values", 3, 32, 32)),
    "InternVL": Family("internvl", uniform("pixel_values", 3, 32, 32)),
    "BLIP-2": Family("blip-2", uniform("pixel_values", 3, 32, 32), counts=(2, 1, 1, 3, 1)),
    "Qwen2-VL": Family("qwen2_vl", grid),
    "Qwen2.5-VL": Family("qwen2_5_vl", grid),
    "Qwen3-VL": Family("qwen3_vl", grid),
    "GLM-4V": Family("glm4v", grid),
    "Qwen2-VL, videos": Family("qwen2_vl", grid, "video"),
    "Qwen2.5-VL, videos": Family("qwen2_5_vl", grid, "video"),
    "Qwen3-VL, videos": Family("qwen3_vl", grid, "video"),
    "Idefics2": Family("idefics2", uniform("pixel_values", 3, 32, 32, tokens=64), join=in_rows),
    "Mistral 3": Family("mistral3", sized(2)),
    "Idefics3": Family("idefics3", uniform("pixel_values", 3, 32, 32, tokens=4), join=in_rows),
    "SmolVLM": Family("smolvlm", uniform("pixel_values", 3, 32, 32, tokens=4), join=in_rows),
    "LLaVA-NeXT": Family("llava_next", tiles),
    "LLaVA-OneVision": Family("llava_onevision", tiles),
    "LLaVA-OneVision, videos": Family(
        "llava_onevision", uniform("pixel_values_videos", 2, 3, 32, 32, tokens=9), "video"
    ),
    "Qwen2-Audio": Family("qwen2_audio", clips, "audio"),
    "Mllama": Family("mllama", uniform("pixel_values", 4, 3, 32, 32, tokens=1), join=crossed, counts=(2, 1, 1, 3, 1)),
    "Granite Speech": Family("granite_speech", blocks, "audio"),
    "Voxtral": Family("voxtral", uniform("input_features", 128, 64), "audio"),
}
