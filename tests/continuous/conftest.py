"""Fixtures of the tests of continuous batching."""

from asynchronous import asynchronous


__all__ = ["asynchronous"]
