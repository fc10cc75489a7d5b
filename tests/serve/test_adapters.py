"""Adapters are added, changed and removed while requests run; a bad one only affects its own requests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time

import httpx
import openai
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from serving import chat_ids, serving, text_alone, tiny_model

from peft_multibatch.serve.catalog import THREADS


WEIGHTS = "adapter_model.safetensors"
ADMIN = {"authorization": "Bearer chief"}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def own(tmp_path, folder):
    """A folder of adapters that a test may change, next to one that must not be read."""
    shutil.copytree(folder, tmp_path / "adapters")
    shutil.copytree(folder / "red", tmp_path / "outside")
    return tmp_path / "adapters"


@pytest.fixture
def served(tokenizer, own):
    options = {"allow_load": True, "admin_key": "chief", "max_rank": 8, "max_adapter_mb": 1}
    with serving(tiny_model(tokenizer), tokenizer, own, **options) as found:
        yield found


@pytest.fixture
def expected(alone, tokenizer):
    return {name: text_alone(model, tokenizer, chat_ids(tokenizer, "hello"), 12) for name, model in alone.items()}


def ask(served, model, **options):
    options = {"temperature": 0, "max_tokens": 12} | options
    answer = served.client().chat.completions.create(model=model, messages=HELLO, **options)
    return answer.choices[0].message.content


def change(served, verb, headers=ADMIN, **body):
    return httpx.post(f"{served.url}/v1/{verb}_lora_adapter", json=body, headers=headers)


def test_an_adapter_costs_nothing_until_it_is_named(served, own, expected):
    assert len(served.engine.core.store) == 0
    assert {model.id for model in served.client().models.list()} == {"base", "red", "green", "blue"}
    assert len(served.engine.core.store) == 0
    assert ask(served, "red") == expected["red"]
    assert list(served.engine.core.store) == ["red"]
    shutil.copytree(own / "blue", own / "late")
    assert ask(served, "late") == expected["blue"]


def test_loading_and_unloading(served, own, expected):
    assert change(served, "load", {}, lora_name="x", lora_path="red").status_code == 401
    done = change(served, "load", lora_name="crimson", lora_path=str(own / "red"))
    assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'crimson' added successfully.")
    assert ask(served, "crimson") == expected["red"]
    taken = change(served, "load", lora_name="crimson", lora_path="blue")
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "adapter_exists")
    assert ask(served, "crimson") == expected["red"]
    assert change(served, "load", lora_name="crimson", lora_path="blue", load_inplace=True).status_code == 200
    assert ask(served, "crimson") == expected["blue"]
    assert (
        change(served, "unload", lora_name="crimson").text == "Success: LoRA adapter 'crimson' removed successfully."
    )
    for name in ("crimson", "red"):
        if name == "red":
            assert change(served, "unload", lora_name="red").status_code == 200  # its folder still exists
        with pytest.raises(openai.NotFoundError):
            ask(served, name)
        assert name not in {model.id for model in served.client().models.list()}
        assert change(served, "unload", lora_name=name).status_code == 404
    assert change(served, "load", lora_name="red", lora_path="red").status_code == 200
    assert ask(served, "red") == expected["red"]


def test_without_allow_load_there_is_no_such_door(tokenizer, folder):
    with serving(tiny_model(tokenizer), tokenizer, folder, admin_key="chief") as served:
        assert change(served, "load", lora_name="x", lora_path="red").status_code == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"lora_name": "x", "lora_path": "../outside"}, 400),
        ({"lora_name": "x", "lora_path": "/etc"}, 400),
        ({"lora_name": "x", "lora_path": "nothing"}, 400),
        ({"lora_name": "x", "lora_path": "red\0"}, 400),
        ({"lora_name": "x", "lora_path": ""}, 400),
        ({"lora_name": "../x", "lora_path": "red"}, 400),
        ({"lora_name": "base", "lora_path": "red"}, 400),
        ({"lora_name": "__base__", "lora_path": "red"}, 400),
        ({"lora_name": "", "lora_path": "red"}, 400),
        ({"lora_name": "x" * 65, "lora_path": "red"}, 400),
        ({"lora_name": "x\n", "lora_path": "red"}, 400),
        ({"lora_name": "x", "lora_path": "red", "base_model_name": "y"}, 400),
        ({"lora_path": "red"}, 400),
    ],
    ids=str,
)
def test_what_can_not_be_loaded(served, tmp_path, body, status):
    found = change(served, "load", **body)
    assert found.status_code == status, found.text
    assert str(tmp_path) not in found.text
    assert len(served.engine.core.store) == 0


def spoil_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def spoil_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file({key: change(value) for key, value in tensors.items()}, folder / WEIGHTS)


def as_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def linked_outside(folder):
    shutil.rmtree(folder)
    folder.symlink_to(folder.parents[1] / "outside")


def weights_linked_outside(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder.parents[1] / "outside" / WEIGHTS)


BAD = {
    "corrupt": lambda folder: (folder / WEIGHTS).write_bytes(os.urandom(5000)),
    "truncated": lambda folder: os.truncate(folder / WEIGHTS, 3000),
    "empty": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "no json": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "a pickle": as_pickle,
    "a link": linked_outside,
    "a link to weights": weights_linked_outside,
    "a fifo": lambda folder: ((folder / WEIGHTS).unlink(), os.mkfifo(folder / WEIGHTS)),
    "unknown fields": lambda folder: spoil_config(folder, something_new=True),
    "DoRA": lambda folder: spoil_config(folder, use_dora=True),
    "another rank": lambda folder: spoil_config(folder, r=2),
    "a huge rank": lambda folder: spoil_config(folder, r=10**9),
    "other shapes": lambda folder: spoil_tensors(folder, lambda each: each.repeat(2, 2)),
    "too large": lambda folder: (folder / WEIGHTS).write_bytes(b"\0" * 1_100_000),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_adapter_is_an_error_for_its_caller_alone(served, own, tmp_path, expected, what):
    shutil.copytree(own / "red", own / "bad")
    BAD[what](own / "bad")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(served, "bad")
    assert caught.value.body["code"] == "adapter_unusable"
    assert str(tmp_path) not in str(caught.value.body)
    refused = change(served, "load", lora_name="green", lora_path="bad", load_inplace=True)
    assert refused.status_code == 400
    assert ask(served, "green") == expected["green"]
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_weights_that_are_not_finite_are_their_callers_alone(served, own, expected):
    shutil.copytree(own / "red", own / "bad")
    spoil_tensors(own / "bad", lambda each: each.fill_(float("nan")))
    answers = {}

    def run(name):
        answers[name] = ask(served, name)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("red", "blue")]
    for thread in threads:
        thread.start()
    with pytest.raises(openai.InternalServerError) as caught:
        ask(served, "bad")
    assert caught.value.body["code"] == "internal_error"
    for thread in threads:
        thread.join()
    assert answers == {name: expected[name] for name in answers} and len(answers) == 2
    assert ask(served, "red") == expected["red"]


def test_files_that_go_or_change_after_they_were_registered(served, own, expected, alone):
    assert ask(served, "red") == expected["red"]
    shutil.rmtree(own / "red")
    shutil.copytree(own / "blue", own / "new")
    os.rename(own / "new", own / "red")  # as in deployments
    assert ask(served, "red") == expected["blue"]
    shutil.rmtree(own / "red")
    assert ask(served, "red") == expected["blue"]  # it is still in memory
    assert ask(served, "green") == expected["green"]


def test_replacing_while_requests_run(served, own, expected, tokenizer, folder):
    """Every answer comes from one version; requests that started before the change finish with the old one."""
    model = PeftModel.from_pretrained(tiny_model(tokenizer), str(folder / "red"), adapter_name="red")
    model.load_adapter(str(folder / "blue"), adapter_name="blue")
    texts = {}
    for name in ("red", "blue"):
        model.set_adapter(name)
        texts[name] = text_alone(model.eval(), tokenizer, chat_ids(tokenizer, "hello"), 60)
    assert change(served, "load", lora_name="swap", lora_path="red").status_code == 200
    answers, is_over = [], threading.Event()

    def keep_asking():
        while not is_over.is_set():
            answers.append(ask(served, "swap", max_tokens=60))

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    for path in ("blue", "red") * 3:
        time.sleep(0.3)
        assert change(served, "load", lora_name="swap", lora_path=path, load_inplace=True).status_code == 200
        assert ask(served, "swap", max_tokens=60) == texts[path]
    is_over.set()
    for thread in threads:
        thread.join()
    assert set(answers) == set(texts.values())


@contextlib.contextmanager
def red_runs(served):
    """A block during which a request for "red" runs."""
    begin = {"model": "red", "messages": HELLO, "stream": True, "temperature": 0, "max_tokens": 480}
    with served.client().chat.completions.create(**begin, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        yield


@contextlib.contextmanager
def red_waits_to_be_replaced(served, path):
    """A block during which "red" waits to be replaced, because a request runs."""
    change_red = {"lora_name": "red", "lora_path": path, "load_inplace": True}
    replacing = threading.Thread(target=lambda: change(served, "load", **change_red))
    with red_runs(served):
        replacing.start()
        time.sleep(0.3)
        yield
        assert replacing.is_alive()
    replacing.join()


def test_nobody_waits_for_another_adapter_to_be_replaced(served, expected, monkeypatch):
    monkeypatch.setattr(served.engine.core.catalog._threads, "_max_workers", 1)
    with red_waits_to_be_replaced(served, "blue"):
        assert ask(served, "green") == expected["green"]  # its first use
        assert {each.id for each in served.client().models.list()} > {"red", "green"}
        assert served.engine.running["red"] == 1
    assert ask(served, "red") == expected["blue"]


def test_a_folder_that_is_renamed_while_its_adapter_waits_to_be_replaced(served, own, expected):
    shutil.copytree(own / "blue", own / "next")
    with red_waits_to_be_replaced(served, "next"):
        shutil.copytree(own / "green", own / "newer")
        shutil.rmtree(own / "next")
        os.rename(own / "newer", own / "next")
    assert ask(served, "red") == expected["green"]


def test_nobody_waits_for_a_crowd_that_names_a_replaced_adapter(served, own, expected):
    """Requests that wait for the new version occupy no threads, of which there are few."""
    with red_runs(served):
        shutil.copytree(own / "blue", own / "new")
        shutil.rmtree(own / "red")
        os.rename(own / "new", own / "red")
        crowd = [threading.Thread(target=ask, args=(served, "red")) for _ in range(THREADS + 8)]
        for thread in crowd:
            thread.start()
        while served.engine._prepared < len(crowd):
            time.sleep(0.001)
        assert ask(served, "green") == expected["green"]  # its first use
        assert served.engine.running["red"] == 1 and served.engine._prepared == len(crowd)
    for thread in crowd:
        thread.join()
    assert ask(served, "red") == expected["blue"]


def test_unloading_while_requests_run(served, expected):
    stream = served.client().chat.completions.create(
        model="red", messages=HELLO, stream=True, temperature=0, max_tokens=100, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert change(served, "unload", lora_name="red").status_code == 200
    rest = list(stream)  # it finished with the version it started with
    assert rest[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.NotFoundError):
        ask(served, "red")


def test_no_more_adapters_than_may_be_known(tokenizer, own):
    with serving(tiny_model(tokenizer), tokenizer, own, max_adapters=2) as served:
        ask(served, "red"), ask(served, "blue")
        with pytest.raises(openai.InternalServerError) as caught:
            ask(served, "green")
        assert (caught.value.status_code, caught.value.body["code"]) == (503, "too_many_adapters")
        assert ask(served, "red")


def test_adapters_outside_of_the_folder_by_name(tokenizer, own, tmp_path, expected):
    adapters = {"other": tmp_path / "outside"}
    with serving(tiny_model(tokenizer), tokenizer, None, adapters=adapters) as served:
        assert {model.id for model in served.client().models.list()} == {"base", "other"}
        assert ask(served, "other") == expected["red"]
        with pytest.raises(openai.NotFoundError):
            ask(served, "red")


def series(served):
    text = httpx.get(f"{served.url}/metrics").text
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("peft_multibatch_"): float(value) for name, value in lines}


def test_metrics_of_an_adapter_come_and_go_with_it(served, own):
    ask(served, "red"), ask(served, "base", extra_body={"adapter": {"red": 0.5, "blue": 0.5}})
    with pytest.raises(openai.NotFoundError):
        ask(served, "secret-name")
    time.sleep(0.1)  # records are written after answers
    found = series(served)
    assert found['requests_total{adapter="red",status="200"}'] == 1
    assert found['requests_total{adapter="mixture",status="200"}'] == 1
    assert found['requests_total{adapter="",status="404"}'] == 1
    assert found['generated_tokens_total{adapter="red"}'] == 12
    assert found['prompt_tokens_total{adapter="red"}'] == served.records[0].job.prompt_tokens
    assert found['time_to_first_token_seconds_count{adapter="red"}'] == 1
    assert 0 < found['time_to_first_token_seconds_sum{adapter="red"}'] < found['request_seconds_sum{adapter="red"}']
    assert found["running"] == found["waiting"] == 0
    assert found["adapters_known"] == found["adapters_loaded"] == found["adapter_loads_total"] == 2
    assert found["adapter_load_seconds_total"] > 0
    assert found["healthy"] == 1
    assert not any("secret-name" in name for name in found)
    change(served, "unload", lora_name="red")
    assert not any('"red"' in name for name in series(served))


def test_metrics_keep_no_series_of_what_was_unloaded_meanwhile(served):
    stream = served.client().chat.completions.create(model="red", messages=HELLO, stream=True, max_tokens=100)
    next(iter(stream))
    change(served, "unload", lora_name="red")
    list(stream)
    time.sleep(0.1)
    assert not any('"red"' in name for name in series(served))
