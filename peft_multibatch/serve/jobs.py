"""A job: what a request asks for, independent of HTTP, and the answers generated so far."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from peft_multibatch.serve.errors import ApiError, too_long
from peft_multibatch.serve.logprobs import TokenLogprobs
from peft_multibatch.serve.messages import Order, Output, Target
from peft_multibatch.serve.text import Text


class Delta(NamedTuple):
    """New output of an answer since the previous delta.

    Attributes:
        choice: index of the answer.
        text: text that can be sent to the client.
        tokens: new tokens, with their log-probabilities if requested.
        reason: why the answer ended, ``"stop"`` or ``"length"``; None while it continues.
    """

    choice: int
    text: str
    tokens: list[tuple[int, TokenLogprobs | None]]
    reason: str | None


class Sequence:
    """An answer that is being generated.

    Args:
        index: the answer's index.
        prompt: tokens of the prompt.
        options: sampling options.
        text: an empty text.
    """

    def __init__(self, index: int, prompt: list[int], options: dict[str, Any], text: Text) -> None:
        self.index, self.prompt, self.options = index, prompt, options
        self._text = text
        self._last: int | None = None  # the newest token

    def take(self, output: Output, ends: list[int]) -> Delta:
        """Return what an output adds.

        Args:
            output: the next output.
            ends: tokens that end the text.
        """
        ids = output.tokens
        logprobs: list[TokenLogprobs | None] = [*output.logprobs] or [None] * len(ids)
        tokens = list(zip(ids, logprobs))
        text = ""
        if not self._text.has_stops:
            text = self._text.push(ids)
        else:
            for taken, token in enumerate(ids, start=1):
                text += self._text.push([token])
                if self._text.is_stopped:
                    return Delta(self.index, text, tokens[:taken], "stop")
        self._last = ids[-1] if ids else self._last
        if not output.is_finished:
            return Delta(self.index, text, tokens, None)
        text += self._text.finish()
        return Delta(self.index, text, tokens, "stop" if self._last in ends or self._text.is_stopped else "length")


class Inbox:
    """What is new in each answer of a job."""

    def __init__(self) -> None:
        self._found: dict[str, Output] = {}
        self._error: ApiError | None = None
        self._is_new = asyncio.Event()

    def put(self, output: Output) -> None:
        """Add the next output of an answer."""
        before = self._found.get(output.name)
        self._found[output.name] = output if before is None else before.followed_by(output)
        self._is_new.set()

    def fail(self, error: ApiError) -> None:
        """End the job with an error."""
        self._error = error
        self._is_new.set()

    async def take(self) -> list[Output]:
        """Wait for new outputs and return them, joined for each answer.

        Raises:
            ApiError: the job was ended with an error.
        """
        await self._is_new.wait()
        self._is_new.clear()
        if self._error is not None:
            raise self._error
        found, self._found = self._found, {}
        return list(found.values())


@dataclass
class Job:
    """The work of one HTTP request.

    Attributes:
        request_id: the id of the HTTP request.
        target: the adapters that it uses.
        prompts: the tokens of each prompt.
        param: the request parameter that contains the prompt.
        n: number of answers per prompt.
        max_tokens: maximum number of tokens per answer; by default as many as fit.
        stops: stop strings.
        options: sampling options as in ``Order``, without the seed.
        seed: seed of the first answer; each further answer's is one higher.
        ignore_eos: whether to continue after the model's end token.
        is_streamed: whether the answer is streamed.
        arrived: time of arrival, by ``time.perf_counter``.
        first_token: time of the first token, in seconds after ``arrived``.
        completion_tokens: number of tokens generated so far.
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
        """Number of tokens of all prompts."""
        return sum(map(len, self.prompts))

    def usage(self) -> dict[str, int]:
        """Token counts in OpenAI's format."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def max_tokens_of(self, prompt: list[int], limit: int) -> int:
        """Return the maximum number of tokens of the answer to a prompt.

        Raises:
            ApiError: prompt and answer exceed the limit.
        """
        asked = 1 if self.max_tokens is None else self.max_tokens
        if len(prompt) + asked > limit:
            raise too_long(len(prompt), asked, limit, self.param)
        return limit - len(prompt) if self.max_tokens is None else self.max_tokens

    def sequences(self, tokenizer: Any) -> Iterator[Sequence]:
        """The answers to be generated, in the order of the prompts."""
        seed = self.seed or 0
        if self.seed is None and "temperature" in self.options:
            seed = secrets.randbits(63)
        for index in range(len(self.prompts) * self.n):
            options = dict(self.options)
            if "temperature" in options:
                options["seed"] = seed + index
            yield Sequence(index, self.prompts[index // self.n], options, Text(tokenizer, self.stops))

    def order(self, sequence: Sequence, name: str, limit: int) -> Order:
        """Order an answer.

        Args:
            sequence: one of ``sequences``.
            name: the answer's name.
            limit: maximum number of tokens of a prompt and its answer.
        """
        return Order(
            name,
            self.request_id,
            self.target,
            sequence.prompt,
            self.max_tokens_of(sequence.prompt, limit),
            self.ignore_eos,
            is_streamed=self.is_streamed or bool(self.stops),
            is_urgent=bool(self.stops),  # a stop string should end its request at once
            options=sequence.options,
        )

    def count(self, delta: Delta, output: Output) -> None:
        """Update the token counts and times."""
        self.completion_tokens += len(delta.tokens)
        if self.first_token is None and delta.tokens:
            self.first_token = output.time - self.arrived
