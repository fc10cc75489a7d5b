"""Either process of a server may end, hang or fail to start: requests get errors, and no process is left."""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
from serving import serving, tiny_model
from test_limits import wait_until
from test_process import gauges, load

from peft_multibatch.serve import engine, process
from peft_multibatch.serve.jobs import Job
from peft_multibatch.serve.manager import ServingManager
from peft_multibatch.serve.messages import Order, Target
from peft_multibatch.serve.process import CoreProcess
from peft_multibatch.serve.settings import Settings


ENDLESS = {"model": "red", "prompt": "x", "max_tokens": 500, "stream": True, "extra_body": {"ignore_eos": True}}


def check_broken(served, stream):
    """Check that requests get an error, and that the server says why."""
    with pytest.raises(openai.APIError, match="can't run requests"):
        list(stream)
    wait_until(lambda: not served.engine.core.is_running, 20)
    found = httpx.get(f"{served.url}/health")
    assert (found.status_code, found.json()) == (503, {"status": "the model's process has ended"})
    assert gauges(served)["peft_multibatch_healthy"] == 0
    with pytest.raises(openai.InternalServerError) as caught:
        served.client().completions.create(model="red", prompt="x")
    assert (caught.value.status_code, caught.value.body["code"]) == (503, "broken")
    wait_until(lambda: not served.engine.running, 2)


def test_the_end_of_the_models_process_is_an_error_of_its_requests(tokenizer, folder, caplog):
    with serving(functools.partial(load, tokenizer.name_or_path), None, folder) as served:
        assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
        stream = served.client().completions.create(**ENDLESS)
        next(iter(stream))
        os.kill(served.engine.core.pid, signal.SIGKILL)
        check_broken(served, stream)
    assert "ended with code -9" in caplog.text


def load_fragile(tokenizer_folder, flag):
    """Load a model; the loop that runs requests ends once a file exists."""
    body = ServingManager._generation_loop_body

    def fragile(self, *args, **kwargs):
        if flag.exists():
            raise RuntimeError("the device is gone")
        return body(self, *args, **kwargs)

    ServingManager._generation_loop_body = fragile
    return load(tokenizer_folder)


def test_the_models_process_ends_with_the_loop_that_runs_requests(tokenizer, folder, tmp_path, caplog):
    loading = functools.partial(load_fragile, tokenizer.name_or_path, tmp_path / "flag")
    with serving(loading, None, folder) as served:
        stream = served.client().completions.create(**ENDLESS)
        next(iter(stream))
        (tmp_path / "flag").touch()
        check_broken(served, stream)
    assert "ended with code 1" in caplog.text


def test_a_loop_that_ends_while_a_request_is_added_is_an_error_of_it(tokenizer, folder, monkeypatch):
    with serving(tiny_model(tokenizer), tokenizer, folder) as served:
        manager = served.engine.core.manager
        put = manager.input_queue.put

        def put_too_late(*args, **kwargs):
            manager._handle_critical_error(RuntimeError("the device is gone"), manager.batch_processor)
            put(*args, **kwargs)

        monkeypatch.setattr(manager.input_queue, "put", put_too_late)
        with pytest.raises(openai.InternalServerError) as caught:
            served.client(timeout=5).completions.create(model="red", prompt="x")
        assert caught.value.body["code"] == "broken"
        assert not len(served.engine.core._progress)


def test_a_model_process_that_hangs_is_a_problem(tokenizer, folder, monkeypatch):
    monkeypatch.setattr(engine, "ANSWERS", 0.2)
    monkeypatch.setattr(process, "STOPS", 0.5)
    loading = functools.partial(load, tokenizer.name_or_path)
    with serving(loading, None, folder, request_timeout=3) as served:
        core = served.engine.core
        os.kill(core.pid, signal.SIGSTOP)
        assert httpx.get(f"{served.url}/health").json() == {"status": "the model's process doesn't answer"}
        assert httpx.get(f"{served.url}/metrics").status_code == 200
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(f"{served.url}/v1/models", timeout=0.3)
        wait_until(lambda: not core._calls, 2)  # nothing is kept for clients that have left
        with pytest.raises(openai.APIStatusError) as caught:
            served.client().completions.create(model="red", prompt="x")
        assert (caught.value.status_code, caught.value.body["code"]) == (504, "timeout")
        os.kill(core.pid, signal.SIGCONT)
        wait_until(lambda: httpx.get(f"{served.url}/health").json() == {"status": "ok"}, 5)
        assert served.client().completions.create(model="red", prompt="x", max_tokens=3).usage.completion_tokens
        os.kill(core.pid, signal.SIGSTOP)
        began = time.monotonic()
    assert time.monotonic() - began < 10
    assert not core._process.is_alive()


def test_an_answer_right_before_the_end_keeps_no_other_request_from_its_error():
    core, heard = CoreProcess(load, Settings()), []
    core._process = SimpleNamespace(join=lambda _: None, exitcode=-9)
    core.listen(heard.extend)
    core.is_running = True
    core.add(Order("a", "id", Target("red", "red"), [1], 4, False, True, False, {}))
    answered, waiting = core._calls[1], core._calls[2] = Future(), Future()
    core._other.send_bytes(process.pickle.dumps(("value", 1, "found")))
    core._other.close()
    core._read()  # the caller of the first has had no time to take its answer
    assert answered.result(0) == "found"
    assert waiting.exception(0).code == "broken"
    assert [(each.name, each.error.code) for each in heard] == [("a", "broken")]


def refuse(error, *, with_thread=False):
    if with_thread:
        threading.Thread(target=time.sleep, args=(600,)).start()
    raise error


def vanish():
    os._exit(3)


def ask_a_child():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        raise ValueError(pool.apply(str, ("children can help",)))


def load_unpicklable(tokenizer_folder):
    model, tokenizer = load(tokenizer_folder)
    tokenizer.hook = lambda: None
    return model, tokenizer


@pytest.mark.parametrize(
    ("loading", "kind", "why"),
    [
        (functools.partial(refuse, OSError("no such model")), RuntimeError, "could not be loaded: no such model"),
        (functools.partial(refuse, ValueError("doesn't fit"), with_thread=True), ValueError, "^doesn't fit$"),
        (vanish, RuntimeError, "ended with code 3"),
        (ask_a_child, ValueError, "^children can help$"),
        (load_unpicklable, RuntimeError, "could not be loaded: .*pickle"),
    ],
    ids=["OSError", "ValueError", "exit", "children", "tokenizer"],
)
def test_a_model_that_cannot_be_loaded(tokenizer, loading, kind, why):
    loading = functools.partial(loading, tokenizer.name_or_path) if loading is load_unpicklable else loading
    core = CoreProcess(loading, Settings(max_cache_tokens=1024))
    with pytest.raises(kind, match=why):
        core.start()
    assert not core._process.is_alive()


SCRIPT = """
import functools, gc, os, sys, threading, time
from test_process import load
from peft_multibatch.serve.process import CoreProcess
from peft_multibatch.serve.settings import Settings

def load_how(how, folder):
    print(os.getpid(), flush=True)
    if how == "loading":
        time.sleep(600)
    if how == "killed":
        threading.Thread(target=time.sleep, args=(600,)).start()
    return load(folder)

if __name__ == "__main__":
    how = sys.argv[2]
    core = CoreProcess(functools.partial(load_how, how, sys.argv[1]), Settings(max_cache_tokens=1024))
    core.start()
    print("frozen" if gc.get_freeze_count() else "not frozen", flush=True)
    if how == "raises":
        raise SystemExit("an error after the start")
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["killed", "loading", "raises"])
def test_the_models_process_does_not_outlive_the_servers(tokenizer, tmp_path, how):
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    running = subprocess.Popen([sys.executable, tmp_path / "script.py", tokenizer.name_or_path, how],
                               stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})  # fmt: skip
    with running:
        pid = int(running.stdout.readline())
        if how != "loading":
            assert running.stdout.readline() == "frozen\n"
        if how != "raises":
            running.kill()
        running.wait(20)
        wait_until(lambda: not is_alive(pid), 20)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_an_engine_runs_jobs_in_one_event_loop_at_a_time(served):
    async def first(count):
        job = Job("x", Target("red", "red", ("red",)), [[5, 6]], "prompt", max_tokens=count, is_streamed=True)
        running = served.engine.run(job)
        found = [await anext(running)]
        if count == 1:
            return found
        with pytest.raises(RuntimeError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, first(1))
        return found + [each async for each in running]

    httpx.get(f"{served.url}/v1/models")
    served.client().completions.create(model="red", prompt="x", max_tokens=1)
    assert asyncio.run(first(200))[-1].reason
    assert asyncio.run(first(1))
