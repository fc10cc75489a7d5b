"""A server whose model runs in a process of its own: same answers and errors, and both processes' ends."""

from __future__ import annotations

import asyncio
import functools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from serving import serving, tiny_model
from test_limits import wait_until
from transformers import AutoTokenizer

from peft_multibatch.serve.errors import ApiError, unavailable
from peft_multibatch.serve.process import CoreProcess
from peft_multibatch.serve.settings import Settings


OPTIONS = {"allow_load": True, "admin_key": "chief", "max_queue": 64}


def load(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return tiny_model(tokenizer), tokenizer


def refuse(error):
    raise error


def vanish():
    os._exit(3)


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


def test_errors_cross_processes_whole():
    error = unavailable("why", "code")
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is ApiError and str(found) == "why"
    assert vars(found) == vars(error)


def test_the_end_of_the_models_process_is_an_error_of_its_requests(tokenizer, folder, caplog):
    with serving(functools.partial(load, tokenizer.name_or_path), None, folder) as served:
        assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
        stream = served.client().completions.create(
            model="red", prompt="x", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        os.kill(served.engine.core.pid, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="can't run requests"):
            list(stream)
        found = httpx.get(f"{served.url}/health")
        assert (found.status_code, found.json()) == (503, {"status": "the model's process has ended"})
        assert gauges(served)["peft_multibatch_healthy"] == 0
        with pytest.raises(openai.InternalServerError) as caught:
            served.client().completions.create(model="red", prompt="x")
        assert (caught.value.status_code, caught.value.body["code"]) == (503, "broken")
        wait_until(lambda: not served.engine.running, 2)
    assert "ended with code -9" in caplog.text


def test_a_model_process_that_hangs_is_a_problem(tokenizer, folder, monkeypatch):
    from peft_multibatch.serve import engine

    monkeypatch.setattr(engine, "ANSWERS", 0.2)
    with serving(functools.partial(load, tokenizer.name_or_path), None, folder) as served:
        os.kill(served.engine.core.pid, signal.SIGSTOP)
        try:
            assert httpx.get(f"{served.url}/health").json() == {"status": "the model's process doesn't answer"}
            assert httpx.get(f"{served.url}/metrics").status_code == 200
        finally:
            os.kill(served.engine.core.pid, signal.SIGCONT)
        assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("loading", "kind", "why"),
    [
        (functools.partial(refuse, OSError("no such model")), RuntimeError, "could not be loaded: no such model"),
        (functools.partial(refuse, ValueError("doesn't fit")), ValueError, "^doesn't fit$"),
        (vanish, RuntimeError, "ended with code 3"),
    ],
    ids=["OSError", "ValueError", "exit"],
)
def test_a_model_that_cannot_be_loaded(loading, kind, why):
    core = CoreProcess(loading, Settings())
    with pytest.raises(kind, match=why):
        core.start()
    assert not core._process.is_alive()


SCRIPT = """
import functools, sys, time
from test_process import load
from peft_multibatch.serve.process import CoreProcess
from peft_multibatch.serve.settings import Settings

if __name__ == "__main__":
    core = CoreProcess(functools.partial(load, sys.argv[1]), Settings(max_cache_tokens=1024))
    core.start()
    print(core.pid, flush=True)
    if sys.argv[2] == "raises":
        raise SystemExit("an error after the start")
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_the_models_process_does_not_outlive_the_servers(tokenizer, tmp_path, how):
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    running = subprocess.Popen([sys.executable, tmp_path / "script.py", tokenizer.name_or_path, how],
                               stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})  # fmt: skip
    with running:
        pid = int(running.stdout.readline())
        if how == "killed":
            running.kill()
        running.wait(20)
        end = time.monotonic() + 20
        while is_alive(pid):
            assert time.monotonic() < end
            time.sleep(0.05)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
