"""Models that read images, audio or series: which sample their rows belong to, and models where this can't be
known."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import alone, row_by_row
from peft import LoraConfig, get_peft_model
from tolerances import assert_close
from torch import nn

import peft_multibatch
from peft_multibatch import errors


NAMES = ["one", "two", "__base__", "two"]
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8, "projection_dim": 12,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
    "max_position_embeddings": 16, "projection_dim": 12, "projection_size": 16, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
AUDIO = {
    "hidden_size": 16, "patch_embeds_hidden_size": 8, "spec_size": 32, "num_mel_bins": 32, "depths": [1, 1],
    "num_attention_heads": [2, 2], "window_size": 2, "patch_size": 4, "patch_stride": [4, 4], "num_hidden_layers": 2,
    "projection_dim": 12, "projection_hidden_size": 16, "enable_fusion": False,
}  # fmt: skip


def build(kind):
    """Build the model with two adapters on all linear layers, including heads and projections."""
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    config_class = model_class.config_class
    if config_class.__name__.endswith("VisionConfig"):
        config = config_class(**VISION)
    elif config_class is transformers.ClapAudioConfig:
        config = config_class(**AUDIO)
    elif config_class is transformers.ClapConfig:
        config = config_class(text_config=TEXT, audio_config=AUDIO, projection_dim=12)
    else:
        config = config_class(text_config=TEXT, vision_config=VISION)
    model = model_class(config)
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "one")
    model.add_adapter("two", LoraConfig(r=3, target_modules=targets, init_lora_weights=False))
    return model.eval()


def images():
    return {"pixel_values": torch.randn(4, 3, 16, 16)}


def sounds():
    return {"input_features": torch.randn(4, 1, 32, 32)}


def texts():
    return {"input_ids": torch.randint(3, 40, (4, 6))}


@pytest.mark.parametrize(
    ("kind", "inputs", "outputs"),
    [
        ("CLIPForImageClassification", [images], ["logits"]),
        ("SiglipForImageClassification", [images], ["logits"]),
        ("MetaClip2ForImageClassification", [images], ["logits"]),
        ("CLIPVisionModelWithProjection", [images], ["image_embeds"]),
        ("SiglipVisionModel", [images], ["last_hidden_state"]),
        ("ClapAudioModelWithProjection", [sounds], ["audio_embeds"]),
        ("CLIPModel", [images, texts], ["image_embeds", "text_embeds"]),
        ("SiglipModel", [images, texts], ["image_embeds", "text_embeds"]),
        ("AltCLIPModel", [images, texts], ["image_embeds", "text_embeds"]),
        ("ClapModel", [sounds, texts], ["audio_embeds", "text_embeds"]),
    ],
)
def test_images_and_sounds_that_are_the_samples(kind, inputs, outputs):
    """Models without text, and models that compare one text with one image."""
    model = build(kind)
    given = {key: value for make in inputs for key, value in make().items()}
    with torch.no_grad():
        rows = row_by_row(model, NAMES, given, lambda row: model(**row))
        base = alone(model, None, lambda: model(**given))
        peft_multibatch.enable(model)
        actual = model(**given, adapter_ids=NAMES)
    for output in outputs:
        expected = torch.cat([row[output] for row in rows])
        assert not torch.allclose(expected, base[output])
        assert_close(actual[output], expected)


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize(("rows", "ids"), [((4, 8), 4), ((4, 2), 4), ((8, 4), 4), ((4, 8), 8)])
def test_other_numbers_of_texts_than_of_images(rows, ids, by_name):
    model = build("CLIPModel")
    peft_multibatch.enable(model)
    input_ids, pixel_values = torch.randint(3, 40, (rows[0], 6)), torch.randn(rows[1], 3, 16, 16)
    with pytest.raises(errors.AdapterIdsLengthError):
        if by_name:
            model(pixel_values=pixel_values, input_ids=input_ids, adapter_ids=["one"] * ids)
        else:
            model(input_ids, pixel_values, adapter_ids=["one"] * ids)


def test_the_message_about_other_numbers_of_texts_than_of_images():
    model = build("CLIPModel")
    peft_multibatch.enable(model)
    with pytest.raises(errors.AdapterIdsLengthError) as caught:
        model(pixel_values=torch.randn(8, 3, 16, 16), **texts(), adapter_ids=NAMES)
    assert str(caught.value) == (
        "adapter_ids was passed with 4 input_ids, 8 pixel_values: expected equal numbers, because an id belongs to a "
        "pair, such as a text and an image. Call the model with pairs, or encode texts and images in separate calls."
    )


def test_texts_and_images_in_calls_of_their_own():
    model, given = build("CLIPModel"), {**images(), **texts()}
    inner = model.get_base_model()
    with torch.no_grad():
        rows = row_by_row(model, NAMES, given, lambda row: model(**row))
        mb = peft_multibatch.enable(model)
        with mb.batch(NAMES[:3]):
            seen = inner.get_image_features(given["pixel_values"][:3]).pooler_output
            read = inner.get_text_features(given["input_ids"][:3]).pooler_output
    for mine, output in ((seen, "image_embeds"), (read, "text_embeds")):
        expected = torch.cat([row[output] for row in rows[:3]])
        assert_close(mine / mine.norm(dim=-1, keepdim=True), expected)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_list_of_series_of_any_length(by_name):
    torch.manual_seed(0)
    config = transformers.TimesFmConfig(
        patch_length=8, context_length=32, horizon_length=8, freq_size=3, num_hidden_layers=1, hidden_size=16,
        intermediate_size=16, head_dim=8, num_attention_heads=2,
    )  # fmt: skip
    model = transformers.TimesFmModelForPrediction(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    targets = ["q_proj", "v_proj", "input_layer", "output_layer", "residual_layer"]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "one")
    model.add_adapter("two", LoraConfig(r=3, target_modules=targets, init_lora_weights=False))
    model.eval()
    series, frequencies = [torch.randn(length) for length in (20, 32, 9, 20)], [0, 1, 0, 2]

    def call(rows, **ids):
        if by_name:
            return model(past_values=series[rows], freq=frequencies[rows], **ids).mean_predictions
        return model(series[rows], frequencies[rows], **ids).mean_predictions

    with torch.no_grad():
        expected = torch.cat(
            [alone(model, name, lambda row=row: call(slice(row, row + 1))) for row, name in enumerate(NAMES)]
        )
        assert not torch.allclose(expected, alone(model, None, lambda: call(slice(None))))
        peft_multibatch.enable(model)
        assert_close(call(slice(None), adapter_ids=NAMES), expected)
        with pytest.raises(errors.AdapterIdsLengthError, match="3 entries for a batch of 4 samples"):
            call(slice(None), adapter_ids=NAMES[:3])
