"""What a streamed token costs the loop that runs the model, and that no token is lost on its way to the client."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from peft_multibatch.serve.connections import MAX_HEADERS
from peft_multibatch.serve.jobs import Job, Sequence
from peft_multibatch.serve.logprobs import TokenLogprobs
from peft_multibatch.serve.progress import Progress
from peft_multibatch.serve.text import Text


def started(names):
    states = {name: RequestState(name, [1], streaming=True) for name in names}
    for state in states.values():
        state.status = RequestStatus.DECODING
        state.generated_tokens.append(0)
    return states


def test_one_call_to_the_event_loop_serves_all_streams_and_several_steps():
    async def main():
        states, calls, found = started(range(64)), [], {}
        progress, loop = Progress(states.get), asyncio.get_running_loop()
        call = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: calls.append(args) or call(*args)
        for name in states:
            progress.follow(name, lambda output: found.setdefault(output.request_id, []).append(output))
        progress.delivered([state.to_generation_output() for state in states.values()])
        assert not any(state.streaming for state in states.values())
        for token in range(1, 11):
            for state in states.values():
                state.generated_tokens.append(token)
            progress.step_ended()
        assert len(calls) == 1
        await asyncio.sleep(0.2)
        assert {name: [each.generated_tokens for each in outputs] for name, outputs in found.items()} == {
            name: [list(range(11))] for name in states
        }
        progress.step_ended()
        assert len(calls) == 2

    asyncio.run(main())


def test_requests_without_a_token_and_ended_ones_are_left_to_the_router():
    async def main():
        states, found = started(["new", "running", "failed", "gone", "forgotten"]), []
        progress = Progress(states.get)
        for name in states:
            progress.follow(name, found.append)
        progress.delivered([state.to_generation_output() for name, state in states.items() if name != "new"])
        states["failed"].status = RequestStatus.FAILED
        del states["gone"]
        progress.forget("forgotten")
        progress.step_ended()
        await asyncio.sleep(0.1)
        assert [output.request_id for output in found] == ["running"]

    asyncio.run(main())


def test_streams_of_a_closed_event_loop_are_forgotten():
    states = started("ab")
    progress = Progress(states.get)

    async def main():
        progress.follow("a", lambda output: None)

    asyncio.run(main())
    progress.step_ended()
    progress.step_ended()
    assert not progress._followed


def test_a_round_that_a_closed_event_loop_left_holds_up_no_later_one():
    states, found = started(range(64)), []
    progress = Progress(states.get)

    async def main(pause):
        for name in states:
            progress.follow(name, found.append)
        progress.delivered([state.to_generation_output() for state in states.values()])
        for _ in range(2):
            progress.step_ended()
            await asyncio.sleep(pause)

    asyncio.run(main(0.001))
    assert progress._is_due
    found.clear()
    asyncio.run(main(0.1))
    assert len(found) == 2 * len(states)


def test_streamed_tokens_build_no_outputs_in_the_thread_of_the_model(served, monkeypatch):
    built, build = Counter(), RequestState.to_generation_output

    def counted(state):
        if threading.current_thread() is served.engine.manager._generation_thread:
            built[state.request_id] += 1
        return build(state)

    monkeypatch.setattr(RequestState, "to_generation_output", counted)
    client = served.client()
    options = {"max_tokens": 100, "temperature": 0, "extra_body": {"ignore_eos": True}}

    def ask(number):
        name = ("base", "red", "green", "blue")[number % 4]
        model = served.settings.model_names[0] if name == "base" else name
        chunks = client.completions.create(model=model, prompt=f"request {number}", stream=True, **options)
        whole = client.completions.create(model=model, prompt=f"request {number}", **options)
        return "".join(chunk.choices[0].text for chunk in chunks), whole.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        for streamed, whole in pool.map(ask, range(8)):
            assert streamed == whole
    assert len(built) == 16 and max(built.values()) <= 3  # the second may be built before the first is handed over


def test_a_slow_reader_gets_every_token_in_fewer_parts(served):
    engine = served.engine

    async def read(pause):
        target = await engine.catalog.find("red", None)
        job = Job("x", target, [[5, 6, 7]], "prompt", max_tokens=60, options={"logprobs": 2}, ignore_eos=True,
                  is_streamed=True)  # fmt: skip
        deltas = []
        async for delta in engine.run(job):
            deltas.append(delta)
            await asyncio.sleep(pause)
        return deltas, job.usage()["completion_tokens"]

    (slow, count), (fast, _) = [
        asyncio.run_coroutine_threadsafe(read(pause), served.loop).result(60) for pause in (0.2, 0)
    ]
    assert count == 60 and len(slow) < 30
    assert "".join(delta.text for delta in slow) == "".join(delta.text for delta in fast)
    tokens = [[token for delta in deltas for token, _ in delta.tokens] for deltas in (slow, fast)]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 60
    assert all(found is not None for delta in slow + fast for _, found in delta.tokens)
    assert [delta.reason for delta in slow] == [None] * (len(slow) - 1) + ["length"]


def test_a_token_waits_for_its_logprob_and_an_end_that_was_seen_before_counts(tokenizer):
    found = TokenLogprobs(-1.0, [])
    sequence = Sequence(0, [1], {"logprobs": 0}, Text(tokenizer))

    def output(tokens, logprobs, ended=False):
        return SimpleNamespace(generated_tokens=tokens, logprobs=logprobs, is_finished=lambda: ended)

    assert sequence.take(output([5], []), [9]).tokens == []
    assert sequence.take(output([5, 9], [found]), [9]).tokens == [(5, found)]
    assert sequence.take(output([5, 9], [found] * 2), [9]).tokens == [(9, found)]
    last = sequence.take(output([5, 9], [found] * 2, ended=True), [9])
    assert last.tokens == [] and last.reason == "stop"


PIECE = b"x" * 8000
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
ENDLESS = {
    "url": [b"GET /", *[PIECE] * 20],
    "one header": [HEAD + b"a: ", *[PIECE] * 20],
    "header name": [HEAD, *[PIECE] * 20],
    "many headers": [HEAD, *[b"a: " + PIECE + b"\r\n"] * 20],
    "many small headers": [HEAD, *[b"abc: d\r\n" * 1000] * 30],
    "trailers": [HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", *[b"a: " + PIECE + b"\r\n"] * 20],
    "chunk extension": [HEAD + b"transfer-encoding: chunked\r\n\r\n1;", *[PIECE] * 20],
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_precedes_a_body_cannot_grow_without_end(served, what):
    answer = b""
    with socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1]))) as connection:
        connection.settimeout(10)
        try:
            for piece in ENDLESS[what]:
                connection.sendall(piece)
            answer = connection.recv(65536)
        except (ConnectionResetError, BrokenPipeError):
            pass  # closed while more was being sent
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")


def test_large_bodies_and_many_requests_on_one_connection_are_no_large_headers(served):
    body = json.dumps({"model": "red", "prompt": "y" * 300_000}).encode()
    request = HEAD + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1]))) as connection:
        connection.settimeout(30)
        for _ in range(3):
            connection.sendall(request)
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65536)
            assert b"context_length_exceeded" in answer
        small = b"GET /health HTTP/1.1\r\nhost: x\r\nx-more: " + b"z" * 6000 + b"\r\n\r\n"
        for _ in range(2 * MAX_HEADERS // len(small)):
            connection.sendall(small)
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
