"""Answers of ``/v1/responses``: one text message, whole or as a stream of events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from peft_multibatch.serve.jobs import Delta, Job
from peft_multibatch.serve.protocol import ResponseRequest


Event = tuple[str, dict[str, Any]]


class ResponseAnswer:
    """The answer of one job.

    Args:
        job: the job.
        body: the request, parts of which are returned.
    """

    def __init__(self, job: Job, body: ResponseRequest) -> None:
        self._job, self._count = job, 0
        self._item = f"msg_{job.request_id}"
        self._head = {
            "id": f"resp_{job.request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "user": body.user,
            "error": None,
            "metadata": {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
        }

    async def whole(self, deltas: AsyncIterator[Delta]) -> dict[str, Any]:
        """Build the response of a request that isn't streamed."""
        found = [delta async for delta in deltas]
        return self._response("".join(delta.text for delta in found), found[-1].reason)

    async def events(self, deltas: AsyncIterator[Delta]) -> AsyncIterator[list[Event]]:
        """Build the events of a stream, each with its name, in lists to be sent together."""
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        begun = {**self._head, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
        item = {"id": self._item, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        yield [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **place, part=_part("")),
        ]
        text, reason = "", None
        async for delta in deltas:
            text, reason = text + delta.text, delta.reason
            if delta.text:
                yield [self._event("response.output_text.delta", **place, delta=delta.text, logprobs=[])]
        response = self._response(text, reason)
        yield [
            self._event("response.output_text.done", **place, text=text, logprobs=[]),
            self._event("response.content_part.done", **place, part=_part(text)),
            self._event("response.output_item.done", output_index=0, item=response["output"][0]),
            self._event(f"response.{response['status']}", response=response),
        ]

    def _event(self, name: str, **fields: Any) -> Event:
        self._count += 1
        return name, {"type": name, "sequence_number": self._count - 1, **fields}

    def _response(self, text: str, reason: str | None) -> dict[str, Any]:
        is_whole, usage = reason == "stop", self._job.usage()
        status = "completed" if is_whole else "incomplete"
        item = {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": [_part(text)]}
        return {
            **self._head,
            "status": status,
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": [item],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
