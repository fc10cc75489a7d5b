"""`peft-multibatch serve` as a process: its options, its log, and its shutdown."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
import typer
from serving import chat_ids, serving, text_alone, tiny_model
from test_limits import wait_until
from typer.testing import CliRunner

from peft_multibatch.serve.cli import serve
from peft_multibatch.serve.logs import JsonFormatter, TextFormatter, log_request


HELLO = [{"role": "user", "content": "hello"}]
LONG = {"max_tokens": 480, "temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def starting(base, folder, *options, env=None):
    """Start a server in a process group of its own; yields its process, its URL and its log file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "peft_multibatch",
        "serve",
        str(base),
        "--adapters",
        str(folder),
        "--port",
        str(port),
        "--max-cache-tokens",
        "2048",
    ]
    log = base.parent / f"log-{port}"
    with log.open("wb") as file:
        # a shell starts what runs in the background with SIGINT ignored, and everything that it starts inherits that
        running = subprocess.Popen(
            [*command, *options], stderr=file, env=os.environ | (env or {}), start_new_session=True,
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    try:
        yield running, f"http://127.0.0.1:{port}", log
    finally:
        running.kill()
        running.wait()


@contextlib.contextmanager
def process(*args, **options):
    """Run a server; as ``starting``, once it is ready."""
    with starting(*args, **options) as (running, url, log):
        end = time.monotonic() + 120
        while True:
            assert running.poll() is None and time.monotonic() < end, log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            time.sleep(0.1)
        yield running, url, log


def core_of(running):
    """The id of the process that runs the model, or None if it hasn't been started."""
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    found = [int(each) for each in children if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()]
    return found[0] if found else None


def stream_of(url, **options):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
    stream = client.chat.completions.create(model="red", messages=HELLO, **(LONG | options))
    next(iter(stream))
    return client, stream


def test_it_serves_and_stops_when_requests_have_ended(base, folder, alone, tokenizer):
    with process(base, folder, "--log-format", "json") as (running, url, log):
        client, stream = stream_of(url, max_tokens=300)
        with client:
            assert {model.id for model in client.models.list()} == {"tiny-llama", "red", "green", "blue"}
            running.send_signal(signal.SIGSTOP)
            time.sleep(1)  # tokens wait in the pipe
            running.send_signal(signal.SIGCONT)
            os.killpg(running.pid, signal.SIGTERM)  # as systemd does
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert running.wait(20) in (0, -signal.SIGTERM)
        # imported libraries log before the format is set
        started = log.read_text()[log.read_text().index('{"time"') :]
        lines = [json.loads(line) for line in started.splitlines()]
    alone["red"].generation_config.eos_token_id, end = None, alone["red"].generation_config.eos_token_id
    try:
        assert text == text_alone(alone["red"], tokenizer, chat_ids(tokenizer, "hello"), 300)
    finally:
        alone["red"].generation_config.eos_token_id = end
    last = next(line for line in lines if line["message"] == "request" and line["path"] == "/v1/chat/completions")
    assert (last["status"], last["adapter"], last["completion_tokens"]) == (200, "red", 300)
    assert not any(line["level"] == "error" for line in lines)


def test_the_time_of_grace_is_an_end(base, folder):
    with process(base, folder, "--grace", "0") as (running, url, log):
        client, stream = stream_of(url, n=16)
        with client:
            running.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="shut down before"):
                list(stream)
        running.wait(20)
        assert 'code="stopping"' in log.read_text()


def test_it_ends_with_the_models_process(base, folder):
    with process(base, folder) as (running, url, log):
        client, stream = stream_of(url)
        with client:
            os.kill(core_of(running), signal.SIGKILL)
            with pytest.raises(openai.APIError, match="can't run requests"):
                list(stream)
        assert running.wait(20) == 1  # so that a supervisor starts it again
        assert "the model's process ended with code -9" in log.read_text()


def test_ctrl_c_while_the_model_is_loaded(base, folder):
    with starting(base, folder) as (running, _, log):
        wait_until(lambda: core_of(running), 60)
        core = core_of(running)
        time.sleep(1)
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(20) == 130
        assert "Traceback" not in log.read_text()
        assert not Path(f"/proc/{core}").exists()


def test_keys_come_from_the_environment(base, folder):
    env = {"PEFT_MULTIBATCH_API_KEY": "one two", "PEFT_MULTIBATCH_ADMIN_KEY": "chief"}
    with process(base, folder, "--allow-load", "--served-model-name", "llama", env=env) as (_, url, log):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        found = httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer two"}).json()
        assert found["data"][0]["id"] == "llama"
        body = {"lora_name": "x", "lora_path": "red"}
        done = httpx.post(f"{url}/v1/load_lora_adapter", json=body, headers={"authorization": "Bearer chief"})
        assert done.status_code == 200
        assert "chief" not in log.read_text() and "two" not in log.read_text()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--allow-load"], "--admin-key"),
        (["--adapter", "a b=x"], "a b"),
        (["--adapter", "x"], "NAME=PATH"),
        (["--adapters", "/nowhere"], "/nowhere"),
        (["--log-format", "xml"], "--log-format"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_what_it_does_not_start_with(base, options, why):
    app = typer.Typer()
    app.command()(serve)
    done = CliRunner().invoke(app, [str(base), *options])
    assert done.exit_code != 0
    assert why in done.output + str(done.exception.code)


def test_requests_longer_than_the_cache_are_no_promise(tokenizer, folder):
    with (
        pytest.raises(ValueError, match="--max-cache-tokens"),
        serving(tiny_model(tokenizer), tokenizer, folder, max_model_len=513),
    ):
        pass


def test_what_is_missing_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(SystemExit, match=r"uvicorn.*peft-multibatch\[serve\]"):
        serve("x")


@pytest.mark.parametrize("with_prompts", [False, True])
def test_prompts_are_logged_only_where_it_was_asked_for(tokenizer, folder, caplog, with_prompts):
    with serving(tiny_model(tokenizer), tokenizer, folder, log_prompts=with_prompts) as served:
        secret = [{"role": "user", "content": 'my "secret"\nstatus=200'}]
        client = served.client()
        client.chat.completions.create(model="red", messages=secret, max_tokens=2, user="u\n1")
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="red", messages=secret, max_tokens=-2)
        while len(served.records) < 2:
            time.sleep(0.01)
    with caplog.at_level(logging.INFO, "peft_multibatch.serve"):
        for record in served.records:
            log_request(record)
    first, second = caplog.records
    assert first.fields.items() >= {"adapter": "red", "completion_tokens": 2, "status": 200, "user": "u\n1"}.items()
    assert second.fields.items() >= {"status": 400, "code": "invalid_value"}.items()
    for record in (first, second):
        as_text, as_json = TextFormatter("%(message)s").format(record), JsonFormatter().format(record)
        assert "\n" not in as_text and "\n" not in as_json
        assert json.loads(as_json)["request_id"] == record.fields["request_id"]
    assert ("secret" in JsonFormatter().format(first)) == with_prompts
    assert "secret" not in JsonFormatter().format(second)
