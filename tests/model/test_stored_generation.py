"""All ways to generate with stored adapters and little memory: token for token as PEFT, one row at a time."""

from __future__ import annotations

import pytest
import torch
from models import EVERY_ARCHITECTURE, alone, base_model, left_padded, peft_model
from test_generation_modes import COMMON, DECODERS_ONLY, MODES, NAMES, SHORT, Kept, looks_ahead, one_row, options

import peft_multibatch
from peft_multibatch.adapters.store.arena import size_class


class Twins:
    """A `PeftModel`, and a model without PEFT with the same adapters in a store that has room for three."""

    def __init__(self, architecture, folder):
        self.by_peft = peft_model(architecture)
        self.by_peft.save_pretrained(str(folder), save_embedding_layers=False)
        self.model = base_model(architecture)
        store = peft_multibatch.enable(self.model).adapter_store()
        assert store.register_folder(folder).refused == {}
        room = sum(size_class(version.layout.size) for version in store._versions.values())
        peft_multibatch.disable(self.model)
        self.mb = peft_multibatch.enable(self.model)
        self.store = self.mb.adapter_store(max_host_memory=room)
        self.store.register_folder(folder)
        self.store.register("other", folder / "four")
        self.load("three", "four", "eight")

    def load(self, *names):
        self.store.adapters([self.store._names.ids[name] for name in names])

    def evict(self):
        """Evict one of the three from memory."""
        before = self.store.stats().evictions
        self.load("other")
        assert self.store.stats().evictions > before

    def compare(self, call, inputs=None):
        inputs = left_padded() if inputs is None else inputs
        wanted = torch.cat(
            [
                alone(self.by_peft, name, lambda row=row: call(self.by_peft, one_row(inputs, row)))
                for row, name in enumerate(NAMES)
            ]
        )
        self.evict()
        assert torch.equal(call(self.model, inputs, adapter_ids=NAMES), wanted)
        self.evict()
        with self.mb.batch(NAMES):
            assert torch.equal(call(self.model, inputs), wanted)
        # the comparison proves nothing if other adapters give the same outputs
        others = call(self.model, inputs, adapter_ids=[*NAMES[1:], NAMES[0]])
        assert (others != wanted).unflatten(0, (len(NAMES), -1)).flatten(1).any(1).sum() >= len(NAMES) // 2


@pytest.fixture(scope="module", params=EVERY_ARCHITECTURE)
def twins(request, tmp_path_factory):
    return Twins(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Twins("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return Twins("t5", tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize("mode", COMMON)
def test_every_architecture(twins, mode):
    twins.compare(COMMON[mode])


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(llama, mode):
    llama.compare(MODES[mode])


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in DECODERS_ONLY])
def test_every_mode_of_an_encoder_decoder(t5, mode):
    t5.compare(MODES[mode])


def test_custom_generate(llama):
    def call(model, inputs, **ids):
        return model.generate(**inputs, custom_generate=looks_ahead, **SHORT, **ids)

    llama.compare(call)


@pytest.mark.parametrize("chosen", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}])
def test_drafts_of_the_model_itself(llama, chosen):
    inputs = {key: value.repeat(1, 2) for key, value in one_row(left_padded(), 0).items()}
    wanted = alone(llama.by_peft, "eight", lambda: options(**chosen)(llama.by_peft, inputs))
    assert torch.equal(options(**chosen)(llama.model, inputs, adapter_ids=["eight"]), wanted)


def test_a_streamer(llama):
    wanted = torch.cat(
        [
            alone(llama.by_peft, name, lambda row=row: options()(llama.by_peft, one_row(left_padded(), row)))
            for row, name in enumerate(NAMES)
        ]
    )
    streamer = Kept()
    llama.model.generate(**left_padded(), **SHORT, do_sample=False, streamer=streamer, adapter_ids=NAMES)
    assert torch.equal(streamer.tokens[0], wanted)
