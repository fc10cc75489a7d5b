"""Deliver outputs to the handlers of their requests, even if registered late, or to the queue."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput


class Outputs(OutputRouter):
    """transformers' router that also keeps outputs until a handler is registered, and survives closed event loops."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()  # held while a new handler gets its earlier outputs

    def deliver(self, output: GenerationOutput) -> None:
        """Deliver an output."""
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """Deliver outputs, with one call per event loop."""
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

    def step_ended(self) -> None:
        """Called in the thread of the model when the tokens of a step were read; does nothing here."""

    def hand_over(self, request_id: Any) -> None:
        """Give a newly registered handler the outputs that arrived before it."""
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
        except RuntimeError:  # the handler's event loop was closed
            for _, output in calls:
                self.result_handlers.pop(output.request_id, None)
                self.output_queue.put(output)


def _call_all(calls: Iterable[tuple[Callable, GenerationOutput]]) -> None:
    for callback, output in calls:
        callback(output)
