"""A request's cost on the thread that all clients share is bounded by its size, whatever it contains."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from serving import chat_ids

from peft_multibatch.serve.errors import ApiError
from peft_multibatch.serve.protocol import ChatRequest, CompletionRequest, Message, ResponseRequest
from peft_multibatch.serve.requests import chat_tokens, tokens_of
from peft_multibatch.serve.text import Stop


MANY = 50_000
WRONG = {
    "too many prompts": (CompletionRequest, {"prompt": ["a"] * MANY}),
    "strings among tokens": (CompletionRequest, {"prompt": [1, *["a"] * MANY]}),
    "tokens among strings": (CompletionRequest, {"prompt": ["a", *[1] * MANY]}),
    "numbers below zero": (CompletionRequest, {"prompt": [[-1] * MANY]}),
    "lists that aren't tokens": (CompletionRequest, {"prompt": [["a"]] * MANY}),
    "stop strings": (CompletionRequest, {"prompt": "x", "stop": [1] * MANY}),
    "unknown parameters": (CompletionRequest, {"prompt": "x"} | {f"p{number}": 1 for number in range(MANY)}),
    "messages": (ChatRequest, {"messages": [{"role": "nobody"}] * MANY}),
    "parts": (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "x"}] * MANY}]}),
    "input": (ResponseRequest, {"input": [{"type": 1}] * MANY}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_body_has_few_errors_however_much_is_wrong(what):
    kind, body = WRONG[what]
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "base"} | body)
    assert 1 <= caught.value.error_count() < 12


class Counting:
    """A tokenizer that counts the characters it reads."""

    def __init__(self, tokenizer):
        self.tokenizer, self.read = tokenizer, 0

    def __call__(self, text, **options):
        self.read += len(text)
        return self.tokenizer(text, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("text", ["word " * 400_000, "x" * 2_000_000, " " * 2_000_000, "🙂" * 500_000], ids=len)
def test_a_long_text_is_not_read_to_its_end(tokenizer, text):
    counting = Counting(tokenizer)
    with pytest.raises(ApiError) as caught:
        tokens_of(counting, text, 512, "prompt")
    assert caught.value.code == "context_length_exceeded"
    assert counting.read < len(text) / 4


def test_texts_that_fit_are_read_as_they_are(tokenizer):
    for text in ("", "word " * 400, " " * 20_000, "Ünïcode 🙂 " * 40):
        assert tokens_of(tokenizer, text, 512, "prompt") == tokenizer(text).input_ids
        assert chat_tokens(tokenizer, [Message(role="user", content=text)], 512) == chat_ids(tokenizer, text)


@given(st.text("ab", min_size=1, max_size=6), st.lists(st.text("abc", max_size=5), max_size=12))
def test_stop_strings_are_found_where_they_are(string, pieces):
    stop, text = Stop(string), ""
    for piece in pieces:
        before, text = len(text), text + piece
        end = stop.push(piece)
        at = text.find(string)
        assert (end is None) == (at < 0)
        if end is not None:
            assert before + end == at + len(string)
            return
        longest = max(length for length in range(len(string)) if text.endswith(string[:length]))
        assert stop.matched == longest


def test_a_stop_string_costs_the_same_for_each_character(monkeypatch):
    steps = []
    following = Stop._next
    monkeypatch.setattr(Stop, "_next", lambda self, *args: steps.append(1) or following(self, *args))
    stop = Stop("a" * 1000 + "b")
    steps.clear()
    assert stop.push("a" * 5000) is None and stop.matched == 1000
    assert len(steps) == 5000
    assert json.dumps(stop.push("b")) == "1"
