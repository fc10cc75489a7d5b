"""The demo of ``make demo``: a real model and a batch with several adapters."""
