"""Adapters whose weights lie in files, of which as many are in memory as there is room for."""
