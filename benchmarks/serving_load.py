"""Run clients of a server in a separate process, so that they don't slow it down. Used by benchmarks/serving.py.

It reads a job from stdin as JSON, and writes an object to stdout for every finished request. It uses no HTTP library:
a client that takes as long per chunk as the server would measure itself.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from typing import Any


async def ask(address: tuple[str, int], body: dict[str, Any], leave_after: int | None = None) -> dict[str, Any]:
    """Send a completion request, and read the answer, or its first ``leave_after`` chunks."""
    begin, first, text, chunks, status = time.perf_counter(), 0.0, "", 0, 0
    reader, writer = await asyncio.open_connection(*address, limit=1 << 20)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    writer.write(f"{head}\r\nconnection: close\r\n\r\n".encode() + data)
    left = is_whole = False
    try:
        status = int((await reader.readline()).split()[1])
        while line := await reader.readline():
            if line.startswith(b"{"):  # not streamed
                answer = json.loads(line)
                is_whole = "choices" in answer
                text = answer["choices"][0]["text"] if is_whole else line.decode()
            elif line.startswith(b"data: {"):
                first = first or time.perf_counter() - begin
                answer = json.loads(line[6:])
                text += answer["choices"][0]["text"] if "choices" in answer else line.decode()
                chunks += 1
                if leave_after is not None and chunks >= leave_after:
                    left = True
                    break
            elif line.startswith(b"data: [DONE]"):
                is_whole = True
    finally:
        writer.close()
    seconds = time.perf_counter() - begin
    return {"status": status, "text": text, "first": first, "seconds": seconds, "left": left, "whole": is_whole}


async def play(job: dict[str, Any]) -> None:
    """Run a job's clients concurrently, each of which sends its next request after an answer."""
    address, requests = (job["host"], job["port"]), job["requests"]
    end = time.monotonic() + job["seconds"] if job.get("seconds") else None
    numbers = itertools.count() if end is not None else iter(range(len(requests)))

    async def client() -> None:
        for number in numbers:
            if end is not None and time.monotonic() > end:
                return
            request = requests[number % len(requests)]
            found = await ask(address, request["body"], request.get("leave_after"))
            print(json.dumps({"request": number % len(requests), **found}), flush=end is not None)

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(job["clients"])))
    print(json.dumps({"took": time.perf_counter() - begin}), flush=True)


if __name__ == "__main__":
    asyncio.run(play(json.load(sys.stdin)))
