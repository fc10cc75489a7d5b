"""The adapters of a model: their versions, weights and validation."""
