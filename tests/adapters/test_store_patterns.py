"""Patterns of stored adapters' configurations: matched as in PEFT, and never for long."""

from __future__ import annotations

import re
import shutil
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import base_model
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from stored import edit_config, save

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.adapters.store import patterns
from peft_multibatch.adapters.store.patterns import Patterns, is_safe
from peft_multibatch.adapters.store.settings import read_settings


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("adapters") / "a0", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


@pytest.fixture
def store():
    return peft_multibatch.enable(base_model()).adapter_store("10MB")


ALLOWED = [
    r".*\.(q_proj|v_proj)$",
    r"model\.layers\.\d+\.self_attn\.(q|v)_proj",
    r"^(?!.*visual).*(?:q_proj|v_proj).*",
    r".*layers.*(self_attn|mlp).*(q|v)_proj",
    # as Unsloth writes for the language part of a model with images
    r"(?:.*?(?:vision|visual).*?(?:attn).*?(?:qkv).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))",
]


@pytest.mark.parametrize("pattern", ALLOWED)
def test_patterns_that_are_used_register(store, adapter, pattern):
    edit_config(adapter, target_modules=pattern)
    store.register("one", adapter)


NAMES = {
    "targets": [["q_proj", "v_proj", "o_proj"], r".*\.(q_proj|v_proj|o_proj)"],
    "excluded": [None, [], ["o_proj", "model.layers.1.self_attn.v_proj"], r".*\.(o_proj|1\.self_attn\.v_proj)", ".*"],
    "layers": [{}, {"layers_to_transform": [1]}, {"layers_to_transform": 0, "layers_pattern": "layers"},
               {"layers_to_transform": [0], "layers_pattern": ""}],
}  # fmt: skip


@pytest.mark.parametrize("layers", NAMES["layers"], ids=str)
@pytest.mark.parametrize("excluded", NAMES["excluded"], ids=str)
@pytest.mark.parametrize("targets", NAMES["targets"], ids=str)
def test_modules_are_those_that_peft_adapts(targets, excluded, layers):
    config = {"peft_type": "LORA", "r": 4, "target_modules": targets, "exclude_modules": excluded, **layers}
    if isinstance(targets, str) and layers:
        pytest.skip("PEFT refuses layers with a pattern")
    modules = [name for name, _ in base_model().named_modules()]
    theirs = LoraConfig(target_modules=targets, exclude_modules=excluded, **layers)
    want = {name for name in modules if check_target_module_exists(theirs, name)}
    assert read_settings("one", config).names(Patterns("one"), modules) == want


# Each takes exponential time, or any amount of memory, if it is matched at all.
REFUSED = [
    "(a|a)*q_proj",
    "(.|.)(?#a comment)*q_proj",
    "(.|.) {9}q_proj",
    "((.?){99}){99}q_proj",
    "(?:(?:.?){999}){999}",
    r"(.*)\1q_proj",
    "(?P<name>.)(?P=name)",
    "(.)?(?(1)a|b)",
    "(?i)q_proj",
    "(?x)q_proj",
    "(?i:q_proj)",
    "(?>a|ab)c",
    "a*+q_proj",
    "q_proj{e<=9}",
    "[[:alpha:]]_proj",
    "q_proj" * 200,
    "(?:" * 100 + "q_proj" + ")" * 100,
    "(?=" * 100 + "q_proj" + ")" * 100,
    "(?<=.*)q_proj",
]


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@pytest.mark.parametrize("pattern", REFUSED, ids=lambda pattern: pattern[:30])
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_patterns_that_are_refused(store, adapter, key, pattern):
    edit_config(adapter, **{key: {pattern: 4} if key.endswith("pattern") else pattern})
    with pytest.raises(errors.AdapterUnsupportedError, match=r"one.*has the pattern .*: expected .*load_adapter"):
        store.register("one", adapter)


# The last characters occur in no name, so that all ways to match the rest are tried.
SLOW = ["(.|.)" * 28 + "[^_a-z.0-9]", r"(?:\w|.)" * 28 + "[^_a-z.0-9]"]


@pytest.mark.parametrize("pattern", SLOW, ids=lambda pattern: pattern[:10])
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_what_takes_too_long_is_refused_in_time_and_other_threads_run_meanwhile(
    store, adapter, monkeypatch, key, pattern
):
    monkeypatch.setattr(patterns, "SECONDS", 0.6)
    edit_config(adapter, **{key: {pattern: 4} if key.endswith("pattern") else pattern})
    done, longest = threading.Event(), 0.0

    def run():
        nonlocal longest
        last = time.perf_counter()
        while not done.is_set():
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    other = threading.Thread(target=run)
    other.start()
    begin = time.perf_counter()
    try:
        with pytest.raises(errors.AdapterUnsupportedError, match=r"one.*takes more than 0.6 s: expected simpler ones"):
            store.register("one", adapter)
    finally:
        done.set()
        other.join()
    assert time.perf_counter() - begin < 10
    assert longest < 0.5, "a match held the GIL"


def test_the_limit_is_for_all_matches_together(monkeypatch):
    """Also if none of them is slow, and for compiling them."""
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    found, begin = Patterns("one"), time.perf_counter()
    with pytest.raises(errors.AdapterUnsupportedError, match=r"one.*takes more than 0.2 s"):
        for number in range(10**7):
            found.first([(rf"x{number}_\w*", 1)], "model.layers.0.self_attn.q_proj", 0)
    assert time.perf_counter() - begin < 5


CHARACTERS = st.sampled_from(["q", "v", "_", "1", r"\.", ".", "[qv]", "[^q]", "[a-p1]", r"\d", r"\w", r"\W", r"[\d_]"])
REPEATED = st.tuples(CHARACTERS, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{0,3}?", "{2,}"])).map("".join)
ANCHORS = st.sampled_from(["^", "$", r"\b", r"\B", r"\A", r"\Z"])


def grown(inner):
    many = st.lists(inner, max_size=3).map("".join)
    return st.one_of(
        many,
        st.tuples(many, many).map("(?:{0[0]}|{0[1]})".format),
        many.map("({})".format),
        many.map("({})?".format),
        many.map("(?={})".format),
        many.map("(?!{})".format),
    )


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text("qv_1.a", min_size=1, max_size=4),
        st.recursive(st.one_of(CHARACTERS, REPEATED, ANCHORS), grown, max_leaves=12),
    ),
    st.lists(st.text("qv_1.a", min_size=1, max_size=8), min_size=4, max_size=4),
)
def test_matches_are_those_of_peft(pattern, names):
    assert is_safe(pattern)
    found = Patterns("one")
    for name in names:
        assert found.matches(pattern, name) == bool(re.fullmatch(pattern, name))
        if name != pattern:
            assert found.first([(pattern, True)], name, False) == (get_pattern_key([pattern], name) == pattern)
