"""Adapters in parts that encode images or audio: each image runs under its own sample's adapter, as PEFT alone."""

from __future__ import annotations

import pickle

import pytest
import torch
from media import FAMILIES, Family, clips
from mixtures import several
from models import alone
from peft import LoraConfig
from tolerances import assert_close
from transformers import GenerationMixin

import peft_multibatch
from peft_multibatch import errors


pytestmark = pytest.mark.filterwarnings("ignore:.hidden_state. is deprecated")  # Mllama's own, in older transformers


IDS = {
    "side by side": ["a", "a", "b", "b", "c"],
    "mixed": ["b", "a", "c", "b", "a"],
    "base": ["a", "__base__", "__base__", "c", "a"],
    "mixtures": [{"a": 0.7, "b": 0.3}, "a", {"a": 0.7, "b": 0.3}, "c", {"c": 2.0}],
}
MIX = IDS["base"]
NUMBERS = {"a": 0, "b": 1, "c": 2, "__base__": -1}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def rows(output, inputs):
    """What a model returns for the tokens of each sample."""
    found = output.embeddings if "embeddings" in output else output.logits
    return [row[mask.bool()] for row, mask in zip(found, inputs["attention_mask"])]


def run(model, inputs, **ids):
    with torch.no_grad():
        return rows(model(**inputs, **ids), inputs)


def test_every_sample_as_alone(family):
    model = family.model()
    parts = family.samples()
    batch = family.batch(parts)

    def reference(sample, entry):
        entry = -1 if entry == "__base__" else entry
        if family.mixes:
            return several(model, entry, lambda: run(model, batch))[sample]
        return several(model, entry, lambda: run(model, family.batch([parts[sample]]))[0])

    expected = {kind: [reference(*pair) for pair in enumerate(ids)] for kind, ids in IDS.items()}
    mb = peft_multibatch.enable(model)
    assert not [layer for layer in mb._layers.values() if layer.refusal]
    for kind, ids in IDS.items():
        found = run(model, batch, adapter_ids=ids)
        for actual, wanted in zip(found, expected[kind]):
            assert_close(actual, wanted)
        numbers = [NUMBERS[each] if isinstance(each, str) else each for each in ids]
        for actual, wanted in zip(run(model, batch, adapter_ids=numbers), found):
            assert torch.equal(actual, wanted)


def test_images_of_one_sample_change_no_other_sample(family):
    """At any layer: no row changes with the images of two samples."""
    model = family.model()
    mb = peft_multibatch.enable(model)
    seen: list[tuple[str, torch.Tensor]] = []
    for layer in mb._layers.values():
        layer.module.register_forward_hook(
            lambda module, args, output, name=layer.name: seen.append((name, output.flatten(0, -2)))
        )

    def look(changed):
        seen.clear()
        found = run(model, family.batch(family.samples(changed)), adapter_ids=MIX)
        return found, list(seen)

    before, layers = look(None)
    changes: list[list[torch.Tensor]] = [[] for _ in layers]
    for sample, count in enumerate(family.counts):
        after, others = look(sample)
        for other, (one, two) in enumerate(zip(before, after)):
            assert torch.equal(one, two) == (other != sample or not count), (sample, other)
        for change, (_, one), (_, two) in zip(changes, layers, others):
            change.append((one != two).any(-1))
    for (name, _), change in zip(layers, changes):
        assert (torch.stack(change).sum(0) <= 1).all(), name
    encoded = [change for (name, _), change in zip(layers, changes) if "language_model" not in name]
    assert any(torch.stack(change).any() for change in encoded)


@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL", "Mistral 3", "Qwen2-Audio"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": False}], ids=["beams", "greedy"])
def test_generate(name, options):
    if "num_beams" in options and not hasattr(GenerationMixin, "_expand_multimodal_outputs"):
        pytest.skip("older transformers repeat images for beams, and not samples")
    family = FAMILIES[name]
    if name == "Qwen2-Audio":  # of which generate repeats clips for beams, and not samples
        family = Family("qwen2_audio", clips, "audio", counts=(1, 0, 1, 1, 1))
    model = family.model()
    parts = family.samples()
    options = {**options, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}

    def generate(given, **ids):
        with torch.no_grad():
            return model.generate(**family.batch(given), **options, **ids)[:, -5:].tolist()

    expected = [alone(model, entry, lambda part=part: generate([part])[0]) for entry, part in zip(MIX, parts)]
    peft_multibatch.enable(model)
    assert generate(parts, adapter_ids=MIX) == expected


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL", "Mistral 3", "Idefics3"])
def test_gradients(name, is_checkpointed):
    family = FAMILIES[name]
    model = family.model()
    if is_checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    parts = family.samples()
    weights = {key: each for key, each in model.named_parameters() if "lora_" in key}

    def gradients(given, **ids):
        for each in weights.values():
            each.requires_grad_(True)
        batch = family.batch(given)
        loss = sum((row**2).sum() for row in rows(model(**batch, **ids), batch))
        found = torch.autograd.grad(loss, [*weights.values()], allow_unused=True, materialize_grads=True)
        return dict(zip(weights, found))

    expected = {key: torch.zeros_like(each) for key, each in weights.items()}
    for entry, part in zip(MIX, parts):
        if entry != "__base__":
            for key, each in alone(model, entry, lambda part=part: gradients([part])).items():
                expected[key] += each
    peft_multibatch.enable(model)
    found = gradients(parts, adapter_ids=MIX)
    assert any(expected[key].any() for key in weights if "language_model" not in key)
    for key, each in found.items():
        assert_close(each, expected[key])


@pytest.mark.parametrize(("name", "module"), [("LLaVA", "multi_modal_projector"), ("Qwen2-VL", "merger")])
def test_copies_of_modules(name, module):
    """`modules_to_save` in a part that encodes images."""
    family = FAMILIES[name]
    model = family.model(modules_to_save=[module], leave_out=rf".*{module}.*")
    parts = family.samples()
    expected = [
        alone(model, entry, lambda part=part: run(model, family.batch([part]))[0]) for entry, part in zip(MIX, parts)
    ]
    peft_multibatch.enable(model)
    for actual, wanted in zip(run(model, family.batch(parts), adapter_ids=MIX), expected):
        assert_close(actual, wanted)


def test_compiled():
    """What encodes images runs uncompiled, the text compiled."""
    family = FAMILIES["Qwen2-VL"]
    model = family.model()
    batch = family.batch(family.samples())
    mb = peft_multibatch.enable(model)
    expected = run(model, batch, adapter_ids=MIX)
    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model(), backend="eager")
    with mb.batch(MIX):
        found = run(compiled, batch)
    for actual, wanted in zip(found, expected):
        assert_close(actual, wanted)


def test_adapters_of_the_text_run_where_nothing_tells_the_sample_of_an_image():
    family = FAMILIES["LLaVA"]
    model = family.model()
    model.add_adapter("text", LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False))
    model.eval()
    batch = family.batch(family.samples())
    embeddings = model.get_input_embeddings()
    inner = model.get_base_model()
    mb = peft_multibatch.enable(model)
    text = ["text", "__base__", "text", "text", "__base__"]
    expected = run(model, batch, adapter_ids=text)
    with torch.no_grad():
        ids = batch.pop("input_ids")
        batch["inputs_embeds"] = embeddings(ids)
    for actual, wanted in zip(run(model, batch, adapter_ids=text), expected):
        assert_close(actual, wanted)
    with pytest.raises(errors.RowMappingError, match=r"doesn't tell the sample of each image: expected .* input_ids"):
        model(**batch, adapter_ids=MIX)
    for actual, wanted in zip(run(model, batch, adapter_ids=["a"] * 5), run_alone(model, mb, "a", batch)):
        assert_close(actual, wanted)
    mb = peft_multibatch.enable(model)
    pixels = batch["pixel_values"]
    with mb.batch(MIX), pytest.raises(errors.AdapterIdsLengthError):
        inner.get_image_features(pixels)
    with mb.batch(MIX), torch.no_grad():  # an id for each image
        found = inner.get_image_features(pixels[:5]).pooler_output
    mb.disable()
    for row, entry in enumerate(MIX):
        wanted = alone(model, entry, lambda row=row: inner.get_image_features(pixels[row : row + 1]).pooler_output)
        assert_close(found[row], wanted[0])


def run_alone(model, mb, name, batch):
    mb.disable()
    return alone(model, name, lambda: run(model, batch))


def test_wrong_numbers_of_placeholders():
    """The first sample has the tokens of one image and a half."""
    family = FAMILIES["LLaVA"]
    model = family.model()
    batch = family.batch(family.samples())
    number = family.samples()[0].tokens[0]
    tokens = batch["input_ids"]
    (places,) = torch.where(tokens[0] == family.tiny.recipe.tokens["image"])
    tokens[0, places[-number // 2 :]] = 7
    peft_multibatch.enable(model)
    with pytest.raises(errors.RowMappingError, match=r"doesn't tell the sample of each image"):
        model(**batch, adapter_ids=MIX)


def test_videos_behind_the_token_of_images():
    """GLM-4V marks frames of videos with the token of images, so that none of the text's tokens stand for videos."""
    family = FAMILIES["GLM-4V"]
    model = family.model()
    batch = family.batch(family.samples())
    batch["pixel_values_videos"], batch["video_grid_thw"] = batch.pop("pixel_values"), batch.pop("image_grid_thw")
    batch["mm_token_type_ids"] = batch["mm_token_type_ids"] * 2
    mb = peft_multibatch.enable(model)
    with pytest.raises(errors.RowMappingError, match=r"without the token .* doesn't tell the sample of each video"):
        run(model, batch, adapter_ids=MIX)
    found = run(model, batch, adapter_ids=["a"] * 5)
    for actual, wanted in zip(found, run_alone(model, mb, "a", batch)):
        assert_close(actual, wanted)


def test_everything_is_restored():
    family = FAMILIES["Qwen2-VL"]
    model = family.model()
    inner = model.get_base_model()
    before = {key: {*module.__dict__} for key, module in inner.named_modules()}
    mb = peft_multibatch.enable(model)
    assert "get_image_features" in inner.model.__dict__
    copied = pickle.loads(pickle.dumps(model))
    batch = family.batch(family.samples())
    expected = run(model, batch, adapter_ids=["a"] * 5)
    for actual, wanted in zip(alone(copied, "a", lambda: run(copied, batch)), expected):
        assert_close(actual, wanted)
    mb.disable()
    for key, module in inner.named_modules():
        assert not module.__dict__.pop("_multibatch_encoders", None)
        assert {*module.__dict__} == before[key]


def test_models_without_adapters_there_keep_their_methods():
    family = FAMILIES["LLaVA"]
    model = family.model(leave_out=r".*(vision_tower|multi_modal_projector).*")
    peft_multibatch.enable(model)
    assert "get_image_features" not in model.get_base_model().model.__dict__


def test_types_that_were_not_compared_are_refused_by_name():
    family = FAMILIES["LLaVA"]
    model = family.model()
    model.get_base_model().config.model_type = "llava_that_nobody_tried"
    model.get_base_model().model.config.model_type = "llava_that_nobody_tried"
    with pytest.raises(errors.UnsupportedError, match=r"vision_tower.* is inside the vision or audio part"):
        peft_multibatch.enable(model)


@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL"])
def test_stored_adapters(name, tmp_path):
    family = FAMILIES[name]
    model = family.model()
    model.save_pretrained(tmp_path)
    parts = family.samples()
    expected = [
        alone(model, entry, lambda part=part: run(model, family.batch([part]))[0]) for entry, part in zip(MIX, parts)
    ]
    base = model.unload()
    mb = peft_multibatch.enable(base)
    store = mb.adapter_store("1GB", "1GB")
    for adapter in "abc":
        store.register(adapter, tmp_path / adapter)
    for actual, wanted in zip(run(base, family.batch(parts), adapter_ids=MIX), expected):
        assert_close(actual, wanted)


@pytest.mark.gpu
def test_kernels(family):
    model = family.model().cuda()
    parts = family.samples()

    def moved(given):
        return {key: value.cuda() for key, value in family.batch(given).items()}

    def reference(sample):
        given = moved(parts) if family.mixes else moved([parts[sample]])
        return run(model, given)[sample if family.mixes else 0]

    expected = [alone(model, entry, lambda row=row: reference(row)) for row, entry in enumerate(MIX)]
    mb = peft_multibatch.enable(model)
    assert "triton" in str(mb.report())
    for actual, wanted in zip(run(model, moved(parts), adapter_ids=MIX), expected):
        assert_close(actual, wanted)
