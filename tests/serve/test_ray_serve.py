"""The example for Ray Serve on a local Ray: two replicas, and requests that go to the one with their adapter."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from serving import chat_ids, text_alone, tiny_model


pytest.importorskip("grpc", reason="needs ray[serve]")
pytest.importorskip("ray.serve", reason="needs ray[serve]")

EXAMPLES = Path(__file__).parents[2] / "examples"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def cluster(tmp_path_factory, tokenizer, folder):
    """The URL of the example's server."""
    base = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    home = tempfile.mkdtemp(prefix="ray")  # a short path for Ray's sockets
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "HOME": home,
        "RAY_TMPDIR": home,
        "RAY_ADDRESS": "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100 * 2**20),
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]),
        "PEFT_MULTIBATCH_API_KEY": "one",
    }
    command = [sys.executable, str(EXAMPLES / "ray_serve.py"), f"--model={base}", f"--adapters={folder}",
               f"--port={port}", "--cpus-per-replica=0.5", "--max-cache-tokens=2048"]  # fmt: skip
    log = Path(home) / "log"
    with log.open("wb") as file:
        running = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        end = time.monotonic() + 240
        while "is ready" not in log.read_text():
            assert running.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        running.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(60)
        running.kill()
        running.wait()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def client(cluster):
    with openai.OpenAI(base_url=f"{cluster}/v1", api_key="one", max_retries=0, timeout=60) as found:
        yield found


def ask(client, name, **options):
    return client.chat.completions.create(model=name, messages=HELLO, temperature=0, **({"max_tokens": 12} | options))


def replica_of(client, name):
    answer = client.chat.completions.with_raw_response.create(model=name, messages=HELLO, max_tokens=1)
    return answer.headers["x-replica"]


def requests_go_to_a_replica_that_has_their_adapter(client):
    first = {name: replica_of(client, name) for name in ("red", "green", "blue")}
    time.sleep(2)  # until the router knows them
    for _ in range(4):
        assert {name: replica_of(client, name) for name in first} == first
    assert len({replica_of(client, "tiny-llama") for _ in range(30)}) == 2  # both have the base model


def answers_are_pefts(client, alone, tokenizer):
    cases = [("tiny-llama" if name == "base" else name, model, is_streamed) for name, model in alone.items()
             for is_streamed in (False, True)]  # fmt: skip

    def run(case):
        name, _, is_streamed = case
        answer = ask(client, name, stream=is_streamed)
        if is_streamed:
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        return answer.choices[0].message.content

    with ThreadPoolExecutor(len(cases)) as threads:
        found = list(threads.map(run, cases))
    assert found == [text_alone(model, tokenizer, chat_ids(tokenizer, "hello"), 12) for _, model, _ in cases]


def errors_are_the_servers(client, cluster):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, "yellow")
    assert caught.value.body["code"] == "model_not_found"
    assert httpx.get(f"{cluster}/v1/models").status_code == 401
    assert {model.id for model in client.models.list()} == {"tiny-llama", "red", "green", "blue"}
    for body in (b"", b"{", b"[1]", b'{"model": 1}'):
        found = httpx.post(f"{cluster}/v1/completions", content=body, headers={"authorization": "Bearer one"})
        assert found.status_code == 400, found.text
    assert httpx.post(f"{cluster}/v1/completions", content=b"x" * 5_000_000).status_code == 413


def clients_that_leave_free_their_requests(client, cluster):
    def running():
        """Return the running sequences of red's replica, which gets every request for red."""
        lines = httpx.get(f"{cluster}/metrics", headers={"authorization": "Bearer one"}).text.splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith("peft_multibatch_accepted{"))

    long = {"max_tokens": 480, "extra_body": {"ignore_eos": True}}
    stream = ask(client, "red", stream=True, n=8, **long)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.5), "red", n=8, **long)
    end = time.monotonic() + 4
    while any(running() for _ in range(8)):  # of either replica
        assert time.monotonic() < end


@pytest.mark.xdist_group("ray")
def test_two_replicas(client, cluster, alone, tokenizer):
    """One test for everything, because starting a cluster takes a minute."""
    requests_go_to_a_replica_that_has_their_adapter(client)
    answers_are_pefts(client, alone, tokenizer)
    errors_are_the_servers(client, cluster)
    clients_that_leave_free_their_requests(client, cluster)
