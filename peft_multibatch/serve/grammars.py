"""Structured output: compile a JSON schema to a grammar, which determines the tokens allowed next.

This uses llguidance, which the extra ``serve`` installs; without it, requests for structured output are rejected. A
schema's cost is bounded: its size, the time and memory to compile it (tried in a separate process, see
``schema_check.py``), and the work per token.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections import OrderedDict
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from peft_multibatch.serve.errors import ApiError, invalid, unsupported


PARAM = "response_format"

MAX_BYTES = 64_000
"""Maximum size of a schema as JSON."""

SECONDS = 10.0
"""Wall-clock limit for compiling a schema, on a busy machine; ``schema_check.py`` limits its CPU time."""

KEPT = 256
"""Number of compiled schemas that are cached."""

PER_TOKEN = {"step_lexer_fuel": 100_000, "step_max_items": 20_000, "max_lexer_states": 20_000}
"""Limits per request: some milliseconds per token, and tens of megabytes."""


class Grammar:
    """A compiled schema. Requests carry it as an option, and copies of a request share it.

    Args:
        matcher: llguidance's matcher, at the beginning of the text.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def start(self) -> Any:
        """Create a matcher for one answer."""
        return self._matcher.deep_copy()

    def __deepcopy__(self, memo: Any) -> Grammar:
        return self


class Grammars:
    """Compiles schemas for one model.

    Args:
        tokenizer: the model's tokenizer.
        ends: tokens that end a text.
        vocabulary: number of logits that the model returns.
    """

    def __init__(self, tokenizer: Any, ends: list[int], vocabulary: int) -> None:
        self._tokenizer, self._ends, self._vocabulary = tokenizer, ends, vocabulary
        self._lock = threading.Lock()
        self._prepared: Any = None  # llguidance's tokenizer, which takes up to a second to build
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._checks = asyncio.Semaphore(2)

    async def compile(self, text: str, threads: Executor) -> None:
        """Check and compile a JSON schema for ``get``.

        Args:
            text: from ``text_of``; keywords that llguidance doesn't know are errors.
            threads: compiles it.

        Raises:
            ApiError: llguidance isn't installed, doesn't support the model, or can't compile the schema.
        """
        self._check_possible()
        if text in self._kept:
            self._kept.move_to_end(text)
            return
        async with self._checks:
            await self._check(text)
        self._kept[text] = await asyncio.get_running_loop().run_in_executor(threads, self._compile, text)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def get(self, text: str) -> Grammar:
        """Return the grammar of a compiled schema; if others displaced it, compile it again."""
        return self._kept.get(text) or self._compile(text)

    def _check_possible(self) -> None:
        try:
            import llguidance  # noqa: F401
        except ImportError:
            raise unsupported(PARAM, "the server runs without llguidance, which its operator can install with pip "
                              "install 'peft-multibatch[serve]'") from None  # fmt: skip
        is_fast = isinstance(self._tokenizer, PreTrainedTokenizerFast)
        if not (is_fast and self._ends and len(self._tokenizer) <= self._vocabulary):
            raise unsupported(
                PARAM, "it needs a fast tokenizer with an end token, whose tokens are all in the model's vocabulary"
            )

    async def _check(self, text: str) -> None:
        worker = await asyncio.create_subprocess_exec(
            sys.executable, str(Path(__file__).with_name("schema_check.py")), stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            async with asyncio.timeout(SECONDS):
                said, _ = await worker.communicate(text.encode())
        except TimeoutError:
            raise _unfit("it takes too long to compile") from None
        finally:
            if worker.returncode is None:
                worker.kill()
                await worker.wait()
        if worker.returncode != 0:
            raise _unfit("it takes too much time or memory to compile")
        if said.strip():
            raise _unfit(_first_line(said.decode(errors="replace")))

    def _compile(self, text: str) -> Grammar:
        import llguidance
        import llguidance.hf

        with self._lock:
            if self._prepared is None:
                self._prepared = llguidance.hf.from_tokenizer(self._tokenizer, self._vocabulary, self._ends)
        limits = llguidance.LLParserLimits(verbose_errors=False, **PER_TOKEN)
        grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides={"lenient": False})
        matcher = llguidance.LLMatcher(self._prepared, grammar, log_level=0, limits=limits)
        matcher.compute_bitmask()  # fails for schemas that nothing matches
        if matcher.is_error():
            raise _unfit(_first_line(matcher.get_error()))
        return Grammar(matcher)


def text_of(schema: dict[str, Any]) -> str:
    """Convert a schema, as in OpenAI's API, to text.

    Raises:
        ApiError: it is too large, nested too deeply or contains a non-finite number.
    """
    try:
        text = json.dumps(schema, allow_nan=False)
    except ValueError:
        raise invalid(f"'{PARAM}' contains a non-finite number: expected finite ones.", PARAM) from None
    except RecursionError:
        raise _unfit("it is nested too deeply") from None
    if len(text) > MAX_BYTES:
        raise invalid(f"The schema of '{PARAM}' has {len(text)} bytes: expected at most {MAX_BYTES}.", PARAM)
    return text


def too_complex() -> ApiError:
    """An error for a schema that was compiled, but is too expensive to apply."""
    return _unfit("it takes too long to apply")


def _unfit(why: str) -> ApiError:
    return invalid(f"The schema of '{PARAM}' can't be used, because {why}: simplify it.", PARAM, "invalid_schema")


def _first_line(error: str) -> str:
    """Shorten llguidance's error message; details of panics don't help a client."""
    first = error.strip().splitlines()[0] if error.strip() else ""
    if first.startswith("panic") or not first:
        return "it is too complex"
    return "no text matches it" if first.startswith("NoExtension") else f"of this: {first:.200}"
