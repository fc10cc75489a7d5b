"""A client learns nothing about another one from errors, headers, the log or the timing of key checks."""

from __future__ import annotations

import json
import shutil
import socket
import time

import httpx
import openai
import pytest
from serving import serving, tiny_model
from test_limits import LONG, is_idle, wait_until

from peft_multibatch.serve import gate


NAME, PROMPT = "acme-secret-v7", "our-secret-prompt"


@pytest.fixture(scope="module")
def shared(tokenizer, folder, tmp_path_factory):
    """A server with two tenants: one with a secret adapter and prompt, and one with ``red``."""
    own = tmp_path_factory.mktemp("tenants")
    shutil.copytree(folder / "red", own / "red")
    shutil.copytree(folder / "blue", own / NAME)
    shutil.copytree(folder / "green", own / "bad")
    (own / "bad" / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    limits = {"max_batch": 2, "max_queue": 1, "max_requests_per_adapter": 2, "request_timeout": 20}
    with serving(tiny_model(tokenizer), tokenizer, own, api_keys=("acme", "other"), admin_key="chief",
                 allow_load=True, **limits) as served:  # fmt: skip
        yield served


def post(served, path, body, key="other"):
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    return httpx.post(f"{served.url}{path}", content=json.dumps(body), headers=headers)


WRONG = [
    {"model": "red", "prompt": "x", "n": 500},
    {"model": "red", "prompt": "x", "nothing": 1},
    {"model": "red", "prompt": "word " * 2000},
    {"model": NAME[:-1], "prompt": "x"},
    {"model": "acme", "prompt": "x"},
    {"model": "", "prompt": "x"},
    {"model": "bad", "prompt": "x"},
    {"model": "base", "prompt": "x", "adapter": {"red": 0.5, "acme-secret": 0.5}},
    {"model": "red"},
]


def test_errors_tell_nothing_of_another_tenant(shared, caplog):
    """This includes the other tenant using up all places."""
    client = shared.client("acme")
    begun = [client.completions.create(model=NAME, prompt=PROMPT, stream=True, **LONG) for _ in range(2)]
    for stream in begun:
        next(iter(stream))
    found = [post(shared, "/v1/completions", body) for body in WRONG]
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model=NAME, prompt=PROMPT)  # its own limit
    found.append(post(shared, "/v1/completions", {"model": "red", "prompt": "x", "n": 2}))  # more than fit
    found += [post(shared, path, {}) for path in ("/v1/chat/completions", "/v1/responses", "/v1/nothing", "/health")]
    for verb in ("load", "unload"):  # they need another key
        found.append(post(shared, f"/v1/{verb}_lora_adapter", {"lora_name": NAME, "lora_path": "red"}))
    for name, path in (("x", "bad"), ("x", "../x"), ("/", "x")):
        found.append(post(shared, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, "chief"))
    statuses = [each.status_code for each in found]
    assert {400, 401, 404, 405, 429} <= set(statuses) and min(statuses) >= 400, statuses
    for each in found:
        told = each.text + str(each.headers)
        assert not any(secret in told for secret in (NAME, PROMPT, str(shared.settings.adapters_dir))), told
    for stream in begun:
        stream.close()
    wait_until(lambda: is_idle(shared), 5)
    assert PROMPT not in caplog.text


def test_an_error_in_the_middle_of_a_step_is_its_own_tenants(shared):
    """The other tenant's request is in the same step, and finishes as if it were alone."""
    other = shared.client("acme").completions.create(model=NAME, prompt=PROMPT, stream=True, max_tokens=60,
                                                     temperature=0, extra_body={"ignore_eos": True})  # fmt: skip
    next(iter(other))
    stream = begin_as(shared, "other")
    job = next(number for number, inbox in shared.engine._jobs.items() if number == max(shared.engine._jobs))
    name = f"{job}-0"
    leaving = shared.engine.core.manager._leaving
    fail = RuntimeError(f"{NAME}: {PROMPT}")
    shared.engine.core.manager._stored.failed.append((leaving.find(name), fail))
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.body["code"] == "internal_error"
    assert NAME not in str(caught.value.body) and PROMPT not in str(caught.value.body)
    assert [chunk.choices[0].finish_reason for chunk in other][-1] == "length"


def begin_as(served, key):
    stream = served.client(key).completions.create(model="red", prompt="x", stream=True, **LONG)
    next(iter(stream))
    return stream


@pytest.mark.parametrize("key", ["acme", "other", "wrong", "acm", ""])
def test_keys_are_compared_in_constant_time_and_all_of_them(shared, monkeypatch, key):
    """The same comparisons are made, whichever key is right, and whether one is."""
    compared = []
    compare = gate.hmac.compare_digest
    monkeypatch.setattr(gate.hmac, "compare_digest", lambda *pair: compared.append(pair) or compare(*pair))
    status = httpx.get(
        f"{shared.url}/v1/models", headers={"authorization": f"Bearer {key}"} if key else {}
    ).status_code
    assert status == (200 if key in ("acme", "other") else 401)
    assert compared == [(key.encode(), b"acme"), (key.encode(), b"other")]


def test_headers_that_do_not_come_hold_up_nobody(shared):
    """No other client waits for them, and neither does shutdown: see the end of the fixture."""
    address = ("127.0.0.1", int(shared.url.rsplit(":", 1)[1]))
    slow = [socket.create_connection(address) for _ in range(100)]
    try:
        for each in slow:
            each.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthoriz")
        began = time.monotonic()
        answer = shared.client("other").completions.create(model="red", prompt="x", max_tokens=2)
        assert answer.choices and time.monotonic() - began < 5
        slow[0].sendall(b"x" * 70_000)
        slow[0].settimeout(5)
        assert slow[0].recv(65536).startswith(b"HTTP/1.1 4") or slow[0].recv(1) == b""
    finally:
        for each in slow:
            each.close()
