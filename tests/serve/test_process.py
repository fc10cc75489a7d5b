"""A server whose model runs in a process of its own gives the same answers and errors; nothing is left behind."""

from __future__ import annotations

import asyncio
import functools
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serving import serving, tiny_model
from test_limits import wait_until
from transformers import AutoTokenizer

from peft_multibatch.serve.errors import ApiError, unavailable


OPTIONS = {"allow_load": True, "admin_key": "chief", "max_queue": 64}


def load(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return tiny_model(tokenizer), tokenizer


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """A copy that tests may change."""
    return shutil.copytree(folder, tmp_path_factory.mktemp("copies") / "adapters")


@pytest.fixture(scope="module")
def apart(tokenizer, adapters):
    with serving(functools.partial(load, tokenizer.name_or_path), None, adapters, **OPTIONS) as found:
        yield found


@pytest.fixture(scope="module")
def together(tokenizer, adapters):
    with serving(tiny_model(tokenizer), tokenizer, adapters, **OPTIONS) as found:
        yield found


KINDS = {
    "greedy": {"temperature": 0},
    "sampled": {"seed": 5, "temperature": 0.8, "top_p": 0.9, "n": 3},
    "logprobs": {"temperature": 0, "logprobs": 3},
    "stop": {"temperature": 0, "stop": ["e", "qu"]},
    "penalties": {"seed": 1, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    "endless": {"temperature": 0, "extra_body": {"ignore_eos": True}},
}


def answer(client, number, is_streamed):
    kind, model = list(KINDS)[number % len(KINDS)], ("base", "red", "green", "blue")[number % 4]
    options = {"model": model, "prompt": f"request {number}", "max_tokens": 24, **KINDS[kind]}
    if not is_streamed:
        choices = client.completions.create(**options).choices
        return [(each.text, each.finish_reason, each.logprobs and each.logprobs.tokens) for each in choices]
    found = {index: ["", None, [] if kind == "logprobs" else None] for index in range(options.get("n", 1))}
    for chunk in client.completions.create(stream=True, **options):
        for choice in chunk.choices:
            own = found[choice.index]
            own[0] += choice.text
            own[1] = choice.finish_reason or own[1]
            if choice.logprobs:
                own[2] += choice.logprobs.tokens
    return [tuple(found[index]) for index in sorted(found)]


def test_the_answers_are_those_of_one_process(apart, together):
    expected = [answer(together.client(), number, False) for number in range(24)]
    client = apart.client()
    with ThreadPoolExecutor(16) as pool:
        for is_streamed in (False, True):
            assert list(pool.map(answer, [client] * 24, range(24), [is_streamed] * 24)) == expected


WRONG = {
    "unknown model": ("completions", {"model": "nobody", "prompt": "x"}),
    "too long": ("completions", {"model": "red", "prompt": [1] * 600}),
    "vocabulary": ("completions", {"model": "red", "prompt": [10**6]}),
    "unknown field": ("completions", {"model": "red", "prompt": "x", "devil": 1}),
    "mixture": ("completions", {"model": "base", "prompt": "x", "adapter": {"nobody": 1.0}}),
    "schema": (
        "chat/completions",
        {
            "model": "red",
            "messages": [{"role": "user", "content": "x"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nothing"}},
            },
        },
    ),
    "load": ("load_lora_adapter", {"lora_name": "new", "lora_path": "../red"}),
    "unload": ("unload_lora_adapter", {"lora_name": "nobody"}),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_errors_are_those_of_one_process(apart, together, what):
    path, body = WRONG[what]
    found = [
        httpx.post(f"{each.url}/v1/{path}", json=body, headers={"authorization": "Bearer chief"}, timeout=30)
        for each in (apart, together)
    ]
    assert found[0].status_code >= 400
    assert (found[0].status_code, found[0].json()) == (found[1].status_code, found[1].json())


@pytest.mark.parametrize("depth", [200, 940, 5000])
def test_deeply_nested_schemas_are_refused_alike(apart, together, depth):
    schema = '{"a":' * depth + "1" + "}" * depth
    body = json.dumps({
        "model": "red",
        "messages": [{"role": "user", "content": "x"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": "HERE"}},
    })  # fmt: skip
    found = [
        httpx.post(f"{each.url}/v1/chat/completions", content=body.replace('"HERE"', schema), timeout=60,
                   headers={"content-type": "application/json"})
        for each in (apart, together)
    ]  # fmt: skip
    assert found[0].status_code == 400
    assert (found[0].status_code, found[0].json()) == (found[1].status_code, found[1].json())


def test_structured_output(apart, together):
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    options = {
        "model": "red",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 40,
        "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }
    found, expected = (
        served.client().chat.completions.create(**options).choices[0].message.content for served in (apart, together)
    )
    assert found == expected and found.startswith('{"a":')


def test_adapters_are_loaded_replaced_and_unloaded_while_requests_run(apart, adapters):
    chief = {"authorization": "Bearer chief"}
    client = apart.client()
    ask = functools.partial(client.completions.create, prompt="one two", max_tokens=12, temperature=0)
    post = functools.partial(httpx.post, headers=chief, timeout=30)
    red, green = (ask(model=name).choices[0].text for name in ("red", "green"))
    running = ask(model="blue", max_tokens=300, stream=True, extra_body={"ignore_eos": True})
    next(iter(running))
    shutil.copytree(adapters / "red", adapters / "new")
    assert ask(model="new").choices[0].text == red
    shutil.rmtree(adapters / "new")
    shutil.copytree(adapters / "green", adapters / "new")
    body = {"lora_name": "new", "lora_path": "new", "load_inplace": True}
    assert post(f"{apart.url}/v1/load_lora_adapter", json=body).status_code == 200
    assert ask(model="new").choices[0].text == green
    assert 'adapter="new"' in httpx.get(f"{apart.url}/metrics").text
    assert post(f"{apart.url}/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 200
    assert 'adapter="new"' not in httpx.get(f"{apart.url}/metrics").text
    with pytest.raises(openai.NotFoundError):
        ask(model="new")
    assert sum(len(chunk.choices) for chunk in running)
    shutil.rmtree(adapters / "new")


def gauges(served):
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}


def test_nothing_is_left_when_clients_leave(apart):
    for is_streamed in (True, False):
        client = apart.client(timeout=0.3)
        with pytest.raises(openai.APIError):
            for _ in client.completions.create(
                model="red", prompt="x", max_tokens=500, n=8, stream=is_streamed, extra_body={"ignore_eos": True}
            ):
                raise openai.APIError("left", request=None, body=None)
        client.close()
        wait_until(lambda: not gauges(apart)["peft_multibatch_running"], 2)
        wait_until(lambda: not apart.engine.running, 2)
    core = apart.engine.core
    assert not (core._orders or core._calls or apart.engine._places or apart.engine._jobs)


def test_a_call_that_is_cancelled_leaves_nothing_and_disturbs_nothing(apart):
    core = apart.engine.core

    async def main():
        task = asyncio.create_task(core.state())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return await core.state()

    assert asyncio.run(main()).problem is None
    assert not core._calls


def test_schemas_of_clients_that_have_left_are_not_compiled(apart):
    pytest.importorskip("llguidance")
    core = apart.engine.core

    def slow(number):
        patterns = [{"type": "string", "pattern": f"a{{1,{24 * number + each}}}"} for each in range(1, 25)]
        return json.dumps({"allOf": patterns})

    async def main():
        tasks = [asyncio.create_task(core.grammar(slow(number))) for number in range(16)]
        await asyncio.sleep(0.5)
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        async with asyncio.timeout(8):  # the 16 of them take three seconds of a core each
            return await core.grammar('{"type": "object", "maxProperties": 3}')

    asyncio.run(main())
    assert not core._calls


def test_errors_cross_processes_whole():
    error = unavailable("why", "code")
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is ApiError and str(found) == "why"
    assert vars(found) == vars(error)
