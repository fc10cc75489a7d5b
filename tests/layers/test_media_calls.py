"""Calls in which rows of images or audio could get another sample's adapter without an error."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from media import FAMILIES, RANKS, Family, Part, clips
from mixtures import several
from models import alone
from peft import LoraConfig, get_peft_model
from tolerances import assert_close
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.calls.batch_plan import BatchPlan


IDS = ["a", "b"]
GREEDY = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def family_of(name, counts):
    """The same family with other numbers of images."""
    known = FAMILIES[name]
    return Family(known.model_type, known.media, known.kind, known.join, counts)


def logits(model, inputs, **ids):
    """What a model returns for the tokens of each sample."""
    with torch.no_grad():
        found = model(**inputs, **ids).logits
    return [row[mask.bool()] for row, mask in zip(found, inputs["attention_mask"])]


def expected(family, model, ids=IDS):
    parts = family.samples()
    return [
        several(model, entry, lambda part=part: logits(model, family.batch([part]))[0])
        for entry, part in zip(ids, parts)
    ]


def assert_all_close(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        assert_close(one, other)


class OtherThread:
    """Calls a function on another thread, and waits for it, when this object is freed."""

    def __init__(self, function):
        self.function = function

    def __del__(self):
        thread = threading.Thread(target=self.function)
        thread.start()
        thread.join()


def test_threads_with_the_same_ids_and_other_images():
    """They share the plan of their ids; here, another thread asks it for its own images while an old one is freed."""
    adapters = {number: SimpleNamespace(slot=number, is_plain=True, serial=number) for number in (0, 1)}
    plan = BatchPlan([0, 1], adapters, 2)
    others = []
    for first in range(1, 12):
        found = plan.of_runs(((0, first), (1, 1)))
        assert found.entries == [0] * first + [1]
        found.products["freed"] = OtherThread(lambda: others.append(plan.of_runs(((0, 1), (1, 3))).entries))
        del found
    assert others
    assert all(entries == [0, 1, 1, 1] for entries in others)


@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-Audio"])
def test_mixtures_with_the_same_first_adapter(name):
    family = family_of(name, (3, 1))
    model = family.model()
    ids = [{"a": 0.7, "b": 0.3}, {"a": 0.7, "c": 0.3}]
    wanted = expected(family, model, ids)
    peft_multibatch.enable(model)
    assert_all_close(logits(model, family.batch(family.samples()), adapter_ids=ids), wanted)


@pytest.mark.parametrize(("name", "counts"), [("LLaVA", (2, 1)), ("LLaVA", (3, 3)), ("LLaVA-NeXT", (1, 2))])
def test_positions_that_images_share(name, counts):
    """An encoder looks up one row of positions for all of its images."""
    family = family_of(name, counts)
    model = family.model(targets=".*(position_embedding|q_proj)")
    wanted = expected(family, model)
    peft_multibatch.enable(model)
    assert_all_close(logits(model, family.batch(family.samples()), adapter_ids=IDS), wanted)


class Wrapper(nn.Module):
    """A model that passes its inputs on under other names, as users' own modules do."""

    def __init__(self, inner):
        super().__init__()
        self.vision_language = inner

    def forward(self, tokens, pixels, mask, **others):
        return self.vision_language(input_ids=tokens, pixel_values=pixels, attention_mask=mask, **others)


@pytest.mark.parametrize(
    ("name", "counts"), [("LLaVA", (2, 0)), ("LLaVA", (3, 1)), ("Qwen2-VL", (2, 1)), ("Idefics3", (3, 1))]
)
def test_model_inside_another_module(name, counts):
    family = family_of(name, counts)
    inner = family.model().unload()
    model = None
    for adapter, rank in RANKS.items():
        config = LoraConfig(r=rank, target_modules=r".*(q_proj|v_proj|qkv|fc1|linear_1)", init_lora_weights=False)
        if model is None:
            model = get_peft_model(Wrapper(inner), config, adapter_name=adapter)
        else:
            model.add_adapter(adapter, config)
    model.eval()

    def call(given, **ids):
        inputs = family.batch(given)
        tokens, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        with torch.no_grad():
            found = model(tokens, inputs.pop("pixel_values", None), mask, **inputs, **ids).logits
        return [row[each.bool()] for row, each in zip(found, mask)]

    parts = family.samples()
    wanted = [alone(model, entry, lambda part=part: call([part])[0]) for entry, part in zip(IDS, parts)]
    peft_multibatch.enable(model)
    assert_all_close(call(parts, adapter_ids=IDS), wanted)


@pytest.mark.parametrize(("name", "counts"), [("LLaVA", (2, 0)), ("Qwen2-VL", (2, 1))])
def test_prompts_without_their_name(name, counts):
    family = family_of(name, counts)
    model = family.model()
    parts = family.samples()

    def generate(through, given, **ids):
        inputs = family.batch(given)
        output = through.generate(
            inputs.pop("input_ids"), **inputs, **GREEDY, **ids, return_dict_in_generate=True, output_logits=True
        )
        return output.logits[0]

    wanted = [alone(model, entry, lambda part=part: generate(model, [part])[0]) for entry, part in zip(IDS, parts)]
    forward = expected(family, model)
    mb = peft_multibatch.enable(model)
    for through in (model, model.get_base_model()):
        assert_all_close(generate(through, parts, adapter_ids=IDS), wanted)
        with mb.batch(IDS):
            assert_all_close(generate(through, parts), wanted)
        inputs = family.batch(parts)
        mask = inputs["attention_mask"]
        with torch.no_grad():
            found = through(inputs.pop("input_ids"), **inputs, adapter_ids=IDS).logits
        assert_all_close([row[each.bool()] for row, each in zip(found, mask)], forward)


@pytest.mark.skipif(
    not hasattr(GenerationMixin, "_expand_multimodal_outputs"), reason="older transformers encode images in forward"
)
@pytest.mark.parametrize(("first", "second"), [((2, 0), (0, 2)), ((1, 2), (2, 1)), ((1, 1), (0, 1))])
def test_images_after_a_cached_turn(first, second):
    """The whole conversation, with the images of its second turn."""
    family, later = family_of("LLaVA", first), family_of("LLaVA", second)
    model = family.model()
    later.tiny = family.tiny

    def converse(**ids):
        options = {**GREEDY, **ids, "return_dict_in_generate": True}
        inputs = family.batch(family.samples())
        before = model.generate(**inputs, **options)
        more = later.batch(later.samples())
        tokens = torch.cat([before.sequences, more.pop("input_ids")], 1)
        new = torch.ones(len(tokens), 1, dtype=torch.long)
        mask = torch.cat([inputs["attention_mask"], new, more.pop("attention_mask")], 1)
        name = "cache" if "cache" in before else "past_key_values"
        more = {**more, "input_ids": tokens, "attention_mask": mask, name: before[name]}
        return model.generate(**more, **options, output_logits=True).logits[0]

    wanted = [alone(model, entry, lambda row=row: converse()[row]) for row, entry in enumerate(IDS)]
    peft_multibatch.enable(model)
    assert_all_close(converse(adapter_ids=IDS), wanted)


@pytest.mark.parametrize("copies", [None, ["patch_conv"]], ids=["LoRA", "copies"])
@pytest.mark.parametrize("counts", [(3, 1), (2, 1)])
def test_whole_images_among_patches(counts, copies):
    """Pixtral's first layer sees images, and the others see their patches: as many of one image as of several."""
    sizes = {1: [(24, 32)], 2: [(16, 24), (16, 24)], 3: [(16, 16)] * 3}  # 12 patches each

    def media(family, generator, count):
        pixels = torch.randn(count, 3, 32, 32, generator=generator)
        for image, (height, width) in zip(pixels, sizes[count]):
            image[:, height:] = image[:, :, width:] = 0
        tokens = [height * width // 64 for height, width in sizes[count]]
        return Part(tokens, {"pixel_values": pixels, "image_sizes": torch.tensor(sizes[count])})

    family = Family(FAMILIES["LLaVA with Pixtral"].model_type, media, counts=counts)
    model = family.model(copies or (), targets=r".*q_proj" if copies else r".*(q_proj|patch_conv)")
    wanted = expected(family, model)
    peft_multibatch.enable(model)
    assert_all_close(logits(model, family.batch(family.samples()), adapter_ids=IDS), wanted)


def gradients(family, model, given, call):
    weights = {key: each for key, each in model.named_parameters() if "lora_" in key}
    for each in weights.values():
        each.requires_grad_(True)
    inputs = family.batch(given)
    loss = sum((row[mask.bool()] ** 2).sum() for row, mask in zip(call(inputs), inputs["attention_mask"]))
    found = torch.autograd.grad(loss, [*weights.values()], allow_unused=True, materialize_grads=True)
    return dict(zip(weights, found))


def assert_gradients(family, model, plain, mixed):
    """Compare gradients of a batch with the sum of those of its samples."""
    parts = family.samples()
    wanted: dict[str, torch.Tensor] = {}
    for entry, part in zip(IDS, parts):
        for key, each in alone(model, entry, lambda part=part: gradients(family, model, [part], plain)).items():
            wanted[key] = wanted.get(key, 0) + each
    mb = peft_multibatch.enable(model)
    found = gradients(family, model, parts, lambda inputs: mixed(mb, inputs))
    assert any(wanted[key].any() for key in wanted if "language_model" not in key)
    for key, each in found.items():
        assert_close(each, wanted[key])


def test_checkpoints_of_an_encoder_without_a_method():
    """The model calls the layers of Qwen2-Audio's encoder directly, and backward runs them again."""
    family = Family("qwen2_audio", clips, "audio", counts=(2, 1))
    model = family.model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert_gradients(
        family,
        model,
        lambda inputs: model(**inputs).logits,
        lambda mb, inputs: model(**inputs, adapter_ids=IDS).logits,
    )


@pytest.mark.parametrize(("name", "counts"), [("LLaVA", (2, 0)), ("Qwen2-VL", (2, 1))])
def test_checkpoint_of_a_part_of_the_model(name, counts):
    family = family_of(name, counts)
    model = family.model()
    inner = model.get_base_model().model

    def call(inputs):
        run = lambda *values: inner(**dict(zip(inputs, values))).last_hidden_state  # noqa: E731
        return checkpoint(run, *inputs.values(), use_reentrant=False)

    def mixed(mb, inputs):
        with mb.batch(IDS):
            return call(inputs)

    assert_gradients(family, model, call, mixed)


def test_images_of_samples_without_texts():
    """Idefics3 pads the images of each sample to one number, and encodes only those that are there."""
    family = family_of("Idefics3", (2, 0))
    model = family.model()
    pixels = family.batch(family.samples())["pixel_values"]
    mb = peft_multibatch.enable(model)
    with mb.batch(IDS), pytest.raises(errors.RowMappingError, match="outside of a call of the whole model"):
        model.get_base_model().get_image_features(pixels)


def test_features_that_are_not_in_proportion():
    """Video-LLaMA 3's images may be merged differently: here, the 16 patches of one become as many features as 64."""
    counts = (1, 2)
    merges, tokens = {1: [1], 2: [2, 2]}, {1: [16], 2: [4, 4]}

    def media(family, generator, count):
        width = family.tiny.recipe.specs["pixel_values"].shape[-1]
        inputs = {
            "pixel_values": torch.randn(16 * count, width, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * count),
            "image_merge_sizes": torch.tensor(merges[count]),
        }
        return Part(tokens[count], inputs)

    family = Family("video_llama_3", media, counts=counts)
    model = family.model()
    inputs = family.batch(family.samples())
    logits(model, inputs)
    peft_multibatch.enable(model)
    with pytest.raises(errors.RowMappingError, match=r"that became .* features"):
        model(**inputs, adapter_ids=IDS)
