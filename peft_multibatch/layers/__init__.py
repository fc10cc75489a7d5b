"""Handlers that run PEFT's layers on mixed batches."""
