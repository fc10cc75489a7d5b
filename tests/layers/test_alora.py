"""aLoRA: every sample's adapter starts at its own invocation tokens, as in PEFT, one adapter at a time."""

from __future__ import annotations

import pytest
import torch
from models import base_model, row_by_row
from peft import LoraConfig, get_peft_model
from tolerances import RELATIVE_ERROR, relative_error
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

import peft_multibatch


NAMES = ["a", "plain", "__base__", "b", "a"]
# the invocation tokens of a are 5, 6, those of b are 9; the last row has none
IDS = torch.tensor([[3, 5, 6, 4], [3, 5, 6, 9], [5, 6, 9, 9], [4, 9, 3, 3], [7, 8, 9, 5]])


@pytest.fixture(params=["a", "plain"])
def model(request):
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    options["task_type"] = "CAUSAL_LM"
    model = get_peft_model(base_model(), LoraConfig(alora_invocation_tokens=[5, 6], **options), "a")
    model.add_adapter("b", LoraConfig(alora_invocation_tokens=[9], **options))
    model.add_adapter("plain", LoraConfig(**{**options, "target_modules": ["q_proj", "k_proj"]}))
    model.set_adapter(request.param)  # PEFT computes offsets for the active adapter, which must not affect the rows
    return model.eval()


def test_rows_begin_at_their_own_invocation(model):
    options = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        expected = torch.cat(row_by_row(model, NAMES, {"input_ids": IDS}, lambda row: model(**row).logits))
        rows = row_by_row(model, NAMES, {"input_ids": IDS}, lambda row: model.generate(**row, **options))
        mb = peft_multibatch.enable(model)
        actual = model(input_ids=IDS, adapter_ids=NAMES).logits
        tokens = model.generate(input_ids=IDS, adapter_ids=NAMES, **options)
        with mb.batch(NAMES):
            again = model(input_ids=IDS).logits
    assert relative_error(actual, expected) <= RELATIVE_ERROR[torch.float32]
    assert torch.equal(again, actual)
    assert torch.equal(tokens, torch.cat(rows))


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"prefill_chunk_size": 2}, {"num_return_sequences": 2, "do_sample": True}],
    ids=lambda options: next(iter(options)),
)
def test_what_offsets_from_the_end_do_not_fit_is_refused(model, options):
    peft_multibatch.enable(model)
    with pytest.raises(peft_multibatch.UnsupportedError, match="aLoRA"):
        model.generate(input_ids=IDS, adapter_ids=NAMES, max_new_tokens=3, **options)


def test_layers_by_themselves_and_requests_are_refused(model):
    mb = peft_multibatch.enable(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    with mb.batch(NAMES), pytest.raises(peft_multibatch.UnsupportedError, match="Layers called by themselves"):
        layer(torch.randn(5, 3, 48))
    settings = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64, use_cuda_graph=False)
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    inputs = IDS.tolist()
    outputs = model.generate_batch(
        inputs, generation_config=config, continuous_batching_config=settings, adapter_ids=NAMES
    )
    outputs = list(outputs.values())
    assert ["is an aLoRA" in (output.error or "") for output in outputs] == [True, False, False, True, True]
    assert [len(output.generated_tokens) for output in outputs] == [0, 2, 2, 0, 0]


def test_embeddings_alone_are_refused(model):
    embeds = model.get_input_embeddings()(IDS)
    peft_multibatch.enable(model)
    with pytest.raises(peft_multibatch.UnsupportedError, match="without input_ids"):
        model.get_base_model()(inputs_embeds=embeds, adapter_ids=NAMES)
