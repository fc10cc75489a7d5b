"""Asynchronous batching on a CPU, with the order of a GPU: steps are prepared, run and read as there."""

from __future__ import annotations

import pytest
import torch


class NoStream:
    """A fake stream or event, for a device that runs everything immediately."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.fixture
def asynchronous(monkeypatch):
    """Options that make the manager batch asynchronously."""
    if not torch.cuda.is_available():
        from transformers.generation.continuous_batching import input_outputs

        ios = input_outputs.ContinuousBatchingAsyncIOs
        if not hasattr(ios, "_supported_device_types"):
            pytest.skip("asynchronous batching of older transformers needs a GPU")
        monkeypatch.setattr(ios, "_supported_device_types", ("cpu",))
        monkeypatch.setattr(input_outputs, "create_device_stream", lambda device: NoStream())
        monkeypatch.setattr(torch, "Event", NoStream)
    return {"use_async_batching": True}
