"""Where the outputs of requests go: to whoever listens, whenever they began to, or into the queue."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput


class Outputs(OutputRouter):
    """transformers' own router, which keeps what comes before somebody listens, and survives whoever stopped."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()  # held from when a handler comes until it has what came before

    def deliver(self, output: GenerationOutput) -> None:
        """Hand an output on."""
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """Hand outputs on, those for one event loop together."""
        with self._lock:
            calls: defaultdict[Any, list[tuple[Callable, GenerationOutput]]] = defaultdict(list)
            for output in outputs:
                handler = self.result_handlers.get(output.request_id)
                if handler is None:
                    self.output_queue.put(output)
                else:
                    calls[handler[1]].append((handler[0], output))
            for loop, found in calls.items():
                self._call(loop, found)

    def hand_over(self, request_id: Any) -> None:
        """Give a handler what came for its request before there was one."""
        with self._lock:
            callback, loop = self.result_handlers[request_id]
            waiting = self.output_queue
            with waiting.mutex:
                found = [output for output in waiting.queue if output.request_id == request_id]
                others = [output for output in waiting.queue if output.request_id != request_id]
                waiting.queue.clear()
                waiting.queue.extend(others)
            if found:
                self._call(loop, [(callback, output) for output in found])

    def _call(self, loop: Any, calls: list[tuple[Callable, GenerationOutput]]) -> None:
        try:
            loop.call_soon_threadsafe(_call_all, calls)
        except RuntimeError:  # the event loop was closed, and with it went who listened
            for _, output in calls:
                self.result_handlers.pop(output.request_id, None)
                self.output_queue.put(output)


def _call_all(calls: Iterable[tuple[Callable, GenerationOutput]]) -> None:
    for callback, output in calls:
        callback(output)
