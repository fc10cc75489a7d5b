"""Convert generated text to OpenAI's response format, whole or in chunks.

Responses are plain dictionaries, and what all chunks of a stream begin with is encoded once, because they are built in
competition with the model's thread for the GIL.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from peft_multibatch.serve.jobs import Delta, Job
from peft_multibatch.serve.text import token_text


class Answer:
    """The answers of one job.

    Args:
        job: the job.
        model: the model's name in the request.
        tokenizer: the model's tokenizer.
        with_usage: whether a stream ends with the token counts.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, job: Job, model: str, tokenizer: Any, with_usage: bool = False) -> None:
        self._job, self._tokenizer, self._with_usage = job, tokenizer, with_usage
        self._head = {"id": f"{self.prefix}-{job.request_id}", "created": int(time.time()), "model": model}
        self._asks_logprobs = "logprobs" in job.options
        self._length: dict[int, int] = {}  # characters of each answer so far

    async def whole(self, deltas: AsyncIterator[Delta]) -> dict[str, Any]:
        """Build the response of a request that isn't streamed."""
        found: dict[int, list[Delta]] = {}
        async for delta in deltas:
            found.setdefault(delta.choice, []).append(delta)
        choices = [self._choice(_joined(found[index])) for index in sorted(found)]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self._job.usage()}

    async def chunks(self, deltas: AsyncIterator[Delta]) -> AsyncIterator[list[str]]:
        """Build the chunks of a stream as JSON, those of each delta together."""
        head = {**self._head, "object": self.chunk_kind}
        if self._with_usage:
            head["usage"] = None
        start = json.dumps({**head, "choices": []}).removesuffix("]}")
        async for delta in deltas:
            if found := [f"{start}{json.dumps(choice)}]}}" for choice in self._parts(delta)]:
                yield found
        if self._with_usage:
            yield [json.dumps({**head, "choices": [], "usage": self._job.usage()})]

    def _choice(self, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def _parts(self, delta: Delta) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def _is_empty(self, delta: Delta) -> bool:
        return not delta.text and delta.reason is None and not (self._asks_logprobs and delta.tokens)


class ChatAnswer(Answer):
    """Answers of ``/v1/chat/completions``."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"index": delta.choice, "message": message, "logprobs": self._logprobs(delta),
                "finish_reason": delta.reason}  # fmt: skip

    def _parts(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if delta.choice not in self._length:
            self._length[delta.choice] = 0
            yield self._part(delta.choice, {"role": "assistant", "content": ""}, None, None)
        if delta.text or (self._asks_logprobs and delta.tokens):
            yield self._part(delta.choice, {"content": delta.text}, self._logprobs(delta), None)
        if delta.reason is not None:
            yield self._part(delta.choice, {}, None, delta.reason)

    def _part(self, index: int, delta: dict, logprobs: dict | None, reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self._asks_logprobs:
            return None
        content = []
        for token, found in delta.tokens:
            assert found is not None
            top = [self._token(name, value) for name, value in found.top]
            content.append({**self._token(token, found.chosen), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = token_text(self._tokenizer, token)
        return {"token": text, "logprob": _finite(logprob), "bytes": data}


class CompletionAnswer(Answer):
    """Answers of ``/v1/completions``."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _choice(self, delta: Delta) -> dict[str, Any]:
        return {"index": delta.choice, "text": delta.text, "logprobs": self._logprobs(delta),
                "finish_reason": delta.reason}  # fmt: skip

    def _parts(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if not self._is_empty(delta):
            yield self._choice(delta)

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self._asks_logprobs:
            return None
        offset = self._length.get(delta.choice, 0)
        names, values, tops, offsets = [], [], [], []
        for token, found in delta.tokens:
            assert found is not None
            text = token_text(self._tokenizer, token)[0]
            names.append(text)
            values.append(_finite(found.chosen))
            tops.append({token_text(self._tokenizer, name)[0]: _finite(value) for name, value in found.top})
            offsets.append(offset)
            offset += len(text)
        self._length[delta.choice] = offset
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _joined(deltas: list[Delta]) -> Delta:
    tokens = [each for delta in deltas for each in delta.tokens]
    return Delta(deltas[0].choice, "".join(delta.text for delta in deltas), tokens, deltas[-1].reason)


def _finite(logprob: float) -> float:
    """Replace minus infinity, which JSON doesn't have, by -9999, as OpenAI does."""
    return max(logprob, -9999.0)
