"""/v1/models, /v1/chat/completions and /v1/completions with OpenAI's own client, against PEFT alone."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from peft import PeftModel
from serving import chat_ids, text_alone, tiny_model, tokens_alone


NAMES = ("base", "red", "green", "blue")
TEXTS = ("Who are you?", "Sing.", "What is the capital of France, and why?", "Ünïcode 🙂 text")


def ask(client, model, text, **options):
    options = {"temperature": 0, "max_tokens": 12} | options
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)


def complete(client, model, prompt, **options):
    return client.completions.create(model=model, prompt=prompt, **({"temperature": 0, "max_tokens": 12} | options))


def test_models_are_the_base_and_its_adapters(client):
    found = {model.id: model for model in client.models.list()}
    assert set(found) == set(NAMES)
    assert found["red"].parent == "base"
    assert client.models.retrieve("green").id == "green"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("yellow")


@pytest.mark.parametrize("name", NAMES)
def test_model_picks_the_adapter(client, alone, tokenizer, name):
    expected = text_alone(alone[name], tokenizer, chat_ids(tokenizer, TEXTS[0]), 12)
    assert len({text_alone(each, tokenizer, chat_ids(tokenizer, TEXTS[0]), 12) for each in alone.values()}) == 4
    answer = ask(client, name, TEXTS[0])
    assert answer.model == name
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len(chat_ids(tokenizer, TEXTS[0]))
    prompt = "Once upon a time"
    assert complete(client, name, prompt).choices[0].text == text_alone(
        alone[name], tokenizer, tokenizer(prompt).input_ids, 12
    )


def test_64_requests_at_once_mixed_and_streamed(client, alone, tokenizer):
    cases = [(NAMES[index % 4], f"{TEXTS[index % 3]} {index}", index % 2) for index in range(64)]
    random.Random(0).shuffle(cases)

    def run(case):
        name, text, is_streamed = case
        if not is_streamed:
            return ask(client, name, text).choices[0].message.content
        chunks = ask(client, name, text, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(64) as threads:
        found = list(threads.map(run, cases))
    for (name, text, _), answer in zip(cases, found):
        assert answer == text_alone(alone[name], tokenizer, chat_ids(tokenizer, text), 12), (name, text)


def test_streams_are_the_same_text_in_parts(client):
    whole = ask(client, "red", TEXTS[3], n=2, temperature=1, seed=3, max_tokens=20)
    stream = ask(client, "red", TEXTS[3], n=2, temperature=1, seed=3, max_tokens=20, stream=True,
                 stream_options={"include_usage": True})  # fmt: skip
    chunks = list(stream)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(each.delta.content or "" for each in mine) == choice.message.content
        assert [each.finish_reason for each in mine if each.finish_reason] == [choice.finish_reason]
    parts = list(complete(client, "red", "One", stream=True))
    assert "".join(part.choices[0].text for part in parts) == complete(client, "red", "One").choices[0].text


def test_a_mixture_is_the_weighted_sum(client, folder, tokenizer):
    model = PeftModel.from_pretrained(tiny_model(tokenizer), str(folder / "red"), adapter_name="red")
    model.load_adapter(str(folder / "blue"), adapter_name="blue")
    model.add_weighted_adapter(["red", "blue"], [0.7, 0.3], "both", combination_type="cat")
    model.set_adapter("both")
    expected = text_alone(model.eval(), tokenizer, chat_ids(tokenizer, TEXTS[0]), 12)
    found = ask(client, "base", TEXTS[0], extra_body={"adapter": {"red": 0.7, "blue": 0.3}})
    assert found.choices[0].message.content == expected


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        ({"model": "red", "extra_body": {"adapter": {"blue": 1.0}}}, 400, "invalid_value"),
        ({"model": "base", "extra_body": {"adapter": {}}}, 400, "invalid_value"),
        ({"model": "base", "extra_body": {"adapter": {"red": 1e39}}}, 400, "invalid_value"),
        ({"model": "base", "extra_body": {"adapter": {"yellow": 1.0}}}, 404, "model_not_found"),
        ({"model": "base", "extra_body": {"adapter": dict.fromkeys("abcde", 1.0)}}, 400, "invalid_value"),
        ({"model": "yellow"}, 404, "model_not_found"),
        ({"model": "__base__"}, 404, "model_not_found"),
        ({"model": "../red"}, 404, "model_not_found"),
        ({"model": ""}, 404, "model_not_found"),
    ],
)
def test_what_is_no_model_is_told(client, options, status, code):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, text="Hi", **options)
    assert (caught.value.status_code, caught.value.body["code"]) == (status, code)
    assert "green" not in caught.value.message


def test_stop_strings_end_the_text_before_them(client, alone, tokenizer):
    whole = ask(client, "green", TEXTS[1], max_tokens=30).choices[0].message.content
    for stop in (whole[20:24], [whole[30:31], whole[15:22]]):
        expected = min((whole.split(each)[0] for each in ([stop] if isinstance(stop, str) else stop)), key=len)
        answer = ask(client, "green", TEXTS[1], max_tokens=30, stop=stop)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 30
        stream = ask(client, "green", TEXTS[1], max_tokens=30, stop=stop, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected


def test_the_models_own_end_is_one(client, alone, tokenizer):
    end = tokenizer.eos_token_id
    many = torch.tensor([[3 + number, 7, 11] for number in range(128)])
    found = alone["red"].generate(many, attention_mask=torch.ones_like(many), max_new_tokens=40, do_sample=False)
    prompt = many[(found == end).any(1)][0].tolist()
    tokens = tokens_alone(alone["red"], prompt, 40)
    answer = complete(client, "red", prompt, max_tokens=40)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert answer.usage.completion_tokens == len(tokens) < 40
    longer = complete(client, "red", prompt, max_tokens=40, extra_body={"ignore_eos": True})
    assert longer.choices[0].finish_reason == "length"
    assert longer.usage.completion_tokens == 40


def test_seeds_n_and_settings_are_each_requests_own(client):
    def texts(**options):
        options = {"temperature": 1, "max_tokens": 8, "n": 2} | options
        return [choice.message.content for choice in ask(client, "blue", TEXTS[0], **options).choices]

    first, second = texts(seed=1)
    assert first != second
    assert texts(seed=1) == [first, second]
    assert texts(seed=2)[0] == second  # the seed of each answer is one higher
    assert texts() != texts()
    greedy = ask(client, "blue", TEXTS[0], max_tokens=8).choices[0].message.content
    assert texts(extra_body={"top_k": 1}) == [greedy, greedy]
    assert texts(top_p=1e-6, n=1) == [greedy]
    plain = ask(client, "blue", TEXTS[0], max_tokens=30).choices[0].message.content
    assert ask(client, "blue", TEXTS[0], max_tokens=30, frequency_penalty=2).choices[0].message.content != plain


def test_logprobs_are_the_models(client, alone, tokenizer):
    prompt = chat_ids(tokenizer, TEXTS[2])
    answer = ask(client, "red", TEXTS[2], logprobs=True, top_logprobs=3, temperature=1.5, seed=5, max_tokens=6)
    tokens = tokenizer(answer.choices[0].message.content).input_ids
    content = answer.choices[0].logprobs.content
    assert [each.token for each in content] == [tokenizer.decode([token]) for token in tokens]
    assert b"".join(bytes(each.bytes) for each in content).decode() == answer.choices[0].message.content
    with torch.no_grad():
        rows = alone["red"](torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :].log_softmax(-1)
    for row, token, found in zip(rows, tokens, content):
        assert found.logprob == pytest.approx(row[token].item(), abs=1e-3)
        assert [each.logprob for each in found.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
    old = complete(client, "red", prompt, logprobs=2, max_tokens=4).choices[0].logprobs
    assert len(old.tokens) == len(old.token_logprobs) == len(old.top_logprobs) == 4
    assert old.text_offset == [sum(map(len, old.tokens[:index])) for index in range(4)]
    streamed = ask(client, "red", TEXTS[2], logprobs=True, temperature=1.5, seed=5, max_tokens=6, stream=True)
    parts = [each for chunk in streamed for each in (chunk.choices[0].logprobs or _none).content]
    assert [each.logprob for each in parts] == pytest.approx([each.logprob for each in content], abs=1e-5)


class _none:
    content: tuple = ()


def test_several_prompts_as_text_and_tokens(client, alone, tokenizer):
    texts = ["One", "Two and"]
    expected = [text_alone(alone["green"], tokenizer, tokenizer(text).input_ids, 12) for text in texts]
    for prompt in (texts, [tokenizer(text).input_ids for text in texts]):
        answer = complete(client, "green", prompt, n=2)
        assert [choice.text for choice in answer.choices] == [expected[0], expected[0], expected[1], expected[1]]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert complete(client, "green", tokenizer("One").input_ids).choices[0].text == expected[0]


OPENAIS = {
    "audio": {}, "function_call": "none", "functions": [], "logit_bias": {"1": 1}, "metadata": {},
    "modalities": ["text"], "parallel_tool_calls": True, "prediction": {}, "reasoning_effort": "low",
    "service_tier": "auto", "store": False, "tool_choice": "none",
    "tools": [], "web_search_options": {}, "min_p": 0.1, "best_of": 1, "echo": False, "suffix": "x",
    "generation_config": "{}", "chat_template": "x", "anything": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", OPENAIS)
def test_unsupported_parameters_are_refused_by_name(client, name):
    for call in (ask, complete):
        with pytest.raises(openai.BadRequestError) as caught:
            call(client, "base", "Hi", extra_body={name: OPENAIS[name]})
        assert caught.value.body["param"] == name
        assert caught.value.body["code"] == "unsupported_parameter"
        assert name in caught.value.message
        call(client, "base", "Hi", extra_body={name: None}, max_tokens=1)


WRONG = {
    "temperature": (-1, 3, "1", float("nan")), "top_p": (0, 2), "n": (0, 129, 1.5), "max_tokens": (0, -1, "3"),
    "stop": ("", [""], ["a"] * 5, 3), "seed": (2**63, "x"), "presence_penalty": (3,), "frequency_penalty": (-3,),
    "stream": ("yes",), "stream_options": ({"include_usage": True},),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]])
def test_values_that_can_not_be_are_refused(served, name, value):
    import json

    import httpx

    for path, prompt in (("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
                         ("completions", {"prompt": "x"})):  # fmt: skip
        body = json.dumps({"model": "base", **prompt, name: value})
        found = httpx.post(f"{served.url}/v1/{path}", content=body, headers={"content-type": "application/json"})
        assert found.status_code == 400, found.text
        assert found.json()["error"]["param"] == name


def test_a_context_that_is_too_long_is_told(client, served):
    assert served.engine.max_model_len == 512
    for call in (
        lambda: ask(client, "red", "word " * 30_000),
        lambda: ask(client, "red", "word", max_tokens=500),
        lambda: complete(client, "red", [5] * 512, max_tokens=1),
        lambda: complete(client, "red", [[5], [5] * 505]),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert caught.value.body["code"] == "context_length_exceeded"
        assert "512" in caught.value.message
    assert complete(client, "red", [5] * 511, max_tokens=1).usage.total_tokens == 512
    rest = ask(client, "red", "word", max_tokens=None, extra_body={"ignore_eos": True})
    assert rest.usage.total_tokens == 512


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages"),
        ({"role": "user"}, "messages"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages"),
        ({"role": "user", "content": "x", "tool_calls": []}, "messages.0.tool_calls"),
        (
            {"role": "user", "content": [{"type": "text", "text": "", "image_url": "x"}]},
            "messages.0.content.0.image_url",
        ),
    ],
)
def test_messages_that_are_not_supported(client, message, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="red", messages=[message])
    assert caught.value.body["param"] == param


def test_parts_of_a_message(client):
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]
    found = ask(client, "red", parts).choices[0].message.content
    assert found == ask(client, "red", "One\ntwo").choices[0].message.content
