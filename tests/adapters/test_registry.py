"""Ids follow the order in which adapters were added, not the time at which they were read from PEFT's own
dictionary."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
from models import base_model, lora_configs, peft_model

import peft_multibatch


@pytest.mark.parametrize("looks", [False, True])
def test_an_adapter_that_was_deleted_before_anybody_looked_had_an_id(looks):
    model = peft_model()
    mb = peft_multibatch.enable(model)
    model.add_adapter("short-lived", lora_configs()["three"])
    if looks:
        assert mb.adapter_names == ["three", "four", "eight", "short-lived"]
    model.delete_adapter("short-lived")
    if looks:
        assert mb.adapter_names == ["three", "four", "eight", None]
    model.add_adapter("next", lora_configs()["three"])
    assert mb.adapter_names == ["three", "four", "eight", None, "next"]


@pytest.mark.parametrize("looks", [False, True])
def test_one_added_again_keeps_its_id_and_its_place(looks):
    model = peft_model()
    mb = peft_multibatch.enable(model)
    model.delete_adapter("four")
    if looks:
        assert mb.adapter_names == ["three", None, "eight"]
    model.add_adapter("next", lora_configs()["three"])
    model.add_adapter("four", lora_configs()["four"])
    assert mb.adapter_names == ["three", "four", "eight", "next"]


def test_models_of_transformers_that_lose_all_adapters_and_get_others():
    model = base_model()
    model.peft_config = {}
    model._hf_peft_config_loaded = True
    mb = peft_multibatch.enable(model)
    model.peft_config["one"] = lora_configs()["three"]
    assert list(model.peft_config) == ["one"]
    del model.peft_config
    assert mb.adapter_names == [] or set(mb.adapter_names) == {None}


def test_the_model_and_its_tuner_share_the_dictionary_and_get_their_own_back():
    model = peft_model()
    before = model.peft_config
    mb = peft_multibatch.enable(model)
    assert model.peft_config is model.get_base_model().peft_config is model.base_model.peft_config
    assert model.peft_config == before and isinstance(model.peft_config, dict)
    model.add_adapter("new", lora_configs()["three"])
    mb.disable()
    assert model.peft_config is model.get_base_model().peft_config is before
    assert list(before) == ["three", "four", "eight", "new"]


def test_copies_and_pickles_are_plain_dictionaries():
    model = peft_model()
    peft_multibatch.enable(model)
    found = [copy.copy(model.peft_config), copy.deepcopy(model.peft_config), model.peft_config.copy()]
    found += [pickle.loads(pickle.dumps(model.peft_config)), copy.deepcopy(model).peft_config]
    assert {type(each) for each in found} == {dict}
    assert {tuple(each) for each in found} == {("three", "four", "eight")}


CHANGES = {
    "set": lambda configs: configs.__setitem__("x", 1),
    "delete": lambda configs: configs.__delitem__("three"),
    "pop": lambda configs: configs.pop("three"),
    "pop with a default": lambda configs: configs.pop("nobody", None),
    "pop the last": lambda configs: configs.popitem(),
    "clear": lambda configs: configs.clear(),
    "update": lambda configs: configs.update({"x": 1}, y=2),
    "set where missing": lambda configs: configs.setdefault("x", 1),
    "or": lambda configs: configs.__ior__({"x": 1}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_way_to_change_a_dictionary_is_noticed(change):
    model = peft_model()
    peft_multibatch.enable(model)
    configs, plain = model.peft_config, dict(model.peft_config)
    names = configs.names
    before = names.changes
    change(configs), change(plain)
    assert names.changes > before
    assert configs == plain
    new = [name for name in plain if name in "xy"]
    assert names.listed() == [*(name if name in plain else None for name in ("three", "four", "eight")), *new]
    assert list(names.ids) == list(plain)


def test_dictionaries_that_the_garbage_collector_does_not_show():
    """This happens if a server calls ``gc.freeze()`` after it has loaded its model.

    It stays frozen: `gc.unfreeze` would also undo what `conftest.py` does, for all tests that follow.
    """
    model = peft_model()
    before = model.peft_config
    gc.collect()
    gc.freeze()
    mb = peft_multibatch.enable(model)
    watched = model.peft_config
    assert watched is model.base_model.peft_config is model.get_base_model().peft_config is not before
    model.add_adapter("new", lora_configs()["three"])
    assert mb.adapter_names == ["three", "four", "eight", "new"]
    assert model.peft_config is watched
    mb.disable()
    assert model.peft_config is model.base_model.peft_config is before


def test_what_was_read_while_adapters_changed_is_read_again(monkeypatch):
    model = peft_model()
    registry = peft_multibatch.enable(model)._registry
    read, seen = registry.source.read, []

    def read_in_between(name):
        adapter = read(name)
        seen.append(adapter)
        if len(seen) < 3:  # as at the end of `manager.changing()`, on another thread
            (registry.renew([0]) if len(seen) == 1 else registry.forget())
        return adapter

    registry.forget()
    monkeypatch.setattr(registry.source, "read", read_in_between)
    for count in (1, 2, 3, 3):
        assert registry.adapters([0])[0] is seen[-1]
        assert len(seen) == count
