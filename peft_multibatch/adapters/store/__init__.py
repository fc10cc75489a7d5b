"""Adapters in files, of which as many are in memory as fit."""
