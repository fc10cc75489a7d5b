"""The enabled model: finding its layers, and adding ``adapter_ids`` to its methods."""
