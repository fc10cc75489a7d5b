"""``make demo``: one batch, one real model, an adapter of its own for every sample."""
