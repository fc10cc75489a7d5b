"""Rejected requests, access control, and clients that disconnect, wait or misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serving import serving, tiny_model

from peft_multibatch.serve.settings import Settings


LONG = {"max_tokens": 480, "temperature": 0, "extra_body": {"ignore_eos": True}}
HELLO = [{"role": "user", "content": "hello"}]


def wait_until(condition, seconds=2.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it didn't happen in time"
        time.sleep(0.01)


def is_idle(served):
    scheduler = served.engine.core.manager.batch_processor.scheduler
    return not (scheduler.active_requests or scheduler.waiting_requests or served.engine.running)


def begin(served, **options):
    """Start a stream and wait for its first chunk."""
    client = served.client()
    stream = client.chat.completions.create(model="red", messages=HELLO, stream=True, **(LONG | options))
    next(iter(stream))
    return stream


@pytest.fixture
def slow(served, monkeypatch):
    """A server with slow steps."""
    step = served.engine.core.manager._generation_step

    def slowly():
        time.sleep(0.05)
        step()

    monkeypatch.setattr(served.engine.core.manager, "_generation_step", slowly)
    yield served
    wait_until(lambda: is_idle(served), 30)


@contextlib.contextmanager
def raw(served, text: bytes):
    with socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(text)
        yield connection


def post(body: dict) -> bytes:
    data = json.dumps(body).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + (
        f"content-length: {len(data)}\r\n\r\n".encode() + data
    )


@pytest.mark.parametrize("is_streamed", [True, False], ids=["stream", "plain"])
def test_a_client_that_leaves_frees_its_request(slow, is_streamed):
    body = {"model": "red", "messages": HELLO, "max_tokens": 480, "ignore_eos": True, "n": 3, "stream": is_streamed}
    with raw(slow, post(body)) as connection:
        wait_until(lambda: len(slow.engine.core.manager.batch_processor.scheduler.active_requests) == 3)
        if is_streamed:
            assert b"data: " in connection.recv(65536) + connection.recv(65536)
    wait_until(lambda: is_idle(slow), 2)
    wait_until(lambda: slow.records and slow.records[-1].status == 499)


def test_a_stream_that_is_closed_frees_its_request(slow):
    stream = begin(slow)
    stream.close()
    wait_until(lambda: is_idle(slow), 2)


def test_a_client_that_leaves_before_the_first_token_frees_its_request(slow):
    with raw(slow, post({"model": "red", "messages": HELLO, "max_tokens": 480, "stream": True})):
        wait_until(lambda: slow.engine.running.total() == 1)
    wait_until(lambda: is_idle(slow), 2)


def test_more_than_fit_are_told_when_to_come_again(tokenizer, folder):
    with serving(tiny_model(tokenizer), tokenizer, folder, max_batch=2, max_queue=1) as served:
        streams = [begin(served), begin(served)]
        begin_waiting = threading.Thread(target=lambda: served.client().completions.create(model="red", prompt="x"))
        begin_waiting.start()
        wait_until(lambda: served.engine.running.total() == 3)
        with pytest.raises(openai.RateLimitError) as caught:
            served.client().completions.create(model="red", prompt="x", max_tokens=1)
        assert caught.value.body["code"] == "queue_full"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.BadRequestError):
            served.client().completions.create(model="red", prompt="x", n=4)
        for stream in streams:
            stream.close()
        begin_waiting.join()
        assert served.client(max_retries=3).completions.create(model="red", prompt="x", max_tokens=1).choices


def test_no_more_are_read_than_may_wait(tokenizer, folder, monkeypatch):
    """Requests whose prompts wait for the tokenizer, or whose schemas wait to be compiled, count as well."""
    with serving(tiny_model(tokenizer), tokenizer, folder, max_batch=2, max_queue=1) as served:
        held, tokenize = threading.Event(), served.engine.tokenize

        async def slowly(*args):
            await asyncio.to_thread(held.wait)
            return await tokenize(*args)

        monkeypatch.setattr(served.engine, "tokenize", slowly)
        with ThreadPoolExecutor(3) as threads:
            client = served.client()
            ask = {"model": "red", "prompt": "x", "max_tokens": 1}
            answers = [threads.submit(client.completions.create, **ask) for _ in range(3)]
            wait_until(lambda: served.engine._prepared == 3)
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(**ask)
            assert caught.value.body["code"] == "queue_full"
            held.set()
            assert all(answer.result().choices for answer in answers)
        assert served.engine._prepared == 0


def test_one_adapter_does_not_take_all_places(tokenizer, folder):
    with serving(tiny_model(tokenizer), tokenizer, folder, max_requests_per_adapter=1) as served:
        stream = begin(served)
        with pytest.raises(openai.RateLimitError) as caught:
            served.client().completions.create(model="red", prompt="x", max_tokens=1)
        assert caught.value.body["code"] == "adapter_busy"
        for mixture in ({"red": 1.0}, {"blue": 0.5, "red": 0.5}):
            with pytest.raises(openai.RateLimitError) as caught:
                served.client().completions.create(model="base", prompt="x", extra_body={"adapter": mixture})
            assert caught.value.body["message"].startswith("The model `red` has reached")
        ask = {"prompt": "x", "max_tokens": 1}
        assert served.client().completions.create(model="blue", **ask).choices
        assert served.client().completions.create(model="base", extra_body={"adapter": {"blue": 0.5}}, **ask).choices
        with pytest.raises(openai.BadRequestError, match="asks for 2 answers: expected at most 1"):
            served.client().completions.create(model="blue", n=2, **ask)
        stream.close()


def test_a_request_that_takes_too_long_ends(tokenizer, folder, monkeypatch):
    with serving(tiny_model(tokenizer), tokenizer, folder, request_timeout=0.5) as served:
        step = served.engine.core.manager._generation_step
        monkeypatch.setattr(served.engine.core.manager, "_generation_step", lambda: (time.sleep(0.05), step()))
        with pytest.raises(openai.APIStatusError) as caught:
            served.client(max_retries=2).chat.completions.create(model="red", messages=HELLO, **LONG)
        assert (caught.value.status_code, caught.value.body["code"]) == (504, "timeout")
        time.sleep(1)
        assert [record.status for record in served.records] == [504]  # it isn't retried
        wait_until(lambda: is_idle(served))
        with pytest.raises(openai.APIError, match="took longer"):
            list(begin(served))
        wait_until(lambda: is_idle(served))


def test_bodies_that_are_too_large_or_no_json(served):
    url = f"{served.url}/v1/completions"
    large = httpx.post(url, content=b"x" * 5_000_000)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")

    def parts():
        for _ in range(100):
            yield b"x" * 100_000

    with contextlib.suppress(httpx.WriteError):  # the server may stop reading
        assert httpx.post(url, content=parts()).status_code == 413
    for body in (b"", b"{", b"[1]", b'"x"', b"{" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"null",
                 b'{"model": "base", "prompt": NaN}', b'{"model": "base", "prompt": "\\ud800"}',
                 b'{"model": "\\ud800", "prompt": "x"}',
                 b'{"model": "base", "prompt": "x", "\\udfff": 1}'):  # fmt: skip
        found = httpx.post(url, content=body, headers={"content-type": "application/json"})
        assert found.status_code == 400, (body[:40], found.text)
        assert found.json()["error"]["type"] == "invalid_request_error"
    assert httpx.post(url, content=b'{"model": "base", "prompt": "x"}').status_code in (200, 400)


def test_a_body_that_does_not_come_is_not_waited_for(tokenizer, folder):
    with serving(tiny_model(tokenizer), tokenizer, folder, body_timeout=0.3) as served:
        with raw(served, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{") as connection:
            assert connection.recv(65536).startswith(b"HTTP/1.1 408")
        assert served.client().completions.create(model="red", prompt="x", max_tokens=1).choices


def test_a_client_that_does_not_read_holds_up_nobody(tokenizer, folder):
    with serving(tiny_model(tokenizer), tokenizer, folder, request_timeout=3) as served:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", int(served.url.rsplit(":", 1)[1])))
        body = {"model": "red", "messages": HELLO, "max_tokens": 480, "stream": True, "n": 16, "logprobs": True,
                "top_logprobs": 20, "ignore_eos": True}  # fmt: skip
        connection.sendall(post(body))
        wait_until(lambda: served.engine.running.total() == 16)
        assert served.client().completions.create(model="blue", prompt="x", max_tokens=1).choices
        wait_until(lambda: is_idle(served), 10)
        connection.close()


def test_paths_and_methods_that_are_not_there(served):
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/reset", 404),
                                 ("POST", "/load_model", 404), ("POST", "/v1/load_lora_adapter", 401)):  # fmt: skip
        found = httpx.request(method, served.url + path)
        assert found.status_code == status
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_keys(tokenizer, folder):
    options = {"api_keys": ("one", "two"), "admin_key": "chief", "allow_load": True}
    with serving(tiny_model(tokenizer), tokenizer, folder, **options) as served:

        def status(path, key=None, method="GET"):
            headers = {} if key is None else {"authorization": key}
            return httpx.request(method, served.url + path, headers=headers).status_code

        for key in (None, "one", "Bearer", "Bearer three", "Bearer chief", "Basic one", "Bearer öne".encode()):
            assert status("/v1/models", key) == 401
            assert status("/v1/completions", key, "POST") == 401
            assert status("/openapi.json", key) == 401
        for key in ("Bearer one", "bearer two"):
            assert status("/v1/models", key) == 200
            assert status("/metrics", key) == 200
            assert status("/v1/load_lora_adapter", key, "POST") == 401
        assert status("/v1/load_lora_adapter", "Bearer chief", "POST") == 400
        assert status("/metrics", "Bearer chief") == 200
        assert status("/metrics") == 401
        assert status("/health") == status("/ready") == 200
        with pytest.raises(openai.AuthenticationError) as caught:
            served.client("wrong").models.list()
        assert caught.value.body["code"] == "invalid_api_key"


def test_request_ids_are_the_clients_where_they_can_be(served):
    def ids(given):
        found = httpx.get(f"{served.url}/v1/models", headers={"x-request-id": given})
        return found.headers["x-request-id"]

    assert ids("abc-1.2") == "abc-1.2"
    assert ids("a b") != "a b"
    assert len(ids("x" * 65)) == 32


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"allow_load": True, "admin_key": "x"}, "--allow-load"),
        ({"api_keys": ("x",), "admin_key": "x"}, "--admin-key"),
        ({"api_keys": ("",)}, "empty"),
        ({"adapters": {"../x": "y"}}, "../x"),
        ({"adapters": {"base": "y"}}, "base"),
    ],
)
def test_settings_that_would_be_unsafe(options, why):
    with pytest.raises(ValueError, match=why):
        Settings(**options)


def test_no_key_no_other_machine():
    with pytest.raises(ValueError, match="--api-key"):
        Settings().check_host("0.0.0.0")
    Settings().check_host("127.0.0.1")
    Settings(api_keys=("x",)).check_host("0.0.0.0")


def test_the_server_stops_when_its_loop_has_ended(tokenizer, folder):
    with serving(tiny_model(tokenizer), tokenizer, folder) as served:
        assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
        stream = begin(served)
        served.engine.core.manager.batch_processor.prepare_next_batch = _broken
        with pytest.raises(openai.APIError, match="can't run requests"):
            list(stream)
        assert httpx.get(f"{served.url}/health").status_code == 503
        assert httpx.get(f"{served.url}/ready").status_code == 503
        with pytest.raises(openai.InternalServerError) as caught:
            served.client().completions.create(model="red", prompt="x")
        assert (caught.value.status_code, caught.value.body["code"]) == (503, "broken")


def _broken():
    raise RuntimeError("out of order")


def test_health_sees_a_loop_that_hangs(served, monkeypatch):
    from peft_multibatch.serve import core

    monkeypatch.setattr(core, "STALLED", 0.2)
    held = threading.Event()
    step = served.engine.core.manager._generation_step
    monkeypatch.setattr(served.engine.core.manager, "_generation_step", lambda: (held.wait(), step()))
    waiting = threading.Thread(target=lambda: served.client().completions.create(model="red", prompt="x"))
    waiting.start()
    try:
        wait_until(lambda: httpx.get(f"{served.url}/health").status_code == 503, 5)
    finally:
        held.set()
    waiting.join()
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_stop_ends_what_is_left_with_an_error(tokenizer, folder):
    with serving(tiny_model(tokenizer), tokenizer, folder) as served:
        stream = begin(served)
        served.engine.is_stopping = True
        assert httpx.get(f"{served.url}/ready").status_code == 503
        with pytest.raises(openai.InternalServerError) as caught:
            served.client().completions.create(model="red", prompt="x")
        assert caught.value.body["code"] == "stopping"
        asyncio.run_coroutine_threadsafe(_call(served.engine.cancel_all), served.loop).result()
        with pytest.raises(openai.APIError, match="shut down before"):
            list(stream)
        wait_until(lambda: is_idle(served))


async def _call(function):
    function()
