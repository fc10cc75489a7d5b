"""From ``adapter_ids`` to segments: which adapter serves which rows, independent of weights and layers."""
