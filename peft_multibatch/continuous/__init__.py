"""Continuous batching with an adapter per request, on top of transformers' own manager."""
