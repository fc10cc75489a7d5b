"""Structured output: answers that match a schema, against PEFT's logits masked by hand, and the cost of schemas."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import openai
import pytest
import torch
from batching import DEVICE, generation, results, settings
from serving import chat_ids, serving, text_alone, tiny_model, tokens_alone
from test_completions import NAMES, TEXTS, ask

import peft_multibatch
from peft_multibatch.serve import grammars
from peft_multibatch.serve.grammars import Grammar, Grammars
from peft_multibatch.serve.manager import ServingManager


llguidance = pytest.importorskip("llguidance", reason="needs llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 2},
    },
    "required": ["colour", "size", "tags"],
    "additionalProperties": False,
}
MEASURED = {"x-guidance": {"whitespace_flexible": False}}
"""Disallows whitespace between tokens, which a random model would generate endlessly."""


def format_of(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


FORMAT = format_of(SCHEMA | MEASURED)


def matcher_of(tokenizer, schema, logits):
    import llguidance.hf

    prepared = llguidance.hf.from_tokenizer(tokenizer, logits, [tokenizer.eos_token_id])
    return llguidance.LLMatcher(prepared, llguidance.LLMatcher.grammar_from_json_schema(schema))


def masked_greedily(model, tokenizer, matcher, prompt, count):
    """Return the allowed tokens with the highest logits, with PEFT alone."""
    tokens, matcher = [], matcher.deep_copy()
    while len(tokens) < count:
        with torch.no_grad():
            scores = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
        words = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.int32)
        allowed = (words[:, None] >> torch.arange(32) & 1).flatten()[: len(scores)].bool()
        tokens.append(int(scores.masked_fill(~allowed, -torch.inf).argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
        assert matcher.consume_token(tokens[-1])
    return tokens


def test_answers_fit_and_are_pefts_beside_others_that_are_untouched(client, alone, tokenizer):
    matcher = matcher_of(tokenizer, SCHEMA | MEASURED, len(tokenizer))
    cases = [(name, text, kind) for name in NAMES for text in TEXTS[:2] for kind in ("structured", "stream", "plain")]

    def run(case):
        name, text, kind = case
        if kind == "plain":
            return ask(client, name, text, max_tokens=60).choices[0].message.content
        options = {"max_tokens": 60, "response_format": FORMAT, "stream": kind == "stream"}
        answer = ask(client, name, text, **options)
        if kind == "stream":
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].message.content

    with ThreadPoolExecutor(len(cases)) as threads:
        found = list(threads.map(run, cases))
    for (name, text, kind), answer in zip(cases, found):
        prompt = chat_ids(tokenizer, text)
        if kind == "plain":
            assert answer == text_alone(alone[name], tokenizer, prompt, 60)
            continue
        jsonschema.validate(json.loads(answer), SCHEMA)
        tokens = masked_greedily(alone[name], tokenizer, matcher, prompt, 60)
        assert answer == tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(set(found)) > len(NAMES)


def test_sampled_answers_fit_as_well(client):
    options = {"response_format": FORMAT, "temperature": 1.5, "top_p": 0.95, "seed": 1, "n": 8, "max_tokens": 100,
               "logprobs": True, "frequency_penalty": 0.1}  # fmt: skip
    answer = ask(client, "red", TEXTS[0], **options)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    assert len({choice.message.content for choice in answer.choices}) > 1
    again = ask(client, "red", TEXTS[0], **options)
    assert [each.message for each in again.choices] == [each.message for each in answer.choices]


def test_any_object(client):
    """Some answers are complete before the limit; all others are prefixes of an object."""
    answer = ask(client, "blue", TEXTS[0], response_format={"type": "json_object"}, n=8, temperature=1, seed=0,
                 max_tokens=80)  # fmt: skip
    for choice in answer.choices:
        assert choice.message.content.lstrip().startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
    plain = ask(client, "blue", TEXTS[0], response_format={"type": "text"}).choices[0].message.content
    assert plain == ask(client, "blue", TEXTS[0]).choices[0].message.content


DEEP: dict = {"type": "string"}
for _ in range(300):
    DEEP = {"type": "array", "items": DEEP}

BAD = {
    "no type": {"type": "thing"},
    "unknown keyword": {"type": "object", "propertyNames": {"pattern": "a"}, "unevaluatedItems": False},
    "another server's": {"$ref": "http://localhost:1/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "itself": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "nothing fits": {"type": "integer", "minimum": 3, "maximum": 2},
    "no regex": {"type": "string", "pattern": "("},
    "too deep": DEEP,
    "too large": {"enum": [f"{number:060}" for number in range(2000)]},
}


@pytest.mark.parametrize("what", BAD)
def test_schemas_that_can_not_be_used(client, what):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "red", "Hi", response_format=format_of(BAD[what]))
    assert caught.value.body["param"] == "response_format"
    assert caught.value.body["code"] in ("invalid_schema", "invalid_value")
    assert len(caught.value.message) < 600


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"type": "grammar"}, "response_format"),
        ({"type": "json_schema"}, "response_format"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format"),
        ({"type": "json_object", "schema": {}}, "response_format.json_object.schema"),
    ],
)
def test_formats_that_there_are_not(client, given, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "red", "Hi", response_format=given)
    assert caught.value.body["param"] == param


def test_half_a_character_is_no_schema(served):
    body = b'{"model": "red", "messages": [{"role": "user", "content": "Hi"}], "response_format": {"type": '
    body += b'"json_schema", "json_schema": {"name": "x", "schema": {"enum": ["\\ud800"]}}}}'
    found = httpx.post(f"{served.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "response_format")


def test_answers_that_may_not_end_have_no_schema(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "red", "Hi", response_format=FORMAT, extra_body={"ignore_eos": True})
    assert caught.value.body["param"] == "ignore_eos"


def test_a_schema_that_takes_minutes_to_compile_is_its_callers_alone(client, monkeypatch):
    monkeypatch.setattr(grammars, "SECONDS", 1.0)
    patterns = [{"type": "string", "pattern": f"a{{1,{count}}}"} for count in range(1, 25)]
    began = time.monotonic()
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(ask, client, "red", "Hi", response_format=format_of({"allOf": patterns}))
        while not slow.done():
            assert ask(client, "red", "Hi", max_tokens=1).choices
        with pytest.raises(openai.BadRequestError, match="too long to compile"):
            slow.result()
    assert time.monotonic() - began < 5


def test_without_llguidance_it_is_refused_by_name(tokenizer, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with serving(tiny_model(tokenizer), tokenizer, folder) as served:
        with pytest.raises(openai.BadRequestError, match=r"llguidance.*peft-multibatch\[serve\]") as caught:
            ask(served.client(), "red", "Hi", response_format=FORMAT)
        assert (caught.value.body["param"], caught.value.body["code"]) == ("response_format", "unsupported_parameter")
        assert ask(served.client(), "red", "Hi", response_format={"type": "text"}, max_tokens=1).choices


def test_a_grammar_that_can_not_be_followed_fails_its_request_alone(client, served, alone, tokenizer, monkeypatch):
    def start(self):
        matcher = self._matcher.deep_copy()
        matcher.consume_token(tokenizer.eos_token_id)  # it isn't allowed as the first token
        return matcher

    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(ask, client, "green", TEXTS[0], max_tokens=60)
        with monkeypatch.context() as patch:
            patch.setattr(Grammar, "start", start)
            with pytest.raises(openai.BadRequestError, match="too long to apply"):
                ask(client, "red", "Hi", response_format=FORMAT)
        text = text_alone(alone["green"], tokenizer, chat_ids(tokenizer, TEXTS[0]), 60)
        assert other.result().choices[0].message.content == text
    assert ask(client, "red", "Hi", response_format=FORMAT, max_tokens=60).choices[0].finish_reason == "stop"


@pytest.fixture(scope="module")
def mb(tokenizer, folder):
    handle = peft_multibatch.enable(tiny_model(tokenizer).to(DEVICE))
    handle.adapter_store(roots=[folder]).register_folder(folder)
    yield handle
    handle.disable()


@pytest.mark.parametrize(
    "how", ["", "asynchronous", "evicted", "static", pytest.param("graphs", marks=pytest.mark.gpu)]
)
def test_masks_follow_the_tokens_however_steps_are_run(mb, alone, tokenizer, asynchronous, how):
    options = {"asynchronous": asynchronous, "evicted": {"blocks": 8}, "graphs": {"use_cuda_graph": True}}.get(how, {})
    manager = ServingManager(mb, generation_config=generation(), continuous_batching_config=settings(**options))
    compiler = Grammars(tokenizer, [tokenizer.eos_token_id], manager.logit_processor.vocabulary)
    grammar = compiler._compile(json.dumps(SCHEMA | MEASURED))
    matcher = matcher_of(tokenizer, SCHEMA | MEASURED, len(tokenizer))
    entries = ["red", "blue", "green", "__base__"] * 2
    inputs = [tokenizer(f"{name} {number}").input_ids for number, name in enumerate(entries)]
    manager.warmup()
    assert manager.logit_processor.is_static == (how == "graphs")
    if how == "static":  # the mode for captured graphs
        manager.logit_processor.is_static = True
    manager.start()
    try:
        for number, (prompt, entry) in enumerate(zip(inputs, entries)):
            with_grammar = {"grammar": grammar} if number < 4 else {}
            manager.add_request(prompt, f"r{number}", 40, eos_token_id=tokenizer.eos_token_id, adapter_id=entry,
                                **with_grammar)  # fmt: skip
        found = results(manager, len(inputs))
    finally:
        manager.stop()
        manager.destroy()
    for number, (prompt, entry) in enumerate(zip(inputs, entries)):
        model = alone["base" if entry == "__base__" else entry]
        if number < 4:
            expected = masked_greedily(model, tokenizer, matcher, prompt, 40)
        else:
            expected = tokens_alone(model, prompt, 40)
        assert found[f"r{number}"].generated_tokens == expected
