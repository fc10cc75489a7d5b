"""Fixtures of these tests."""

from asynchronous import asynchronous


__all__ = ["asynchronous"]
