"""What a streamed token costs the loop that runs the model, and that no token is lost on its way to the client."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from peft_multibatch.serve import progress
from peft_multibatch.serve.connections import MAX_HEADERS
from peft_multibatch.serve.errors import invalid
from peft_multibatch.serve.jobs import Job, Sequence
from peft_multibatch.serve.logprobs import TokenLogprobs
from peft_multibatch.serve.messages import Order, Output, Target
from peft_multibatch.serve.progress import Progress
from peft_multibatch.serve.text import Text


def order(name, **options):
    urgent = options.pop("is_urgent", False)
    return Order(name, "id", Target("red", "red", ("red",)), [1], 100, False, True, urgent, options)


def started(names, **options):
    """A router that follows requests, those requests after their first token, and what was handed on since."""
    states = {name: RequestState(name, [1], streaming=True) for name in names}
    progress, handed = Progress(states.get), []
    progress.hand_on = handed.append
    for name, state in states.items():
        progress.follow(order(name, **options))
        state.status = RequestStatus.DECODING
        state.generated_tokens.append(0)
    progress.deliver_batch([state.to_generation_output() for state in states.values()])
    ((*first,),) = handed
    assert [(each.name, each.tokens) for each in first] == [(name, [0]) for name in names]
    handed.clear()
    return progress, states, handed


def step(progress, states, token):
    for state in states.values():
        state.generated_tokens.append(token)
    progress.step_ended()


def test_one_handover_serves_all_streams_and_several_steps():
    names = [str(number) for number in range(64)]
    progress, states, handed = started(names)
    assert not any(state.streaming for state in states.values())
    step(progress, states, 1)
    assert len(handed) == 1  # the first round is due at once
    for token in range(2, 10):
        step(progress, states, token)
    assert len(handed) == 1
    time.sleep(0.05)
    step(progress, states, 10)
    assert [[each.tokens for each in outputs] for outputs in handed] == [[[1]] * 64, [[*range(2, 11)]] * 64]
    for state in states.values():
        state.generated_tokens.append(11)
        state.status = RequestStatus.FINISHED
    progress.step_ended()
    progress.deliver_batch([state.to_generation_output() for state in states.values()])
    assert {(each.name, *each.tokens, each.is_finished) for each in handed[-1]} == {(name, 11, True) for name in names}
    assert len(handed) == 3 and not len(progress)


def test_a_single_stream_gets_each_token_at_once():
    progress, states, handed = started(["a"])
    for token in range(1, 5):
        time.sleep(0.001)
        step(progress, states, token)
    assert [each.tokens for (each,) in handed] == [[1], [2], [3], [4]]


def test_tokens_with_stop_strings_are_delivered_one_by_one():
    progress, states, handed = started(["a"], is_urgent=True)
    assert states["a"].streaming
    step(progress, states, 1)
    assert not handed
    progress.deliver_batch([states["a"].to_generation_output()])
    assert [each.tokens for (each,) in handed] == [[1]]


def test_only_followed_requests_are_handed_on_and_each_ends_once():
    progress, states, handed = started(["running", "failed", "gone", "forgotten"])
    assert progress.forget("forgotten") and not progress.forget("forgotten")
    progress.explain = lambda cause, order: invalid(f"{order.name}: {cause}")
    progress.fail_and_deliver(states["failed"], ValueError("why"))
    ((failed,),) = handed
    assert failed.is_finished and failed.error.message == "failed: why"
    gone = states.pop("gone")
    step(progress, states, 1)
    assert [each.name for each in handed[-1]] == ["running"]
    progress.deliver_batch([states["forgotten"].to_generation_output(), states["failed"].to_generation_output()])
    assert len(handed) == 2
    gone.status = RequestStatus.FINISHED
    progress.deliver_batch([gone.to_generation_output()])
    assert handed[-1][0].is_finished and len(progress) == 1
    assert progress.output_queue.empty() and not progress._causes and len(progress._streams) == 1


def test_a_restarted_request_goes_on_where_it_was():
    progress, states, handed = started(["a"])
    states["a"].generated_tokens.append(1)
    states["a"] = states["a"].create_equivalent_initial_request()
    states["a"].status = RequestStatus.DECODING
    step(progress, states, 2)
    assert [each.tokens for (each,) in handed] == [[1, 2]]


def test_between_rounds_no_outputs_are_built(served, monkeypatch):
    built, build = Counter(), RequestState.to_generation_output

    def counted(state):
        if threading.current_thread() is served.engine.core.manager._generation_thread:
            built[state.request_id] += 1
        return build(state)

    monkeypatch.setattr(RequestState, "to_generation_output", counted)
    monkeypatch.setattr(progress, "PER_STREAM", 60)
    monkeypatch.setattr(progress, "LONGEST", 60)
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
    assert len(built) == 16 and max(built.values()) <= 3


def test_a_slow_reader_gets_every_token_in_fewer_parts(served):
    engine = served.engine

    async def read(pause):
        target = await engine.core.catalog.find("red", None)
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


def test_a_token_waits_for_its_logprob():
    state, handed = RequestState("a", [1], streaming=True), []
    state.status = RequestStatus.DECODING
    progress = Progress({"a": state}.get)
    progress.hand_on = handed.extend
    progress.follow(order("a", logprobs=0))
    found = [TokenLogprobs(-float(number), []) for number in range(3)]
    for tokens, logprobs in (([5], []), ([5, 6], found[:1]), ([5, 6, 7], found)):
        state.generated_tokens[:], state.logprobs[:] = tokens, logprobs
        progress.deliver_batch([state.to_generation_output()])
    assert [(each.tokens, each.logprobs) for each in handed] == [([], []), ([5], found[:1]), ([6, 7], found[1:])]


def test_an_end_that_was_seen_before_counts(tokenizer):
    sequence = Sequence(0, [1], {}, Text(tokenizer))
    assert sequence.take(Output("a", [5, 9], [], False, None, 0.0), [9]).reason is None
    last = sequence.take(Output("a", [], [], True, None, 0.0), [9])
    assert last.tokens == [] and last.reason == "stop"
    assert sequence.take(Output("a", [5], [], True, None, 0.0), [9]).reason == "length"


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
