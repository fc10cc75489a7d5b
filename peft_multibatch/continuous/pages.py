"""Free and clear cache pages that may contain non-finite values, so that no other request reads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def clear_pages(cache: Any, names: Iterable[Any]) -> None:
    """Free requests' blocks, remove their hashes so that no prefix matches them, and fill them with zeros.

    Blocks that other requests share aren't changed: zeros would silently give those wrong tokens, while non-finite
    values are noticed in the next step that reads them.

    Args:
        cache: transformers' cache.
        names: the requests' ids.
    """
    names = list(names)
    if hasattr(cache, "cache_allocators"):
        for allocator in cache.cache_allocators.values():
            tables, ledger = allocator.block_table, allocator.ledger
            blocks = _blocks_of(tables, names)
            for block in blocks:
                ledger.hash_to_block.pop(ledger.block_to_hash.pop(block, None), None)
            for name in names:
                allocator.free_blocks(name, True)
            _write_zeros([allocator._copy_view], blocks - _blocks_of(tables, tables))
        return
    manager = cache._block_manager  # older versions of transformers
    for group in cache.group_cache_managers:
        blocks = _blocks_of(group.block_table, names)
        for block in map(manager._id_to_block.get, blocks):
            if block is not None:
                manager._hash_to_id.pop(block.hash, None)
                block.hash = None
        for name in names:
            group.free_blocks(name, manager)
        shape = -1, cache.block_size, cache.num_key_value_heads, cache.head_dim
        tensors = [each.view(shape) for each in (*cache.key_cache, *cache.value_cache)]
        _write_zeros(tensors, blocks - _blocks_of(group.block_table, group.block_table))


def _blocks_of(tables: dict[Any, list[int]], names: Iterable[Any]) -> set[int]:
    return {block for name in names for block in tables.get(name, ())}


def _write_zeros(tensors: list[torch.Tensor], blocks: set[int]) -> None:
    if blocks:
        index = torch.tensor(sorted(blocks), dtype=torch.int64, device=tensors[0].device)
        for each in tensors:
            each.index_fill_(0, index, 0)
