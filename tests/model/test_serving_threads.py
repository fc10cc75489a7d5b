"""Threads that serve while another one changes the model: every row matches PEFT with that adapter alone.

First at random, for a given time: two threads serve, and a third one adds, swaps and deletes adapters. Then with
the window held open: a call with ids is stopped half way, another thread makes one change, and the call continues.
The change may wait until the call has ended, or happen at once; in both cases the call isn't affected. And the
other way round: PEFT is stopped half way through a change, while another thread calls the model.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import alone, base_model, left_padded, row_by_row
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from tolerances import RELATIVE_ERROR, assert_close, relative_error
from torch import Tensor, nn

import peft_multibatch
from peft_multibatch import errors


SECONDS = float(os.environ.get("MULTIBATCH_SECONDS", 8))
"""How long threads serve at random. If it is set, the other tests run in all combinations, too."""

INPUTS = left_padded()
FIXED = ["one", "two", "three"]
NAMES = ["one", "two", "__base__", "three", "two", "one"]
TOKENS = 4
SHARED = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
# Adapters added while others serve. The fixed adapters are plain LoRA on q_proj, k_proj, v_proj and down_proj.
ADDED = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "on layers that had none": {"target_modules": ["o_proj", "gate_proj", "up_proj"]},
    "lora_bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "DoRA": {"target_modules": ["k_proj", "down_proj"], "use_dora": True},
    "dropout": {"target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.5},
    "rank_pattern": {"target_modules": ["q_proj", "k_proj", "v_proj"], "rank_pattern": {"k_proj": 7, "v_proj": 1}},
    "modules_to_save": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
]


def config(rank: int = 2, **options: Any) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, **SHARED, **options)


def served_model(kind: str = "fast", architecture: str = "llama") -> PeftModel:
    """Three adapters on fused layers or, if ``varied``, partly on layers that run per segment."""
    varied = kind == "varied"
    attention = ["q_proj", "k_proj", "v_proj"]
    one = config(3, target_modules=attention, lora_bias=varied)
    two = config(4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"] if varied else None)
    three = config(8, target_modules=[*attention, "down_proj", *(["embed_tokens"] if varied else [])])
    model = get_peft_model(base_model(architecture), one, "one")
    model.add_adapter("two", two)
    model.add_adapter("three", three)
    for name in FIXED:
        randomize(model, name)
    return model.eval()


def randomize(model: nn.Module, name: str) -> None:
    """Give an adapter distinct weights, even if PEFT initializes copies of the base's."""
    for key, parameter in model.named_parameters():
        if f".{name}" in key and ("lora_" in key or "modules_to_save" in key):
            is_positive = "magnitude" in key or "modules_to_save" in key
            values = torch.rand_like(parameter) + 0.5
            parameter.data = parameter.data * values if is_positive else torch.randn_like(parameter) / 4


def logits(model: nn.Module, inputs: dict[str, Tensor] = INPUTS, **ids: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **ids).logits


def generated(model: nn.Module, inputs: dict[str, Tensor] = INPUTS, **options: Any) -> Tensor:
    return model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, **options)


def one_at_a_time(model: PeftModel, names: list[str], call: Callable = logits) -> Tensor:
    return torch.cat(row_by_row(model, names, INPUTS, lambda row: call(model, row)))


def saved(model: PeftModel, name: str, folder: Path, rank: int | None = None, **options: Any) -> str:
    """Save an adapter like one of the model's, with other weights, and with its rank or another one."""
    if rank is not None or options:
        other = get_peft_model(base_model(model.config.model_type), config(rank or 2, **options), name)
    else:
        other = copy.deepcopy(model)
    randomize(other, name)
    other.save_pretrained(folder, selected_adapters=[name])
    return str(folder / name)


class Server(threading.Thread):
    """Calls the model with random rows and ids until it is stopped, and compares every row.

    Args:
        expected: the expected logits and generated tokens of every row, by adapter name.
        change: the current change on the other thread, for messages.
    """

    def __init__(self, seed: int, mb: Any, model: PeftModel, expected: dict[str, tuple], change: list[str]) -> None:
        super().__init__(name=f"server {seed}", daemon=True)
        self.chance = random.Random(seed)
        self.mb, self.model, self.expected, self.change = mb, model, expected, change
        self.stop = threading.Event()
        self.calls = self.rows = 0
        self.faults: Counter[str] = Counter()

    def run(self) -> None:
        while not self.stop.is_set():
            before = self.change[0]
            try:
                wrong = self._serve()
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(last.filename).name}:{last.lineno}"
                self.faults[f"{type(error).__name__} at {place} ({str(error)[:60]}): {self._during(before)}"] += 1
            else:
                if wrong:
                    self.faults[f"wrong rows: {self._during(before)}"] += wrong
            self.calls += 1

    def _during(self, before: str) -> str:
        return " ... ".join(dict.fromkeys([before, self.change[0]]))

    def _serve(self) -> int:
        rows = self.chance.choices(range(len(INPUTS["input_ids"])), k=self.chance.randint(1, 6))
        names = self.chance.choices([*FIXED, "__base__"], k=len(rows))
        inputs = {key: value[rows] for key, value in INPUTS.items()}
        in_block, generates = self.chance.random() < 0.5, self.chance.random() < 0.2
        call = generated if generates else logits
        if in_block:
            with self.mb.batch(names):
                found = call(self.model, inputs)
        else:
            found = call(self.model, inputs, adapter_ids=names)
        self.rows += len(rows)
        expected = torch.stack([self.expected[name][generates][row] for name, row in zip(names, rows)])
        if generates:
            return int((found != expected).any(1).sum())
        allowed = RELATIVE_ERROR[torch.float32]
        return sum(relative_error(mine, theirs) > allowed for mine, theirs in zip(found, expected))


def test_adapters_come_and_go_while_threads_serve(tmp_path):
    model = served_model()
    model.add_adapter("spare", config(4, target_modules=["q_proj", "k_proj"]))
    model.eval()
    swaps = [saved(model, "spare", tmp_path / str(number)) for number in range(2)]
    folder = saved(model, "new", tmp_path, rank=5, target_modules=["q_proj", "o_proj"])
    expected = {
        name: (one_at_a_time(model, [name] * 6), one_at_a_time(model, [name] * 6, generated))
        for name in (*FIXED, "__base__")
    }
    mb, change = peft_multibatch.enable(model), ["nothing yet"]
    servers = [Server(seed, mb, model, expected, change) for seed in range(2)]
    changes, alive, faults = 0, deque(), Counter()

    def one_change(number: int, kind: str) -> None:
        while len(alive) > 3:
            name, old = alive.popleft()
            change[0] = f"deleting {old}"
            model.delete_adapter(name)
        change[0] = kind if kind in ("hot-swap", "disable_adapter") else f"adding {kind}"
        if kind == "hot-swap":
            hotswap_adapter(model, swaps[number % 2], adapter_name="spare", torch_device="cpu")
            return
        if kind == "disable_adapter":
            with model.disable_adapter():
                logits(model)
            return
        name = next(name for name in map("new{}".format, itertools.count()) if name not in model.peft_config)
        alive.append((name, kind))
        if kind == "folder":
            model.load_adapter(folder, adapter_name=name)
        else:
            model.add_adapter(name, config(2 + number % 3, **ADDED[kind]))
        randomize(model, name)
        model.eval()
        change[0] = f"checking {kind}"
        names = [name, "one", name, "two", "three", name]
        mixed, right = logits(model, adapter_ids=names), one_at_a_time(model, names)
        if relative_error(mixed, right) > RELATIVE_ERROR[torch.float32]:
            faults[f"the new adapter is wrong: {kind}"] += 1

    for server in servers:
        server.start()
    end, kinds = time.monotonic() + SECONDS, itertools.cycle([*ADDED, "folder", "hot-swap", "disable_adapter"])
    while time.monotonic() < end:
        try:
            one_change(changes, next(kinds))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            faults[f"{type(error).__name__} at {place} ({str(error)[:60]}) while {change[0]}"] += 1
        changes += 1
    for server in servers:
        server.stop.set()
    for server in servers:
        server.join(60)
        assert not server.is_alive(), f"{server.name} hangs"
        faults += server.faults
    calls, rows = (sum(getattr(server, what) for server in servers) for what in ("calls", "rows"))
    if faults:
        lines = "\n".join(f"{number} x {what}" for what, number in faults.most_common())
        pytest.fail(f"in {calls} calls of {rows} rows, with {changes} changes:\n{lines}")
    assert calls > 5 * SECONDS and changes > len(ADDED) + 3


class Window:
    """Work on a separate thread that is stopped half way, while other work runs on another thread.

    Args:
        work: the work, which stops at ``wait``; other threads pass it.
        name: the name of its thread.
    """

    def __init__(self, work: Callable[[], Any], name: str) -> None:
        self._opened, self._closed = threading.Event(), threading.Event()
        self._passed = 0
        self.stopped = Task(work, name)

    def wait(self, nth: int = 1) -> None:
        """Stop the work at the n-th call."""
        if threading.current_thread() is not self.stopped:
            return
        self._passed += 1
        if self._passed == nth:
            self._opened.set()
            assert self._closed.wait(60)

    def close(self) -> None:
        """Let the work continue, and wait for its end."""
        self._closed.set()
        self.stopped.join(60)
        assert not self.stopped.is_alive(), f"{self.stopped.name} hangs"

    def run(self, other: Callable[[], Any], name: str) -> tuple[Task, bool]:
        """Run other work while the window is open; the window is closed if it isn't done within a second.

        Returns:
            The other work, and whether it was done before the window was closed.
        """
        self.stopped.start()
        while not self._opened.wait(0.02):
            assert self.stopped.is_alive(), f"{self.stopped.name} ended without a stop: {self.stopped.error!r}"
        task = Task(other, name)
        task.start()
        task.join(1)
        was_done = not task.is_alive() and not self._closed.is_set()
        self.close()
        task.join(60)
        assert not task.is_alive(), f"{name} hangs"
        return task, was_done


class Task(threading.Thread):
    """A thread that keeps what its function returned or raised."""

    def __init__(self, function: Callable[[], Any], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.function = function
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.value = self.function()
        except BaseException as error:
            self.error = error

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


def add(kind: str) -> Callable:
    def change(model: PeftModel, path: Path, window: Window) -> None:
        model.add_adapter("new", config(**ADDED[kind]))
        randomize(model, "new")
        model.eval()

    change.__name__ = f"add {kind}"
    return change


def add_half_way(kind: str) -> Callable:
    """PEFT adds layers that run the new adapter, and finally deactivates it; there it waits for the call's end."""

    def change(model: PeftModel, path: Path, window: Window) -> None:
        def set_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
            window.close()
            original(self, *args, **kwargs)

        original = BaseTuner.set_adapter
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BaseTuner, "set_adapter", set_adapter)
            add(kind)(model, path, window)

    change.__name__ = f"add {kind} half way"
    return change


def load(model: PeftModel, path: Path, window: Window) -> None:
    model.load_adapter(path / "new", adapter_name="new")


def delete_what_the_call_uses(model: PeftModel, path: Path, window: Window) -> None:
    model.delete_adapter("two")


def delete_the_active_one(model: PeftModel, path: Path, window: Window) -> None:
    model.delete_adapter("one")


def delete_and_add(model: PeftModel, path: Path, window: Window) -> None:
    model.delete_adapter("two")
    model.add_adapter("two", config(5, target_modules=["q_proj", "down_proj"]))
    model.eval()


def swap_for_a_larger_rank(model: PeftModel, path: Path, window: Window) -> None:
    hotswap_adapter(model, str(path / "larger" / "two"), adapter_name="two", torch_device="cpu")


def swap_in_place(model: PeftModel, path: Path, window: Window) -> None:
    hotswap_adapter(model, str(path / "same" / "two"), adapter_name="two", torch_device="cpu")


def select_another(model: PeftModel, path: Path, window: Window) -> None:
    model.set_adapter("three")


def disable_adapters_until_the_call_has_ended(model: PeftModel, path: Path, window: Window) -> Tensor:
    with model.disable_adapter():
        found = logits(model)
        window.close()
        return found


def change_nothing(model: PeftModel, path: Path, window: Window) -> None:
    pass


ADDITIONS = [*map(add, ADDED), *map(add_half_way, ("on layers that had none", "lora_bias", "embedding")), load]
REMOVALS = [
    delete_what_the_call_uses, delete_the_active_one, delete_and_add, swap_for_a_larger_rank, swap_in_place,
]  # fmt: skip
OTHERS = [change_nothing, select_another, disable_adapters_until_the_call_has_ended]
GONE = {delete_what_the_call_uses: "two", delete_the_active_one: "one"}
CALLS = ["forward", "generate", "generate in a block"]


def some(*choices: list) -> list[tuple]:
    """All combinations or, in CI, all except those of the last choice, whose values alternate."""
    if "MULTIBATCH_SECONDS" in os.environ:
        return list(itertools.product(*choices))
    return [
        (*rest, choices[-1][index % len(choices[-1])]) for index, rest in enumerate(itertools.product(*choices[:-1]))
    ]


def name_of(value: Any) -> str:
    return value.__name__.replace("_", " ") if callable(value) else str(value)


def held(model: PeftModel, mb: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> Window:
    """A call that is stopped between ``q_proj`` and ``k_proj`` of the first layer, or between two forward passes."""

    def pause(input_ids: Tensor, scores: Tensor) -> Tensor:
        window.wait(nth=2)
        return scores

    def call() -> Tensor:
        if kind == "forward":
            return logits(model, adapter_ids=NAMES)
        if kind == "generate":
            return generated(model, adapter_ids=NAMES, logits_processor=[pause])
        with mb.batch(NAMES):
            return generated(model, logits_processor=[pause])

    window = Window(call, "the running call")
    if kind == "forward":
        norm = model.base_model.model.model.layers[0].self_attn.q_norm  # its input is q_proj's output
        forward = norm.forward

        def slow(x: Tensor) -> Tensor:
            window.wait()
            return forward(x)

        monkeypatch.setattr(norm, "forward", slow)
    return window


def check_rows(kind: str, found: Tensor, expected: Tensor, rows: list[int] | None = None) -> None:
    wrong = []
    for row in range(len(NAMES)) if rows is None else rows:
        if kind == "forward":
            is_right = relative_error(found[row], expected[row]) < RELATIVE_ERROR[torch.float32]
        else:
            is_right = torch.equal(found[row], expected[row])
        if not is_right:
            wrong.append(f"{row} ({NAMES[row]})")
    assert not wrong, f"wrong rows: {', '.join(wrong)}"


@pytest.mark.parametrize(
    ("served", "when", "change", "kind"),
    [
        *some(["fast", "varied"], ["later"], [*ADDITIONS, *REMOVALS, *OTHERS], CALLS),
        *some(["fast", "varied"], ["first call"], REMOVALS, CALLS),
    ],
    ids=name_of,
)
def test_a_change_while_a_call_is_under_way(served, when, change, kind, tmp_path, monkeypatch):
    """``first call``: no adapter was read before the stopped call."""
    model = served_model(served, "qwen3")
    if change is load:
        saved(model, "new", tmp_path, rank=5, target_modules=["q_proj", "o_proj"])
    elif change in (swap_for_a_larger_rank, swap_in_place):
        if served == "varied":
            pytest.skip("PEFT can't swap modules_to_save")
        saved(model, "two", tmp_path / "larger", rank=9, target_modules=["q_proj", "down_proj"])
        saved(model, "two", tmp_path / "same")
    expected = one_at_a_time(model, NAMES, logits if kind == "forward" else generated)
    base = alone(model, None, lambda: logits(model))
    mb = peft_multibatch.enable(model)
    if when != "first call":
        logits(model, adapter_ids=NAMES)
    window = held(model, mb, kind, monkeypatch)

    def work() -> Any:
        found = change(model, tmp_path, window)
        logits(model, adapter_ids=["__base__"] * 6)  # the first call after a change reads it
        return found

    changer, _ = window.run(work, "the change")
    value = changer.result()
    # rows whose weights are modified in place during the call are the writer's responsibility; only the others count
    others = [row for row, name in enumerate(NAMES) if name != "two"] if change is swap_in_place else None
    check_rows(kind, window.stopped.result(), expected, others)
    if change is disable_adapters_until_the_call_has_ended:
        assert torch.equal(value, base)

    # afterwards the change has taken effect
    gone = GONE.get(change)
    names = [name for name in NAMES if name != gone]
    if "new" in model.peft_config:
        names[0] = "new"
    names = (names * 2)[:6]
    if gone is not None:
        with pytest.raises(errors.UnknownAdapterError):
            logits(model, adapter_ids=[gone] * 6)
    if gone == "one":
        model.set_adapter("three")
    assert_close(logits(model, adapter_ids=names), one_at_a_time(model, names))


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("served", ["fast", "varied"])
def test_disabling_while_a_call_is_under_way(served, kind, monkeypatch):
    """``disable`` waits until the call has ended, or names the call's thread and changes nothing."""
    model = served_model(served, "qwen3")
    plain = logits(model)
    expected = one_at_a_time(model, NAMES, logits if kind == "forward" else generated)
    mb = peft_multibatch.enable(model)
    window = held(model, mb, kind, monkeypatch)
    changer, was_done = window.run(mb.disable, "the change")
    check_rows(kind, window.stopped.result(), expected)
    if changer.error is not None:
        assert isinstance(changer.error, errors.ModelStateError)
        assert window.stopped.name in str(changer.error)
        assert_close(logits(model, adapter_ids=NAMES), one_at_a_time(model, NAMES))
        mb.disable()
    else:
        assert not was_done, "disable returned while a call was running"
    assert torch.equal(logits(model), plain)
    assert "forward" not in model.__dict__
    peft_multibatch.enable(model)
    assert_close(logits(model, adapter_ids=NAMES), one_at_a_time(model, NAMES))


def kinds_of(cls: type) -> list[type]:
    return [cls, *(kind for child in cls.__subclasses__() for kind in kinds_of(child))]


def stopping(method: Callable, window: Window, nth: int, is_before: bool) -> Callable:
    """Wrap a method so that it stops the window's work at the n-th call, before or after it runs."""

    def stops(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_before:
            window.wait(nth)
        found = method(self, *args, **kwargs)
        if not is_before:
            window.wait(nth)
        return found

    return stops


STEPS = {
    "first layer": (LoraLayer, "update_layer", 1),
    "second layer": (LoraLayer, "update_layer", 2),
    "before it is made inactive": (BaseTuner, "set_adapter", 1),
    "deletion": (BaseTunerLayer, "delete_adapter", 2),
}
"""The methods of PEFT at whose n-th call a change is stopped: ``set_adapter`` before it runs, the others after it."""


@pytest.mark.parametrize(("served", "kind", "step"), some(["fast", "varied"], [*ADDED], [*STEPS]), ids=name_of)
def test_calls_while_a_change_is_under_way(served, kind, step, tmp_path, monkeypatch):
    """PEFT is stopped half way through adding or deleting an adapter; calls may wait for it, or run at once."""
    model = served_model(served)
    expected = one_at_a_time(model, NAMES)
    peft_multibatch.enable(model)
    logits(model, adapter_ids=NAMES)
    if step == "deletion":
        add(kind)(model, tmp_path, None)
        logits(model, adapter_ids=NAMES)
        window = Window(lambda: model.delete_adapter("new"), "the running change")
    else:
        window = Window(lambda: add(kind)(model, tmp_path, None), "the running change")
    owner, method, nth = STEPS[step]
    for cls in kinds_of(owner):
        if method in cls.__dict__:
            monkeypatch.setattr(cls, method, stopping(cls.__dict__[method], window, nth, method == "set_adapter"))
    task, _ = window.run(lambda: logits(model, adapter_ids=NAMES), "a call")
    window.stopped.result()
    check_rows("forward", task.result(), expected)
    check_rows("forward", logits(model, adapter_ids=NAMES), expected)
    names = NAMES if step == "deletion" else ["new", *NAMES[1:]]
    assert_close(logits(model, adapter_ids=names), one_at_a_time(model, names))


def test_disabling_inside_ones_own_block_does_not_wait_for_itself():
    model = served_model()
    mb = peft_multibatch.enable(model)

    def work() -> None:
        with mb.batch(NAMES):
            logits(model)
            mb.disable()

    task = Task(work, "who disables")
    task.start()
    task.join(20)
    assert not task.is_alive()
    assert task.error is None or isinstance(task.error, errors.ModelStateError)
