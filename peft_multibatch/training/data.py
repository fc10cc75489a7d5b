"""Build batches with rows of several adapters: a dataset, a batch sampler and a collator."""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import default_data_collator

from peft_multibatch.errors import AdapterIdsError, UnsupportedError
from peft_multibatch.plan.ids import BASE_NAME


COLUMN = "adapter_ids"
"""The column, and the model's argument, with the adapter of each row."""


class MixedDataset(Dataset):
    """A concatenation of datasets, with the adapter's name in the column ``adapter_ids`` of each row.

    Args:
        datasets: a dataset per adapter, with a length and dictionaries as rows.

    Attributes:
        sizes: number of rows of each adapter.

    Raises:
        UnsupportedError: a dataset has no length.
    """

    def __init__(self, datasets: Mapping[str, Any]) -> None:
        self.datasets = dict(datasets)
        for name, each in self.datasets.items():
            if not hasattr(each, "__len__"):
                raise UnsupportedError(
                    f"the dataset of {name!r} is a {type(each).__name__}, which has no length: expected one that can "
                    "be indexed, because batches are divided by size. Convert a stream to a list or datasets.Dataset."
                )
        self.sizes = {name: len(each) for name, each in self.datasets.items()}

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row; a negative index, counted from the end, gives a row of the base model that trains nothing."""
        is_filler, index = index < 0, index % len(self)
        for name, size in self.sizes.items():
            if index < size:
                return {**self.datasets[name][index], COLUMN: BASE_NAME if is_filler else name}
            index -= size
        raise IndexError(index)


class AdapterBatchSampler(Sampler[list[int]]):
    """Batches of rows of several datasets, for a ``MixedDataset``.

    An epoch goes once through every dataset, each in its own order, which depends only on the seed, the epoch and the
    adapter's name. Once a dataset has ended, its share of the batches stays empty. So an adapter sees the same rows in
    the same batches even if other adapters stop.

    Args:
        sizes: number of rows of each adapter's dataset, such as ``MixedDataset.sizes``.
        batch_size: number of rows in a batch over all processes, divided among adapters by weight; or a number per
            adapter.
        weights: the adapters' shares if ``batch_size`` is one number; by default the sizes, so that all datasets end
            together.
        seed: seed for shuffling; None keeps the rows in order.
        rank: the rank of this process.
        processes: number of processes, each of which gets a part of every batch, or a row of the base model if its
            part is empty. Leave ``rank`` and ``processes`` out if accelerate's ``prepare`` distributes batches.

    Attributes:
        stopped: names of adapters whose rows are left out from now on.

    Example:
        ```python
        dataset = MixedDataset({"sql": sql_rows, "poet": poet_rows})
        sampler = AdapterBatchSampler(dataset.sizes, batch_size=16, weights={"sql": 3, "poet": 1}, seed=0)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=AdapterCollator())
        for epoch in range(3):
            sampler.set_epoch(epoch)
            for batch in loader: ...
        ```
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_size: int | Mapping[str, int],
        weights: Mapping[str, float] | None = None,
        seed: int | None = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.sizes, self.seed, self.rank, self.processes = dict(sizes), seed, rank, processes
        shares = sizes if weights is None else weights
        if isinstance(batch_size, Mapping):
            shares = batch_size
            batch_size = sum(batch_size[name] for name in sizes)
        if not all(sizes.values()) or not all(shares.get(name, 0) > 0 for name in sizes):
            raise ValueError(
                f"AdapterBatchSampler got datasets of {dict(sizes)} rows and shares of {dict(shares)}: expected at "
                "least one row and a positive share for every adapter."
            )
        total = sum(shares[name] for name in sizes)
        self._shares = {name: batch_size * shares[name] / total for name in sizes}
        self._batch_size = batch_size
        self.stopped: Collection[str] = ()
        self._epoch = self._start = 0
        self._length = sum(1 for _ in self._counts())

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch to iterate next.

        Args:
            epoch: its number, which determines the order of rows.
            start: number of batches to skip, to resume an interrupted run.
        """
        self._epoch, self._start = epoch, start

    def __len__(self) -> int:
        return self._length

    def batches(self, total: int) -> dict[str, int]:
        """Count the batches with rows of each adapter among the first ``total`` batches."""
        found, length = dict.fromkeys(self.sizes, 0), len(self)
        for place, counts in enumerate(self._counts()):
            times = math.ceil((total - place) / length)  # number of epochs that reach this batch
            for name in counts:
                found[name] += max(times, 0)
        return found

    def __iter__(self) -> Iterator[list[int]]:
        orders, offsets, taken = {}, {}, dict.fromkeys(self.sizes, 0)
        offset = 0
        for name, size in self.sizes.items():
            orders[name], offsets[name] = list(range(size)), offset
            if self.seed is not None:
                random.Random(f"{self.seed}/{self._epoch}/{name}").shuffle(orders[name])
            offset += size
        start, self._start = self._start, 0
        for place, counts in enumerate(self._counts()):
            rows: list[int] = []
            for name, count in counts.items():
                if name not in self.stopped:
                    own = orders[name][taken[name] : taken[name] + count]
                    rows.extend(offsets[name] + row for row in own)
                taken[name] += count
            if place >= start:
                yield rows[self.rank :: self.processes] or [(rows[0] if rows else 0) - offset]

    def _counts(self) -> Iterator[dict[str, int]]:
        """Yield the number of rows of each adapter for every batch of an epoch."""
        left, credit = dict(self.sizes), dict.fromkeys(self.sizes, 0.0)
        while any(left.values()):
            for name, share in self._shares.items():
                credit[name] += share
            wanted = {name: max(math.floor(each), 0) for name, each in credit.items()}
            missing = self._batch_size - sum(wanted.values())
            for name in sorted(credit, key=lambda name: wanted[name] - credit[name])[: max(missing, 0)]:
                wanted[name] += 1
            for _ in range(-missing):  # adapters that were ahead leave more than a batch for the others
                last = min((name for name in wanted if wanted[name]), key=lambda name: credit[name] - wanted[name])
                wanted[last] -= 1
            for name, count in wanted.items():
                credit[name] -= count
            counts = {name: min(count, left[name]) for name, count in wanted.items() if count and left[name]}
            for name, count in counts.items():
                left[name] -= count
            if counts:
                yield counts


class AdapterCollator:
    """A collator that adds the column ``adapter_ids`` to the batch of another collator.

    Args:
        inner: the collator for all other columns; transformers' default collator if None.

    Raises:
        AdapterIdsError: a row lacks the column.
        UnsupportedError: the other collator dropped a column that only some rows have.

    Example:
        ```python
        collator = AdapterCollator(DataCollatorWithPadding(tokenizer))
        trainer = Trainer(model, args, train_dataset=rows, data_collator=collator)
        ```
    """

    def __init__(self, inner: Callable[[list[Any]], Any] | None = None) -> None:
        self.inner = default_data_collator if inner is None else inner

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        missing = [place for place, row in enumerate(rows) if row.get(COLUMN) is None]
        if missing:
            raise AdapterIdsError(
                f"row {missing[0]} of a batch has no {COLUMN} (one of {len(missing)} such rows): expected an id or a "
                f"name in every row. Add the column {COLUMN!r} to the dataset; with TRL's trainers also pass "
                "remove_unused_columns=False."
            )
        ids = [row[COLUMN] for row in rows]
        batch = self.inner([{key: value for key, value in row.items() if key != COLUMN} for row in rows])
        for place, row in enumerate(rows):
            for key, value in row.items():
                # many collators read the columns of the first row only
                if key not in rows[0] and key not in batch and not isinstance(value, str):
                    raise UnsupportedError(
                        f"row {place} of a batch, of {row[COLUMN]!r}, has a column {key!r} that row 0, of "
                        f"{rows[0][COLUMN]!r}, doesn't have, and the collator dropped it: expected the same columns "
                        "in every row. Add the column to all datasets, or remove it from all."
                    )
        try:
            batch[COLUMN] = torch.tensor([operator.index(each) for each in ids], dtype=torch.int64, device="cpu")
        except TypeError:  # names, or values that the model will reject
            batch[COLUMN] = ids
        return batch
