"""Prometheus metrics at ``/metrics``; series are labelled by adapter, and removed when it is unloaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from peft_multibatch.serve.engine import Engine
from peft_multibatch.serve.gate import Record
from peft_multibatch.serve.messages import State


PREFIX = "peft_multibatch_"

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics(Collector):
    """Counts finished requests, and adds the current state.

    Args:
        engine: the server's engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._state: State | None = None
        self._unloaded: set[str] = set()  # running requests may still use them
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(f"{PREFIX}requests", "Finished requests.", ("adapter", "status"),
                                 registry=registry)  # fmt: skip
        self._prompt = Counter(f"{PREFIX}prompt_tokens", "Prompt tokens.", ("adapter",), registry=registry)
        self._generated = Counter(f"{PREFIX}generated_tokens", "Generated tokens.", ("adapter",), registry=registry)
        self._first = Histogram(f"{PREFIX}time_to_first_token_seconds", "Time from arrival to the first token.",
                                ("adapter",), registry=registry, buckets=SECONDS)  # fmt: skip
        self._whole = Histogram(f"{PREFIX}request_seconds", "Time from arrival to the end.", ("adapter",),
                                registry=registry, buckets=SECONDS)  # fmt: skip
        registry.register(self)

    def observe(self, record: Record) -> None:
        """Count a finished request."""
        job = record.job
        label = job.target.label if job is not None and self._unloaded.isdisjoint(job.target.names) else ""
        self._requests.labels(label, record.status).inc()
        if job is not None:
            self._prompt.labels(label).inc(job.prompt_tokens)
            self._generated.labels(label).inc(job.completion_tokens)
            self._whole.labels(label).observe(record.seconds)
            if job.first_token is not None:
                self._first.labels(label).observe(job.first_token)

    def forget(self, adapter: str) -> None:
        """Remove the series of an unloaded adapter."""
        self._unloaded.add(adapter)
        for each in (self._requests, self._prompt, self._generated, self._first, self._whole):
            each.remove_by_labels({"adapter": adapter})

    def remember(self, adapter: str) -> None:
        """Count the requests of an adapter that was loaded again."""
        self._unloaded.discard(adapter)

    def text(self, state: State | None) -> bytes:
        """All metrics in Prometheus' text format.

        Args:
            state: the core's state, or None if it doesn't answer.
        """
        self._state = state
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Any]:
        """Metrics of the engine, its core and the store."""
        engine, state = self._engine, self._state
        by_adapter = GaugeMetricFamily(f"{PREFIX}accepted", "Running and waiting sequences.", labels=("adapter",))
        for label, count in list(engine.running.items()):
            by_adapter.add_metric((label,), count)
        yield by_adapter
        yield _gauge("healthy", "1 if requests can run.", int(state is not None and state.problem is None))
        if state is None:
            return
        stats = state.store
        yield _gauge("running", "Running sequences.", state.active)
        yield _gauge("waiting", "Waiting sequences.", max(engine.running.total() - state.active, 0))
        yield _gauge("adapters_known", "Registered adapters.", stats.registered)
        yield _gauge("adapters_loaded", "Adapters in memory.", stats.host_adapters)
        yield _gauge("adapter_bytes", "Memory used by adapters.", stats.host_bytes)
        yield _counter("adapter_loads", "Adapters read from files.", stats.loads)
        yield _counter("adapter_load_seconds", "Seconds spent loading adapters.", stats.load_seconds)
        yield _counter("adapter_evictions", "Adapters evicted from memory.", stats.evictions)
        yield _counter("prefix_hit_tokens", "Tokens found in the prefix cache.", state.prefix_hits)


def _gauge(name: str, help: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, help, value=value)


def _counter(name: str, help: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, help, value=value)
