"""All ways to generate, with adapters that PEFT loaded and with stored ones: a mixed batch against PEFT, one row at a
time, token for token."""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import EVERY_ARCHITECTURE, SIZES, alone, draws_by_row, left_padded, peft_model, row_by_row
from peft import LoraConfig, PeftModel, get_peft_model
from stored import WEIGHTS
from test_pipelines import PROMPTS, tokenizer
from tolerances import assert_close
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import peft_multibatch
from peft_multibatch import Multibatch, errors
from peft_multibatch.adapters.store.arena import size_class


NAMES = ["three", "__base__", "eight", "four", "eight", "three"]
SHORT = {"max_new_tokens": 6}


class OnlyEven(LogitsProcessor):
    """A row whose tokens have an even sum may only continue with an even token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        is_odd = torch.arange(scores.shape[1]) % 2 == 1
        return scores.masked_fill(is_odd & (input_ids.sum(1, keepdim=True) % 2 == 0), float("-inf"))


class StopsAtMultiplesOfThree(StoppingCriteria):
    eos_token_id = 0  # transformers pads finished rows only if there is an end token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] % 3 == 0


def inner_of(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def settings(form: str) -> Callable[..., Tensor]:
    """`generate` with beam search from a given configuration or from the model's own."""
    beams = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0, **SHORT}
    beams["decoder_start_token_id"] = 0

    def call(model: Any, inputs: dict, **ids: Any) -> Tensor:
        if form == "config":
            return model.generate(**inputs, generation_config=GenerationConfig(**beams), **ids)
        if form == "positional config":
            return inner_of(model).generate(
                inputs["input_ids"],
                GenerationConfig(**beams),
                attention_mask=inputs["attention_mask"],
                **ids,
            )
        inner = inner_of(model)
        before, inner.generation_config = inner.generation_config, GenerationConfig(**beams)
        try:
            return model.generate(**inputs, **ids)
        finally:
            inner.generation_config = before

    return call


def options(copies: int = 1, **chosen: Any) -> Callable[..., Tensor]:
    def call(model: Any, inputs: dict, **ids: Any) -> Tensor:
        with draws_by_row(copies):
            return model.generate(**inputs, **{"do_sample": False, **SHORT, **chosen}, **ids)

    return call


def embedded(model: Any, inputs: dict, **ids: Any) -> Tensor:
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    return model.generate(
        inputs_embeds=embeds, attention_mask=inputs["attention_mask"], do_sample=False, **SHORT, **ids
    )


def processed(model: Any, inputs: dict, **ids: Any) -> Tensor:
    return model.generate(
        **inputs, do_sample=False, **SHORT, logits_processor=LogitsProcessorList([OnlyEven()]), **ids
    )


def stopped(model: Any, inputs: dict, **ids: Any) -> Tensor:
    found = model.generate(
        **inputs, do_sample=False, max_new_tokens=12, stopping_criteria=[StopsAtMultiplesOfThree()], **ids
    )
    return torch.nn.functional.pad(found, (0, 30 - found.shape[1]))


def turns(model: Any, inputs: dict, **ids: Any) -> Tensor:
    """Two turns; the second gets the answer, two more tokens and the cache of the first."""
    options = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, **ids}
    first = model.generate(**inputs, **options)
    said = torch.cat([first.sequences, first.sequences[:, :2] * 0 + 7], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(said[:, inputs["attention_mask"].shape[1] :])], dim=1)
    parameters = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"  # the name in older versions of transformers
    cached = {name: getattr(first, name)}
    second = model.generate(input_ids=said, attention_mask=mask, **cached, **options)
    return second.sequences


def scored(model: Any, inputs: dict, **ids: Any) -> Tensor:
    """Logits of all positions of a prefill, chosen with `logits_to_keep`."""
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=3, **ids).logits
    assert logits.shape[1] == 3
    return logits.argmax(-1)


SAMPLING = {"do_sample": True, "temperature": 1.5, "top_p": 0.95, "top_k": 40}
STATIC = {"cache_implementation": "static", "disable_compile": True}
COMMON = {
    "greedy": options(),
    "sampling": options(**SAMPLING),
    "beams": options(num_beams=3),
    "no cache": options(use_cache=False),
}
MODES = {
    "sampled sequences": options(copies=3, **SAMPLING, num_return_sequences=3),
    "sampling beams": options(copies=1, **SAMPLING, num_beams=3),
    "beams and returned sequences": options(num_beams=4, num_return_sequences=2, length_penalty=0.5),
    "settings of a configuration": settings("config"),
    "settings of a positional configuration": settings("positional config"),
    "settings of the model": settings("model"),
    "embeddings": embedded,
    "static cache": options(**STATIC),
    "static cache and beams": options(**STATIC, num_beams=3),
    "chunked prefill": options(prefill_chunk_size=4),
    "chunked prefill and static cache": options(prefill_chunk_size=4, **STATIC),
    "logits to keep": scored,
    "logits processor": processed,
    "stopping criterion": stopped,
    "turns": turns,
    "guidance": options(guidance_scale=1.7),
    "guidance and beams": options(guidance_scale=1.7, num_beams=3),
    "repetition penalty": options(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=3),
}
# modes that transformers supports only for decoders
DECODERS_ONLY = (
    "chunked prefill", "chunked prefill and static cache", "guidance", "guidance and beams", "logits to keep", "turns",
)  # fmt: skip


def one_row(inputs: dict, row: int) -> dict:
    return {key: value[row : row + 1] for key, value in inputs.items()}


class ByPeft:
    """A model whose adapters PEFT loaded."""

    def __init__(self, reference: PeftModel, folder: Path) -> None:
        self.reference = self.model = reference

    @contextlib.contextmanager
    def enabled(self) -> Iterator[Multibatch]:
        mb = peft_multibatch.enable(self.model)
        try:
            yield mb
        finally:
            mb.disable()

    def evict(self) -> None:
        """Do nothing: PEFT's adapters are always in memory."""


class Stored(ByPeft):
    """The same adapters in the store of a model without PEFT, which has room for all of them and no others."""

    def __init__(self, reference: PeftModel, folder: Path) -> None:
        self.reference, self.model = reference, copy.deepcopy(reference).unload()
        reference.save_pretrained(str(folder), save_embedding_layers=False)
        self.files = [folder / name / WEIGHTS for name in reference.peft_config]

    @contextlib.contextmanager
    def enabled(self) -> Iterator[Multibatch]:
        room = sum(size_class(file.stat().st_size) for file in self.files)
        with super().enabled() as mb:
            self.store = mb.adapter_store(max_host_memory=room, max_device_memory=room)
            for file in self.files:
                self.store.register(file.parent.name, file.parent)
            self.store.register("other", self.files[-1].parent)
            yield mb

    def evict(self) -> None:
        """Load the adapter that was registered last, which evicts another."""
        before = self.store.stats().evictions
        self.store.adapters([len(self.files)])
        assert self.store.stats().evictions > before


def compare(
    loaded: ByPeft,
    inputs: dict,
    call: Callable[..., Tensor],
    names: list[str] = NAMES,
    rows: Callable[[dict, int], dict] = one_row,
) -> None:
    """Outputs with ids as an argument and with active ids, and PEFT's outputs for every row alone."""
    model, reference = loaded.model, loaded.reference
    expected = torch.cat(
        [alone(reference, name, lambda row=row: call(reference, rows(inputs, row))) for row, name in enumerate(names)]
    )
    with loaded.enabled() as mb:
        assert torch.equal(call(model, inputs, adapter_ids=names), expected)
        loaded.evict()
        with mb.batch(names):
            assert torch.equal(call(model, inputs), expected)
        # the comparison proves nothing if other adapters give the same outputs
        others = call(model, inputs, adapter_ids=[*names[1:], names[0]])
        assert (others != expected).unflatten(0, (len(names), -1)).flatten(1).any(1).sum() >= len(names) // 2


@pytest.fixture(scope="module", params=[ByPeft, Stored], ids=["peft", "store"])
def load(request, tmp_path_factory):
    return lambda model: request.param(model, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module", params=EVERY_ARCHITECTURE)
def loaded(request, load):
    return load(peft_model(request.param))


@pytest.fixture(scope="module")
def llama(load):
    return load(peft_model("llama"))


@pytest.fixture(scope="module")
def t5(load):
    return load(peft_model("t5"))


@pytest.mark.parametrize("mode", COMMON)
def test_every_architecture(loaded, mode):
    compare(loaded, left_padded(), COMMON[mode])


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(llama, mode):
    compare(llama, left_padded(), MODES[mode])


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in DECODERS_ONLY])
def test_every_mode_of_an_encoder_decoder(t5, mode):
    compare(t5, left_padded(), MODES[mode])


@pytest.mark.parametrize("mode", ["static cache", "static cache and beams", "chunked prefill"])
@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3"])
def test_sliding_windows(load, architecture, mode):
    """Prompts and answers are longer than the windows."""
    compare(load(peft_model(architecture)), left_padded(), MODES[mode])


@pytest.mark.parametrize("chosen", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_negative_prompts(llama, chosen):
    """The forward without guidance has its own prompts, and the same ids."""
    copies = chosen.get("num_beams", 1)
    negative = left_padded(length=5)["input_ids"].clamp_min(2).repeat_interleave(copies, 0)

    def call(model: Any, inputs: dict, **ids: Any) -> Tensor:
        prompts = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        return options(guidance_scale=1.7, negative_prompt_ids=inputs["negative"], **chosen)(model, prompts, **ids)

    def rows(inputs: dict, row: int) -> dict:
        return one_row(left_padded(), row) | {"negative": inputs["negative"][row * copies : (row + 1) * copies]}

    compare(llama, left_padded() | {"negative": negative}, call, rows=rows)


@pytest.mark.parametrize("kind", ["quanto", "hqq"])
def test_quantized_cache(llama, kind):
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[kind])
    settings = {"backend": kind, "nbits": 4, "residual_length": 4, "q_group_size": 12}
    if kind == "hqq":
        settings |= {"axis_key": 1, "axis_value": 1}

    def call(model: Any, inputs: dict, **ids: Any) -> Tensor:
        own = {**settings}  # transformers 5.17 removes the backend from it
        return options(cache_implementation="quantized", cache_config=own)(model, inputs, **ids)

    compare(llama, left_padded(), call)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["argument", "config"])
def test_offloaded_cache_is_refused(load, form):
    """On an H100, a row of a greedy batch got different tokens than with PEFT; the cause is unknown."""
    loaded = load(peft_model("llama").cuda())
    inputs = {key: value.cuda() for key, value in left_padded().items()}
    chosen: dict[str, Any] = {"cache_implementation": "offloaded"}
    if form == "config":
        chosen = {"generation_config": GenerationConfig(max_new_tokens=4, **chosen)}
    with loaded.enabled(), pytest.raises(errors.UnsupportedError, match="an offloaded cache on a GPU"):
        loaded.model.generate(**inputs, adapter_ids=NAMES, **chosen)


@contextlib.contextmanager
def logits_of(model: Any) -> Iterator[list[Tensor]]:
    """The logits of all forward passes of a model."""
    found: list[Tensor] = []
    with inner_of(model).lm_head.register_forward_hook(lambda _, __, logits: found.append(logits.clone())):
        yield found


@pytest.mark.parametrize(
    "chosen",
    [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}],
    ids=["prompt lookup", "early exit"],
)
def test_drafts_of_the_model_itself(llama, chosen):
    """The number of forward passes equals PEFT's: drafts come from the row's own adapter as well."""
    inputs = {key: value.repeat(1, 2) for key, value in one_row(left_padded(), 0).items()}
    call = options(**chosen)
    with logits_of(llama.reference) as theirs:
        expected = alone(llama.reference, "eight", lambda: call(llama.reference, inputs))
    with llama.enabled(), logits_of(llama.model) as ours:
        assert torch.equal(call(llama.model, inputs, adapter_ids=["eight"]), expected)
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("assistant_ids", ["not enabled", None, ["three"]], ids=str)
def test_an_assistant_has_ids_of_its_own(load, llama, assistant_ids):
    """The assisted model's ids don't apply to the assistant. Without ids of its own it runs under its active adapter,
    which it doesn't have if its adapters are stored."""
    assistant = load(peft_model("llama"))
    assistant.reference.set_adapter("four")
    active = "four" if isinstance(assistant.model, PeftModel) else "__base__"
    own = assistant_ids[0] if isinstance(assistant_ids, list) else active

    def call(model: Any, assistant: Any, **ids: Any) -> tuple[Tensor, list[Tensor]]:
        with logits_of(assistant) as drafts:
            found = options(assistant_model=inner_of(assistant))(model, one_row(left_padded(), 0), **ids)
        return found, drafts

    models = llama.reference, assistant.reference
    expected, theirs = alone(models[1], own, lambda: alone(models[0], "eight", lambda: call(*models)))
    with llama.enabled(), contextlib.ExitStack() as blocks:
        if assistant_ids != "not enabled":
            mb = blocks.enter_context(assistant.enabled())
            blocks.enter_context(mb.batch(assistant_ids) if assistant_ids else contextlib.nullcontext())
        actual, ours = call(llama.model, assistant.model, adapter_ids=["eight"])
    assert torch.equal(actual, expected)
    assert len(ours) == len(theirs) > 1
    for mine, yours in zip(ours, theirs):
        assert_close(mine, yours)


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.tokens.append(value.reshape(6, -1))

    def end(self) -> None:
        self.tokens = [torch.cat(self.tokens, dim=1)]


def test_a_streamer_in_a_thread(llama):
    """A thread doesn't inherit the ids of the block that it was started in; its call passes its own."""

    def call(model: Any, inputs: dict, **ids: Any) -> Tensor:
        return model.generate(**inputs, **SHORT, do_sample=False, **ids)

    expected = torch.cat(row_by_row(llama.reference, NAMES, left_padded(), lambda row: call(llama.reference, row)))
    streamer = Kept()
    chosen = {"inputs": left_padded(), "streamer": streamer, "adapter_ids": NAMES}
    with llama.enabled():
        thread = threading.Thread(target=call, args=[llama.model], kwargs=chosen)
        thread.start()
        thread.join(timeout=60)
    assert torch.equal(streamer.tokens[0], expected)


def looks_ahead(model: Any, input_ids: Tensor, generation_config: Any, **kwargs: Any) -> Tensor:
    """Run two continuations of every row, side by side in one forward, as contrastive search does."""
    logits = model(input_ids=input_ids, attention_mask=(input_ids > 0).long()).logits[:, -1]
    for _ in range(4):
        tokens = logits.topk(2).indices.flatten()
        longer = torch.cat([input_ids.repeat_interleave(2, 0), tokens[:, None]], dim=1)
        ahead = model(input_ids=longer, attention_mask=(longer > 0).long()).logits[:, -1].unflatten(0, (-1, 2))
        best = ahead.amax(-1).argmax(-1, keepdim=True)
        input_ids = longer.unflatten(0, (-1, 2)).take_along_dim(best[..., None], 1).squeeze(1)
        logits = ahead.take_along_dim(best[..., None], 1).squeeze(1)
    return input_ids


def test_custom_generate(llama):
    def call(model: Any, inputs: dict, **ids: Any) -> Tensor:
        return model.generate(**inputs, custom_generate=looks_ahead, **SHORT, **ids)

    compare(llama, left_padded(), call)


def tiles(model: Any, input_ids: Tensor, generation_config: Any, **kwargs: Any) -> Tensor:
    """Run two continuations of every row, all first ones before all second ones."""
    return model(input_ids=torch.cat([input_ids, input_ids])).logits[: len(input_ids)].argmax(-1)


def turns(model: Any, input_ids: Tensor, generation_config: Any, **kwargs: Any) -> Tensor:
    """Sort rows from the longest to the shortest, as some loops do."""
    return model(input_ids=input_ids.flip(0)).logits.argmax(-1).flip(0)


@pytest.mark.parametrize("function", [tiles, turns])
def test_custom_generate_in_another_order(llama, function):
    model = llama.model
    message = "start with the prompt of another one of the 6 samples: expected the rows of each sample next to"
    with llama.enabled() as mb:
        with pytest.raises(errors.RowMappingError, match=message):
            model.generate(**left_padded(), custom_generate=function, adapter_ids=NAMES, **SHORT)
        with mb.batch(NAMES), pytest.raises(errors.RowMappingError, match=message):
            model.generate(left_padded()["input_ids"], custom_generate=function, **SHORT)
        same = left_padded()["input_ids"][:1].expand(2, -1)
        assert model.generate(same, custom_generate=turns, adapter_ids=[0, 0], **SHORT).shape == same.shape


def test_custom_generate_from_a_folder(llama, tmp_path, monkeypatch):
    """It gets every argument of `generate` except the ids, which are already active."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(
        "def generate(model, input_ids, attention_mask, num_beams=None, **kwargs):\n"
        "    assert 'adapter_ids' not in kwargs\n"
        "    return model.generate(input_ids, attention_mask=attention_mask, num_beams=num_beams, max_new_tokens=5)\n"
    )

    def call(model: Any, inputs: dict, **ids: Any) -> Tensor:
        return model.generate(**inputs, custom_generate=str(tmp_path), trust_remote_code=True, num_beams=2, **ids)

    compare(llama, left_padded(), call)


def test_continuous_batching_through_generate_is_refused(llama):
    inner, message = inner_of(llama.model), "while adapter ids per sample are active"
    with llama.enabled() as mb:
        with pytest.raises(errors.UnsupportedError, match=message):
            inner.generate(**left_padded(), cache_implementation="paged", adapter_ids=NAMES)
        with mb.batch(NAMES), pytest.raises(errors.UnsupportedError, match=message):
            inner.generate(**left_padded(), cache_implementation="paged")


def test_a_pipeline(llama):
    """test_pipelines.py has more of them."""

    def call(model: Any, inputs: dict, **ids: Any) -> Tensor:
        writer = transformers.pipeline("text-generation", model=inner_of(model), tokenizer=tokenizer())
        chosen = {"max_new_tokens": 5, "do_sample": False, "return_tensors": True}
        found = writer(inputs["texts"], batch_size=6, **chosen, **ids)
        return torch.tensor([each[0]["generated_token_ids"][-5:] for each in found])

    compare(llama, {"texts": PROMPTS}, call)


def two_adapters(model: Any, targets: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=32, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(model.eval(), config, "one")
    model.add_adapter("two", config)
    return model.eval()


FEW = ["one", "two", "__base__", "two"]
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
        "decoder_attention_heads": 2, "decoder_ffn_dim": 32}  # fmt: skip


def whisper() -> Any:
    config = transformers.WhisperConfig(
        **TINY, vocab_size=60, num_mel_bins=8, max_source_positions=20, max_target_positions=40, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    model = two_adapters(transformers.WhisperForConditionalGeneration(config), ["q_proj", "v_proj", "fc1"])
    model.get_base_model().generation_config.no_timestamps_token_id = 58
    return model


@pytest.mark.parametrize("chosen", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_whisper_hears_short_audio(load, chosen):
    def call(model: Any, inputs: dict, **ids: Any) -> Tensor:
        said = model.generate(**inputs, do_sample=False, max_new_tokens=6, **chosen, **ids)
        return torch.nn.functional.pad(said, (0, 12 - said.shape[1]))

    compare(load(whisper()), {"input_features": torch.randn(4, 8, 40)}, call, FEW)


def test_whisper_with_long_audio_is_refused(load):
    """Finished samples are dropped from the batch."""
    mask = torch.ones(4, 160, dtype=torch.long)
    mask[1, 40:] = 0
    loaded = load(whisper())
    with loaded.enabled(), pytest.raises(errors.RowMappingError, match=r"received . rows for 4 adapter ids"):
        inner_of(loaded.model).generate(
            torch.randn(4, 8, 160), attention_mask=mask, return_timestamps=True, adapter_ids=FEW, max_new_tokens=6
        )


def musicgen_decoder() -> Any:
    return transformers.MusicgenDecoderConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2, num_codebooks=2
    )


def musicgen() -> Any:
    text = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)
    audio = transformers.EncodecConfig(
        hidden_size=8, num_filters=4, codebook_size=64, codebook_dim=8, upsampling_ratios=[2, 2], num_lstm_layers=1
    )
    config = transformers.MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=musicgen_decoder())
    return transformers.MusicgenForConditionalGeneration(config)


@pytest.mark.parametrize(
    "build", [musicgen, lambda: transformers.MusicgenForCausalLM(musicgen_decoder())], ids=["whole", "decoder"]
)
def test_musicgen_is_refused(load, build):
    loaded = load(two_adapters(build(), ["q_proj"]))
    message = r"of type 'musicgen.*', and its rows are tiled"
    with pytest.raises(errors.UnsupportedError, match=message), loaded.enabled():
        pass


def janus() -> Any:
    config = transformers.JanusConfig(
        text_config={**SIZES, "hidden_size": 32, "model_type": "llama"},
        vision_config={**VISION, "image_size": 8, "patch_size": 4, "projection_dim": 32, "mlp_ratio": 1.0},
        vq_config={
            "embed_dim": 8, "num_embeddings": 20, "latent_channels": 8, "base_channels": 32, "num_patches": 4,
            "channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 32, "image_token_embed_dim": 32,
        },
        image_token_id=9,
    )  # fmt: skip
    return two_adapters(
        transformers.JanusForConditionalGeneration(config), r".*language_model.*(q_proj|v_proj|down_proj)"
    )


def test_janus_says_words_and_paints_for_one_adapter_at_a_time(load):
    """An image is generated from rows with and without the prompt, in two consecutive halves."""

    def call(model: Any, inputs: dict, **ids: Any) -> Tensor:
        config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, bos_token_id=1)
        return inner_of(model).generate(**inputs, generation_config=config, **ids)

    inputs = {"inputs": left_padded(4)["input_ids"], "attention_mask": left_padded(4)["attention_mask"]}
    loaded = load(janus())
    compare(loaded, inputs, call, FEW)
    with loaded.enabled() as mb:
        for ids, block in (({"adapter_ids": FEW}, contextlib.nullcontext()), ({}, mb.batch(FEW))):
            with block, pytest.raises(errors.UnsupportedError, match="one adapter at a time"):
                call(loaded.model, inputs, generation_mode="image", **ids)


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(**VISION, image_size=8, patch_size=4)
    text = transformers.LlamaConfig(**SIZES)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=9, image_seq_length=4)
    return transformers.LlavaForConditionalGeneration(config)


def qwen_vl(kind: str) -> Any:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2}
    more = {
        "Qwen2VL": {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 1},
        "Qwen2_5_VL": {"intermediate_size": 32, "out_hidden_size": 48, "window_size": 16},
    }
    ropes = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}
    config = getattr(transformers, f"{kind}Config")(
        text_config={**SIZES, "rope_parameters": ropes}, vision_config=vision | more[kind], image_token_id=9,
        video_token_id=8, vision_start_token_id=7, vision_end_token_id=6,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


IMAGES = [2, 0, 1, 1]  # number of images per sample


def pictures(kind: str) -> dict[str, Tensor]:
    """Four prompts with as many images in total, but not one each."""
    input_ids = torch.randint(10, 160, (4, 14), generator=torch.Generator().manual_seed(3))
    tokens = 4 if kind == "Llava" else 1
    for row, number in enumerate(IMAGES):
        for image in range(number):
            start = 1 + image * (tokens + 2)
            input_ids[row, start : start + tokens + 2] = torch.tensor([7, *[9] * tokens, 6])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if kind == "Llava":
        return inputs | {"pixel_values": torch.randn(4, 3, 8, 8)}
    patches = {"pixel_values": torch.randn(4 * 4, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 2, 2]] * 4)}
    return inputs | patches | {"mm_token_type_ids": (input_ids == 9).long()}


def with_its_pictures(inputs: dict, row: int) -> dict:
    own = {key: value[row : row + 1] for key, value in inputs.items() if value.shape[:2] == (4, 14)}
    first, number = sum(IMAGES[:row]), IMAGES[row]
    if number:
        for key in inputs.keys() - own.keys():
            of_one = len(inputs[key]) // 4
            own[key] = inputs[key][first * of_one : (first + number) * of_one]
    return own


SEEING = {"Llava": llava, "Qwen2VL": lambda: qwen_vl("Qwen2VL"), "Qwen2_5_VL": lambda: qwen_vl("Qwen2_5_VL")}


@pytest.mark.parametrize("chosen", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("targets", [r".*language_model.*(q_proj|v_proj|down_proj)", "all-linear"])
@pytest.mark.parametrize("kind", SEEING)
def test_models_that_see(load, kind, targets, chosen):
    """Ids belong to prompts, whatever their numbers of images."""
    if targets == "all-linear" and chosen and not hasattr(GenerationMixin, "_expand_multimodal_outputs"):
        pytest.skip("older transformers repeat images for beams, and not samples")
    loaded = load(two_adapters(SEEING[kind](), targets))
    compare(loaded, pictures(kind), options(**chosen), FEW, with_its_pictures)
