"""Asynchronous batching where there is no GPU: the order in which steps are prepared, run and seen is the host's."""

from __future__ import annotations

import pytest
import torch


class NoStream:
    """A stream, or an event, of a device that does everything at once."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.fixture
def asynchronous(monkeypatch):
    """Options with which the manager batches asynchronously."""
    if not torch.cuda.is_available():
        from transformers.generation.continuous_batching import input_outputs

        ios = input_outputs.ContinuousBatchingAsyncIOs
        if not hasattr(ios, "_supported_device_types"):
            pytest.skip("asynchronous batching of older transformers needs a GPU")
        monkeypatch.setattr(ios, "_supported_device_types", ("cpu",))
        monkeypatch.setattr(input_outputs, "create_device_stream", lambda device: NoStream())
        monkeypatch.setattr(torch, "Event", NoStream)
    return {"use_async_batching": True}
