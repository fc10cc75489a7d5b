"""Models with samples in dimension 1: as many samples as positions, beam search and global attention."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import alone, row_by_row
from peft import LoraConfig, get_peft_model
from tolerances import assert_close

import peft_multibatch


NAMES = ["a", "b", "__base__", "b"]
SHARED = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
LED_SIZES = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip


def longformer(cls="LongformerModel"):
    config = transformers.LongformerConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, attention_window=4, **SHARED
    )
    return getattr(transformers, cls)(config)


def led():
    config = transformers.LEDConfig(**LED_SIZES, attention_window=4, decoder_start_token_id=1, **SHARED)
    return transformers.LEDForConditionalGeneration(config)


def fsmt():
    sizes = {**LED_SIZES, "src_vocab_size": 99, "tgt_vocab_size": 99, "langs": ["en", "de"]}
    ends = {"decoder_start_token_id": 1, "forced_eos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return transformers.FSMTForConditionalGeneration(transformers.FSMTConfig(**sizes, **ends))


def xlnet():
    config = transformers.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=48, **SHARED)
    return transformers.XLNetLMHeadModel(config)


def with_adapters(model):
    options = {"init_lora_weights": False, "target_modules": "all-linear"}
    model = get_peft_model(model, LoraConfig(r=3, **options), "a")
    model.add_adapter("b", LoraConfig(r=4, lora_alpha=16, **options))
    return model.eval()


def inputs_of(model, length):
    torch.manual_seed(1)
    inputs = {"input_ids": torch.randint(2, 99, (4, length))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(2, 99, (4, 5))
    if model.config.model_type in ("led", "longformer"):  # positions differ between samples, and so do their numbers
        inputs["global_attention_mask"] = torch.zeros(4, length, dtype=torch.long)
        for row, places in enumerate(([0], [0, 3], [1, 2, 3], [2])):
            inputs["global_attention_mask"][row, places] = 1
    return inputs


@pytest.mark.parametrize("length", [4, 8, 12])
@pytest.mark.parametrize("build", [longformer, led, fsmt, xlnet], ids=lambda build: build.__name__)
def test_as_many_samples_as_positions(build, length):
    torch.manual_seed(0)
    model = with_adapters(build())
    inputs = inputs_of(model, length)
    want = row_by_row(model, NAMES, inputs, lambda row: model(**row)[0])
    peft_multibatch.enable(model)
    assert_close(model(**inputs, adapter_ids=NAMES)[0], torch.cat(want))


@pytest.mark.parametrize("build", [led, fsmt], ids=lambda build: build.__name__)
def test_beams(build):
    torch.manual_seed(0)
    model = with_adapters(build())
    inputs = {key: value for key, value in inputs_of(model, 8).items() if key != "decoder_input_ids"}
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
    want = row_by_row(model, NAMES, inputs, lambda row: model.generate(**row, **options))
    peft_multibatch.enable(model)
    assert torch.equal(model.generate(**inputs, **options, adapter_ids=NAMES), torch.cat(want))


def test_gradients():
    torch.manual_seed(0)
    model = with_adapters(xlnet())
    inputs = inputs_of(model, 8)
    weights = [p for name, p in model.named_parameters() if "lora_" in name]

    def backward(rows, **ids):
        model.set_requires_grad(["a", "b"])  # PEFT freezes all adapters except the active one
        model(**{key: value[rows] for key, value in inputs.items()}, **ids)[0].square().sum().backward()

    for row, name in enumerate(NAMES):
        if name != "__base__":  # it has no gradients
            alone(model, name, lambda row=row: backward(slice(row, row + 1)))
    want = [weight.grad for weight in weights]
    model.zero_grad()
    peft_multibatch.enable(model)
    backward(slice(None), adapter_ids=NAMES)
    for weight, expected in zip(weights, want):
        assert_close(weight.grad, expected)


def test_an_encoder_inside_of_another_model():
    """The outer model's type doesn't determine the order of an encoder's rows."""
    torch.manual_seed(0)
    decoder = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, is_decoder=True,
        add_cross_attention=True, **SHARED,
    )  # fmt: skip
    model = with_adapters(
        transformers.EncoderDecoderModel(encoder=longformer(), decoder=transformers.BertLMHeadModel(decoder))
    )
    inputs = {key: value for key, value in inputs_of(longformer(), 8).items() if key == "input_ids"}
    inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
    want = row_by_row(model, NAMES, inputs, lambda row: model(**row)[0])
    peft_multibatch.enable(model)
    assert_close(model(**inputs, adapter_ids=NAMES)[0], torch.cat(want))
