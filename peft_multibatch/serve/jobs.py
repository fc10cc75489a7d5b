"""What a client asked for, without HTTP: prompts, how many answers to each, and how to choose tokens."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from peft_multibatch.serve.catalog import Target
from peft_multibatch.serve.errors import ApiError, too_long
from peft_multibatch.serve.logprobs import TokenLogprobs
from peft_multibatch.serve.text import Text


class Delta(NamedTuple):
    """What came since the last one.

    Attributes:
        choice: index of the answer.
        text: that may be shown.
        tokens: that came, with their log-probabilities where they were asked for.
        reason: why the answer ended, None where it goes on: ``"stop"`` or ``"length"``.
    """

    choice: int
    text: str
    tokens: list[tuple[int, TokenLogprobs | None]]
    reason: str | None


class Sequence:
    """One answer as it grows.

    Args:
        index: of the answer.
        prompt: its tokens.
        options: for the manager's ``add_request``.
        text: an empty one.
    """

    def __init__(self, index: int, prompt: list[int], options: dict[str, Any], text: Text) -> None:
        self.index, self.prompt, self.options = index, prompt, options
        self._text, self._known = text, 0

    def take(self, output: Any, ends: list[int]) -> Delta:
        """Read an output of the manager's, of which the beginning is known.

        Args:
            output: of all tokens so far.
            ends: tokens behind which nothing comes.
        """
        ids, logprobs = output.generated_tokens[self._known :], output.logprobs[self._known :]
        tokens = list(zip(ids, logprobs or [None] * len(ids)))
        text = ""
        if not self._text.has_stops:
            text = self._text.push(ids)
        else:
            for taken, token in enumerate(ids, start=1):
                text += self._text.push([token])
                if self._text.is_stopped:
                    return Delta(self.index, text, tokens[:taken], "stop")
        self._known += len(ids)
        if not output.is_finished():
            return Delta(self.index, text, tokens, None)
        text += self._text.finish()
        is_end = bool(ids) and ids[-1] in ends
        return Delta(self.index, text, tokens, "stop" if is_end or self._text.is_stopped else "length")


class Inbox:
    """What came for a job, of which only the newest output of each answer is kept: it has all that came before."""

    def __init__(self) -> None:
        self._found: dict[Any, tuple[Any, Exception | None]] = {}
        self._error: ApiError | None = None
        self._is_new = asyncio.Event()

    def put(self, output: Any, cause: Exception | None) -> None:
        """An output of the manager's, and the exception behind its error."""
        self._found[output.request_id] = output, cause
        self._is_new.set()

    def fail(self, error: ApiError) -> None:
        """End the job, whatever else came."""
        self._error = error
        self._is_new.set()

    async def take(self) -> list[tuple[Any, Exception | None]]:
        """What is new, once there is something.

        Raises:
            ApiError: the job was ended.
        """
        await self._is_new.wait()
        self._is_new.clear()
        if self._error is not None:
            raise self._error
        found, self._found = self._found, {}
        return list(found.values())


@dataclass
class Job:
    """What one HTTP request asks the engine for.

    Attributes:
        request_id: of the HTTP request.
        target: what it runs under.
        prompts: tokens of each.
        param: of the request, that has the prompt.
        n: answers to each prompt.
        max_tokens: of each answer; as many as there is room for where not given.
        stops: strings at which answers end.
        options: for choosing tokens, as the manager's ``add_request`` takes them, without a seed.
        seed: of what is sampled; each answer's is one higher than the last one's.
        ignore_eos: whether answers go on behind the model's own end.
        is_streamed: whether the client gets text as it comes.
        arrived: when, by ``time.perf_counter``.
        first_token: when the first token came, in seconds behind ``arrived``.
        completion_tokens: generated so far.
    """

    request_id: str
    target: Target
    prompts: list[list[int]]
    param: str
    n: int = 1
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    ignore_eos: bool = False
    is_streamed: bool = False
    arrived: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    completion_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    def usage(self) -> dict[str, int]:
        """OpenAI's count of tokens."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def max_tokens_of(self, prompt: list[int], limit: int) -> int:
        """How many tokens the answer to a prompt may have.

        Raises:
            ApiError: there is no room for it.
        """
        asked = 1 if self.max_tokens is None else self.max_tokens
        if len(prompt) + asked > limit:
            raise too_long(len(prompt), asked, limit, self.param)
        return limit - len(prompt) if self.max_tokens is None else self.max_tokens

    def sequences(self, tokenizer: Any) -> Iterator[Sequence]:
        """The answers to be generated, in the order of the prompts."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        for index in range(len(self.prompts) * self.n):
            options = dict(self.options)
            if "temperature" in options:
                options["seed"] = seed + index
            yield Sequence(index, self.prompts[index // self.n], options, Text(tokenizer, self.stops))

    def count(self, delta: Delta, output: Any) -> None:
        """Note what came."""
        self.completion_tokens += len(delta.tokens)
        if self.first_token is None and delta.tokens:
            came = output.timestamps[0] if output.timestamps else time.perf_counter()
            self.first_token = came - self.arrived
