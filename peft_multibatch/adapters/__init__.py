"""The adapters of a model: who they are, whether they fit, where their weights are."""
