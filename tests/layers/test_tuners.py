"""Every tuner in `layers.TUNERS`, in mixed batches against PEFT, one adapter at a time; all others are refused."""

from __future__ import annotations

import peft
import pytest
import torch
from models import alone, base_model, left_padded, row_by_row
from peft import LoraConfig, PeftMixedModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from tolerances import assert_close, relative_error

import peft_multibatch
from peft_multibatch.layers.table import TUNERS


NAMES = ["one", "two", "__base__", "two", "one"]

KNOWN = {kind.value.lower() for kind in PEFT_TYPE_TO_TUNER_MAPPING}  # tuners of the installed PEFT

# What a tuner's config needs in addition to, or instead of, the target modules q_proj and down_proj of a tiny Llama.
OPTIONS = {
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 30},
    "ia3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "ln_tuning": {"target_modules": ["input_layernorm"]},
    "miss": {"r": 8},
    "oft": {"oft_block_size": 4},
    "pvera": {"r": 8},
    "randlora": {"r": 4},
    "road": {"group_size": 8},
    "shira": {"r": 2},
    "trainable_tokens": {"target_modules": ["embed_tokens"], "token_indices": [3, 5, 8, 13]},
    "vblora": {"vector_length": 8, "num_vectors": 16, "topk": 2},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 30},
}


def perturb(model, names=("one", "two")):
    """Change every weight, because new adapters have no effect."""
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if any(name in key.split(".") for name in names) and parameter.is_floating_point():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def build(tuner):
    (kind,) = [kind for kind in PEFT_TYPE_TO_TUNER_MAPPING if kind.value.lower() == tuner]
    options = {"target_modules": ["q_proj", "down_proj"], **OPTIONS.get(tuner, {})}
    model = get_peft_model(base_model(), PEFT_TYPE_TO_CONFIG_MAPPING[kind](**options), adapter_name="one")
    model.add_adapter("two", PEFT_TYPE_TO_CONFIG_MAPPING[kind](**options))
    perturb(model)
    return model.eval()


@pytest.mark.filterwarnings("ignore::UserWarning")  # tuners warn about their own options
@pytest.mark.parametrize("tuner", [tuner for tuner in TUNERS if tuner in KNOWN])
def test_tuners(tuner):
    model, inputs = build(tuner), left_padded(len(NAMES))
    with torch.no_grad():
        expected = torch.cat(row_by_row(model, NAMES, inputs, lambda row: model(**row).logits))
        first, second = (alone(model, name, lambda: model(**inputs).logits) for name in ("one", "two"))
        base = alone(model, None, lambda: model(**inputs).logits)
        assert min(relative_error(first, second), relative_error(first, base), relative_error(second, base)) > 0.005
        mb = peft_multibatch.enable(model)
        assert mb.adapter_names == ["one", "two"]
        assert_close(model(**inputs, adapter_ids=NAMES).logits, expected)
        options = {"max_new_tokens": 3, "do_sample": False}
        tokens = model.generate(**inputs, adapter_ids=NAMES, **options)
        mb.disable()
        assert torch.equal(
            tokens, torch.cat(row_by_row(model, NAMES, inputs, lambda r: model.generate(**r, **options)))
        )


def test_every_tuner_of_peft_is_supported_or_refused():
    """A tuner of a new version of PEFT is refused until it has been examined."""
    refused = {
        "adalora",  # only one trainable adapter at a time, and ranks that change during training
        "adamss",  # needs scikit-learn
        "adaption_prompt", "cartridge", "cpt", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "prompt_tuning",
        "lily",  # weights its experts by the mean over all rows of a batch
        "poly",  # needs task ids
        "shadow",  # runs a second model next to the first
        "xlora",  # mixes adapters by itself
    }  # fmt: skip
    assert KNOWN - set(TUNERS) <= refused


def test_prompt_methods_are_refused():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(
        peft_multibatch.UnsupportedError, match="has the PEFT type PREFIX_TUNING: expected LoRA, or a tuner"
    ):
        peft_multibatch.enable(get_peft_model(base_model(), config))


def test_a_model_that_mixes_tuners():
    model = PeftMixedModel(base_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), "one")
    model.add_adapter("two", peft.LoHaConfig(r=4, target_modules=["down_proj"], init_weights=False))
    model.eval()
    inputs = left_padded(len(NAMES))
    with torch.no_grad():
        expected = torch.cat(row_by_row(model, NAMES, inputs, lambda row: model(**row).logits))
        mb = peft_multibatch.enable(model)
        assert {entry.how for entry in mb.report()} == {"segmented", "per segment"}
        assert_close(model(**inputs, adapter_ids=NAMES).logits, expected)


def test_two_tuners_on_one_layer_are_refused():
    model = PeftMixedModel(base_model(), LoraConfig(target_modules=["q_proj"]), "one")
    model.add_adapter("two", peft.LoHaConfig(target_modules=["q_proj"]))
    with pytest.raises(peft_multibatch.UnsupportedError, match="two tuners on one layer"):
        peft_multibatch.enable(model)
