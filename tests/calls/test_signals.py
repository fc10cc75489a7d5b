"""An exception raised by a signal handler, such as Ctrl-C's KeyboardInterrupt, leaves no ids active.

Where a signal can strike: CPython runs Python's signal handlers only on the main thread, and only where its eval loop
checks for them. In CPython 3.11 these are the following places; a handler that recorded its frame's position 65,000
times found no others.

1. The first instruction of every Python function, and of a generator whenever it resumes after a ``yield`` (RESUME).
   Nothing of the function has run yet, even if it is an ``__exit__``.
2. The end of every call that isn't inlined into the eval loop: of a C function or method, of a class, of an object
   with ``__call__``, of anything with ``*args`` or ``**kwargs`` (PRECALL, CALL, CALL_FUNCTION_EX). The callee has
   finished, and its result is lost. Calls of plain Python functions are inlined and have no check after them, unless
   frame evaluation is replaced, as by ``torch.compile`` while its code runs.
3. Every backward jump, from the end of a loop's body to its head (JUMP_BACKWARD, POP_JUMP_BACKWARD_IF_*).
4. Inside C code that checks by itself, in particular while waiting for a lock: ``with lock:`` and ``lock.acquire()``
   raise without holding the lock.

There is no check between other instructions: none at ``return``, none between the return of ``__enter__`` and the
first instruction of the ``with`` block, and none where a ``with`` block calls ``__exit__``, until its RESUME. So a
context manager can be interrupted at places that are easily forgotten: in contextlib's ``__enter__`` right after
``next``, when the generator is at its ``yield`` but the ``with`` block is never entered; between ``ContextVar.set``
and the assignment of its token; at the RESUME of an ``__exit__`` in Python, which then does nothing at all.

How the tests strike there: a trace or profile function raises the exception, and Python raises it at the same
instruction as that of a signal handler.

1. At "call" of ``sys.setprofile``, which also reports generators that resume, if the instruction is a RESUME. There is
   none if an exception is thrown into a generator.
2. At "c_return" of C functions, and at "return" of Python functions if the caller is in the middle of a call. An
   exception at "return" ends the callee and is raised at the call, like that of the check after the call. Generators
   are left out, because an exception at the "return" of a ``yield`` would skip their ``finally``.
3. At "opcode" of ``sys.settrace``, at the target of a backward jump.
4. At "opcode" of BEFORE_WITH, and at "c_call" of ``acquire``.

Only frames of this package, of what it calls, and of contextlib on its behalf count. In all other frames, an
exception reaches the package from something that it called, which is one of these places as well. Other "line" or
"opcode" events don't count: it is impossible to be safe at each of them, for example right after ``__enter__``
returns.
"""

from __future__ import annotations

import contextlib
import contextvars
import dis
import functools
import inspect
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
import transformers
from models import row_by_row
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tolerances import relative_error
from torch import Tensor, nn

import peft_multibatch
from peft_multibatch import errors


PACKAGE = str(Path(peft_multibatch.__file__).parent)
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "vocab_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
INPUTS = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8], [9, 10, 11]]), "attention_mask": torch.ones(3, 3).long()}
NAMES = ["two", "__base__", "one"]
INJECTIONS = os.environ.get("MULTIBATCH_INJECTIONS", "")
"""For manual runs: the number of places at which each kind of call is struck, evenly spread, or ``all``. In CI
every place in the code is struck the first time that it is reached, at most ``IN_CI`` of them, evenly spread."""

IN_CI = 500
MANY = 10
"""Number of calls that may hang before a test gives up."""

SECONDS = float(os.environ.get("MULTIBATCH_SECONDS", 4))
"""Duration of the test with real signals."""

CALLS = ("CALL", "PRECALL")  # prefixes of opcode names
GENERATORS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

pytestmark = [
    # raised where exceptions can't propagate, such as in a generator's finalizer
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
]


class Struck(KeyboardInterrupt):
    """The exception that the signal handlers of these tests raise."""


@functools.cache
def instructions(code: CodeType) -> dict[int, dis.Instruction]:
    """Return the instruction at every offset, including offsets inside inline caches."""
    starts = {instruction.offset: instruction for instruction in dis.get_instructions(code)}
    found, last = {}, starts[0]
    for offset in range(0, len(code.co_code), 2):
        last = found[offset] = starts.get(offset, last)
    return found


def operation(frame: FrameType) -> str:
    return instructions(frame.f_code)[frame.f_lasti].opname if frame.f_lasti >= 0 else ""


@functools.cache
def is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(PACKAGE)


def counts(frame: FrameType | None) -> bool:
    """Whether a frame belongs to the package, or to contextlib on its behalf."""
    if frame is None or is_ours(frame.f_code):
        return frame is not None
    if frame.f_code.co_filename != contextlib.__file__:
        return False
    if frame.f_back is not None and is_ours(frame.f_back.f_code):
        return True
    generator = getattr(frame.f_locals.get("self"), "gen", None)
    return generator is not None and is_ours(generator.gi_code)


def where(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name} {operation(frame)}"


class Places:
    """Runs a call and records each place where a signal could strike, or raises ``Struck`` at one of them.

    Args:
        strike_at: the number of the place, counted from 0 in order of time; None to record them.
    """

    def __init__(self, strike_at: int | None = None) -> None:
        self.strike_at = strike_at
        self.seen = 0
        self.found: list[tuple] = []
        self.struck = ""
        self._before: dict[FrameType, str] = {}

    def run(self, call: Callable[[], Any]) -> None:
        """Raises: Struck, unless places are only recorded, or the call swallowed it."""
        before = sys.gettrace(), sys.getprofile()
        try:
            sys.settrace(self._trace)
            sys.setprofile(self._profile)
            call()
        finally:
            sys.setprofile(before[1])
            sys.settrace(before[0])
            self._before.clear()

    def _place(self, kind: str, frame: FrameType) -> None:
        if self.strike_at is None:
            outer = frame.f_back
            while outer is not None and not is_ours(outer.f_code):  # a place in contextlib counts once per caller
                outer = outer.f_back
            is_shared = not is_ours(frame.f_code) and outer is not None
            self.found.append(
                (kind, frame.f_code, frame.f_lasti, *((outer.f_code, outer.f_lasti) if is_shared else ()))
            )
        elif self.seen == self.strike_at:
            self.struck = f"{kind} {where(frame)}"
            sys.setprofile(None)
            sys.settrace(None)
            self.seen += 1
            raise Struck
        self.seen += 1

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            # a generator that is closed, or that an exception is thrown into, resumes without a RESUME
            if operation(frame) == "RESUME" and (counts(frame) or counts(frame.f_back)):
                self._place("start of", frame)
        elif event == "c_return":
            if counts(frame):
                self._place("after a call by", frame)
        elif event == "c_call":
            if argument.__name__ == "acquire" and counts(frame):
                self._place("waiting in", frame)
        elif event == "return":
            caller = frame.f_back
            if not frame.f_code.co_flags & GENERATORS and counts(caller) and operation(caller).startswith(CALLS):
                self._place("after a call by", caller)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not counts(frame):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._opcode

    def _opcode(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            now = operation(frame)
            before = self._before.get(frame, "")
            if "JUMP_BACKWARD" in before and "NO_INTERRUPT" not in before:
                self._place("at a jump back in", frame)
            elif now == "BEFORE_WITH":
                self._place("waiting in", frame)
            self._before[frame] = now
        elif event == "return":
            self._before.pop(frame, None)
        return self._opcode


class Subject:
    """A model, its outputs before anything struck it, and the kinds of calls that are struck."""

    def __init__(self) -> None:
        self.hung = 0  # calls on other threads that hung

    def build(self) -> None:
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
        shared = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
        targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
        self.model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, **shared), "one")
        self.model.add_adapter("two", LoraConfig(r=3, target_modules=["q_proj", "o_proj"], **shared))
        self.model.eval()
        self.expected = torch.cat(row_by_row(self.model, NAMES, INPUTS, lambda row: logits(self.model, row)))
        self.plain = logits(self.model)
        self.mb = peft_multibatch.enable(self.model)

    def renew(self, kind: str) -> None:
        """Start with a new model that has been called before."""
        self.build()
        self.prepare(kind)
        self.call(kind)
        self.model.zero_grad()

    def prepare(self, kind: str) -> None:
        """Prepare a call; this part isn't struck."""
        if kind == "first call after a change":
            if "new" in self.model.peft_config:
                self.model.delete_adapter("new")
            logits(self.model, adapter_ids=NAMES)
            self.model.add_adapter("new", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_bias=True))
            self.model.eval()
        if kind == "checkpointed training" and not self.model.training:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.set_requires_grad(["one", "two"])
            self.model.train()

    def call(self, kind: str) -> None:
        if kind == "generate":
            self.model.generate(**INPUTS, adapter_ids=NAMES, max_new_tokens=2, do_sample=False)
        elif kind == "checkpointed training":
            with self.mb.batch(NAMES):
                self.model(**INPUTS).logits.sum().backward()
        elif kind == "batch":
            with torch.no_grad(), self.mb.batch(NAMES):
                self.model(**INPUTS)
        else:
            logits(self.model, adapter_ids=NAMES)

    def faults(self) -> str:
        """Describe what is wrong with the following calls; empty if nothing is."""
        found = []
        checks = {
            "plain calls": self._plain_is_right,
            "calls with ids": self._rows_are_right,
            "calls with ids on another thread": lambda: self._on_another_thread(self._rows_are_right),
        }
        for what, check in checks.items():
            try:
                if not check():
                    found.append(f"{what} are wrong")
            except Exception as error:
                found.append(f"{what} raise {type(error).__name__} ({str(error)[:40]})")
        return ", ".join(found)

    def _plain_is_right(self) -> bool:
        return torch.equal(logits(self.model), self.plain)

    def _rows_are_right(self) -> bool:
        return relative_error(logits(self.model, adapter_ids=NAMES), self.expected) < 1e-5

    def _on_another_thread(self, call: Callable[[], bool]) -> bool:
        try:
            return on_a_new_thread(call, timeout=1 if self.hung else 5)
        except TimeoutError:
            self.hung += 1
            raise


def on_a_new_thread(call: Callable[[], Any], timeout: float) -> Any:
    """Raises: TimeoutError, and the exceptions of the call."""

    def work() -> None:
        try:
            answers.append((call(), None))
        except BaseException as error:
            answers.append((None, error))

    answers: list[tuple[Any, BaseException | None]] = []
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout)
    if not answers:
        raise TimeoutError("waits for ever")
    answer, error = answers[0]
    if error is not None:
        raise error
    return answer


def logits(model: Any, inputs: dict[str, Tensor] = INPUTS, **ids: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **ids).logits


def strike(subject: Subject, kind: str, place: int) -> tuple[str, str, str]:
    """Strike a call at one place.

    Returns:
        The place, or the empty string if the call didn't reach it; what is wrong while the exception, and with it
        its frames, is kept; what is wrong afterwards.
    """
    subject.prepare(kind)
    places, kept, raised = Places(place), "", "none"
    try:
        places.run(lambda: subject.call(kind))
    except BaseException as error:
        torch.set_grad_enabled(True)  # torch's own context managers may leave this behind
        kept, raised = subject.faults(), type(error).__name__
    torch.set_grad_enabled(True)
    gone = subject.faults()
    subject.model.zero_grad()
    if places.struck and raised != "Struck":
        gone = f"the signal's exception became {raised}{gone and ', '}{gone}"
    return places.struck, kept, gone


@functools.cache
def strikes(kind: str) -> tuple[int, int, list[str], list[str]]:
    """Return the number of places of a kind of call, how many were struck, and what was wrong while exceptions were
    kept and afterwards."""
    subject = Subject()
    subject.renew(kind)
    subject.prepare(kind)
    places = Places()
    places.run(lambda: subject.call(kind))
    subject.model.zero_grad()
    assert subject.faults() == ""
    chosen = list(range(places.seen))
    if not INJECTIONS:
        chosen = list({place: number for number, place in reversed([*enumerate(places.found)])}.values())[::-1]
    if INJECTIONS != "all":
        most = int(INJECTIONS or IN_CI)
        chosen = [chosen[index * len(chosen) // most] for index in range(most)] if len(chosen) > most else chosen
    kept, gone, reached, place = [], [], 0, ""
    for number in chosen:
        # a separate thread discards what is left in contexts and in torch's own state
        work = functools.partial(strike, subject, kind, number)
        before = place
        try:
            place, *faults = on_a_new_thread(work, timeout=120)
        except Exception as error:  # only the preparation of the call raises here
            gone.append(f"{before}: the next change raises {type(error).__name__} {str(error)[:60]}")
            faults = [True]
        else:
            reached += bool(place)
            for found, what in zip((kept, gone), faults):
                if what:
                    found.append(f"{place}: {what}")
        if subject.hung >= MANY:
            break
        if any(faults):
            on_a_new_thread(functools.partial(subject.renew, kind), timeout=120)
    return len(chosen), reached, kept, gone


def summary(found: Iterable[str]) -> str:
    return "\n".join(f"{number} x {what}" for what, number in Counter(found).most_common())


KINDS = ["forward", "generate", "batch", "checkpointed training", "first call after a change"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_ids_are_left_behind(kind):
    """Wherever a signal strikes, the next call is a plain one, and the next one with ids is right."""
    chosen, reached, _, gone = strikes(kind)
    if gone:
        pytest.fail(f"after {len(gone)} of {reached} strikes:\n{summary(gone)}")
    assert reached > 0.9 * chosen > 50


@pytest.mark.parametrize("kind", KINDS)
def test_no_ids_are_left_behind_while_the_exception_is_kept(kind):
    """As above, inside an ``except`` block, or in an interactive session that keeps the last exception.

    The exception's frames stay alive with it, and so does everything in them that is yet to be closed, so it isn't
    enough to release ids when a generator is collected. An ``__exit__`` in C, such as a lock's, can't be struck
    before it has finished.
    """
    _, reached, kept, _ = strikes(kind)
    if kept:
        pytest.fail(f"after {len(kept)} of {reached} strikes:\n{summary(kept)}")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs signal.setitimer")
def test_real_signals():
    """A timer's handler raises at random moments of short calls that spend nearly all of their time in the package."""
    model = nn.Sequential(nn.Linear(4, 4))
    for name in ("one", "two"):
        model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), model, name)
    model.requires_grad_(False)
    x, layer = torch.randn(3, 4), model[0]
    rows = []
    for row, name in enumerate(NAMES):
        layer.enable_adapters(name != "__base__")
        layer.set_adapter("one" if name == "__base__" else name)
        rows.append(model(x[row : row + 1]))
    layer.enable_adapters(True)
    layer.set_adapter("one")
    model.requires_grad_(False)
    mb = peft_multibatch.enable(model)
    plain, expected = model(x), torch.cat(rows)
    seen: Counter[str] = Counter()  # instructions of the package at which the handler ran
    wrong: Counter[str] = Counter()
    chance = random.Random(0)
    armed: set[float] = set()

    def handler(number: int, frame: FrameType) -> None:
        if not armed:  # the signal went to another thread and arrived late
            return
        if is_ours(frame.f_code):
            seen[operation(frame)] += 1
        raise Struck

    def with_ids() -> Tensor:
        return model(x, adapter_ids=NAMES)

    def block() -> Tensor:
        with mb.batch(NAMES):
            return model(x)

    def nested_blocks() -> Tensor:
        with mb.batch([0, 0, 0]):
            model(x)
            with mb.batch(NAMES):
                model(x)
            return model(x)

    def one_strike(call: Callable[[], Tensor], delay: float) -> bool:
        raised = ""
        try:
            try:
                armed.add(delay)
                signal.setitimer(signal.ITIMER_REAL, delay)
                call()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                armed.clear()
        except BaseException as error:
            raised = type(error).__name__
        torch.set_grad_enabled(True)
        faults = [f"the signal's exception became {raised}"] if raised not in ("", "Struck") else []
        try:
            if not torch.equal(model(x), plain):
                faults.append("the next plain call is wrong")
            if relative_error(with_ids(), expected) > 1e-5:
                faults.append("the next call with ids is wrong")
        except errors.MultibatchError as error:
            faults.append(f"the next call raises {type(error).__name__}")
        wrong.update([f"{call.__name__}: {', '.join(faults)}"] if faults else [])
        return raised != ""

    struck = 0
    before = signal.signal(signal.SIGALRM, handler)
    try:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            call = chance.choice([with_ids, block, nested_blocks])
            start = time.perf_counter()
            call()
            delay = chance.uniform(1e-6, 1.2 * (time.perf_counter() - start))
            struck += contextvars.copy_context().run(one_strike, call, delay)
    finally:
        signal.signal(signal.SIGALRM, before)
    if wrong:
        pytest.fail(f"after {struck} strikes, {seen.total()} of them in the package:\n{summary(wrong.elements())}")
    assert struck > 50 * SECONDS
    assert seen.total() > struck / 10
    if sys.version_info[:2] == (3, 11):  # the version that the module's docstring describes
        fused = {"COMPARE_OP"}  # fused with the following jump
        assert {name for name in seen if not name.startswith((*CALLS, "RESUME")) and "JUMP_BACK" not in name} <= fused
