"""Datasets and batches: which rows are in which batch, on which process, and after an interruption."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import default_data_collator

from peft_multibatch import errors
from peft_multibatch.training import AdapterBatchSampler, AdapterCollator, MixedDataset


SIZES = {"a": 10, "b": 5, "c": 1}
OWNERS = [name for name, size in SIZES.items() for _ in range(size)]


def epoch_of(sampler, epoch=0, start=0):
    sampler.set_epoch(epoch, start)
    return list(sampler)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 30), min_size=1),
    batch=st.integers(1, 9),
    weights=st.booleans(),
    processes=st.integers(1, 3),
)
@example(sizes={"f": 1, "e": 22, "a": 22, "d": 22, "b": 11, "c": 1}, batch=1, weights=False, processes=1)
def test_an_epoch_has_every_row_once(sizes, batch, weights, processes):
    shares = {name: place + 1 for place, name in enumerate(sizes)} if weights else None
    ranks = [AdapterBatchSampler(sizes, batch, shares, rank=rank, processes=processes) for rank in range(processes)]
    parts = [epoch_of(each) for each in ranks]
    assert {len(each) for each in parts} == {len(ranks[0])}
    assert all(part for each in parts for part in each)  # no process waits for a batch
    rows = [row for each in parts for part in each for row in part if row >= 0]
    assert sorted(rows) == list(range(sum(sizes.values())))
    assert all(sum(len(part) for part in step if part[0] >= 0) <= batch for step in zip(*parts))
    assert AdapterBatchSampler(sizes, batch, shares).batches(len(parts[0])) == {
        name: sum(any(_owner(row, sizes) == name for part in step for row in part if row >= 0) for step in zip(*parts))
        for name in sizes
    }


def _owner(row, sizes):
    return [name for name, size in sizes.items() for _ in range(size)][row]


def test_shares():
    by_size = epoch_of(AdapterBatchSampler(SIZES, 8))
    assert [Counter(OWNERS[row] for row in batch) for batch in by_size] == [{"a": 5, "b": 3}, {"a": 5, "b": 2, "c": 1}]
    by_weight = epoch_of(AdapterBatchSampler(SIZES, 4, {"a": 2, "b": 1, "c": 1}))
    assert [Counter(OWNERS[row] for row in batch) for batch in by_weight] == [
        {"a": 2, "b": 1, "c": 1}, *[{"a": 2, "b": 1}] * 4,
    ]  # fmt: skip
    fixed = epoch_of(AdapterBatchSampler(SIZES, {"a": 4, "b": 1, "c": 1}))
    assert [Counter(OWNERS[row] for row in batch) for batch in fixed] == [
        {"a": 4, "b": 1, "c": 1}, {"a": 4, "b": 1}, {"a": 2, "b": 1}, {"b": 1}, {"b": 1},
    ]  # fmt: skip


def test_orders_follow_from_seed_epoch_and_name():
    sampler = AdapterBatchSampler(SIZES, 4, seed=3)
    first, second = epoch_of(sampler, 0), epoch_of(sampler, 1)
    assert first != second
    assert epoch_of(AdapterBatchSampler(SIZES, 4, seed=3), 1) == second
    assert epoch_of(AdapterBatchSampler(SIZES, 4, seed=4), 0) != first
    assert sorted(map(sorted, epoch_of(AdapterBatchSampler(SIZES, 16, seed=None)))) == [list(range(16))]

    def rows_of(name, batches):
        return [row for batch in batches for row in batch if OWNERS[row] == name]

    alone = epoch_of(AdapterBatchSampler({"a": 10}, 4, seed=3))
    assert rows_of("a", first) == [row for batch in alone for row in batch]


def test_going_on_in_the_middle():
    sampler = AdapterBatchSampler(SIZES, 3)
    assert epoch_of(sampler, 2, start=3) == epoch_of(sampler, 2)[3:]
    assert epoch_of(sampler, 2) == list(sampler)  # the start is reset


def test_rows_of_stopped_adapters_are_left_out():
    """Rows of other adapters stay in the same batches."""
    sampler = AdapterBatchSampler(SIZES, 4)
    expected = epoch_of(sampler)
    sampler.stopped = {"b"}
    kept = [[row for row in batch if OWNERS[row] != "b"] for batch in expected]
    assert epoch_of(sampler) == kept
    sampler.stopped = {"a", "b", "c"}
    assert epoch_of(sampler) == [[-16]] * len(expected)


def test_a_dataset_says_whose_a_row_is():
    dataset = MixedDataset({"a": [{"x": 1}, {"x": 2}], "b": [{"x": 3}]})
    assert [dataset[place] for place in range(3)] == [
        {"x": 1, "adapter_ids": "a"}, {"x": 2, "adapter_ids": "a"}, {"x": 3, "adapter_ids": "b"},
    ]  # fmt: skip
    assert dataset[-1] == {"x": 3, "adapter_ids": "__base__"}


def test_a_loader():
    dataset = MixedDataset({"a": [{"x": torch.tensor([n])} for n in range(4)], "b": [{"x": torch.tensor([9])}]})
    sampler = AdapterBatchSampler(dataset.sizes, 3, seed=None)
    batches = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=AdapterCollator()))
    assert [(batch["x"].flatten().tolist(), batch["adapter_ids"]) for batch in batches] == [
        ([0, 1, 9], ["a", "a", "b"]), ([2, 3], ["a", "a"]),
    ]  # fmt: skip


@pytest.mark.parametrize("shares", [{"weights": {"a": 1, "b": 1}}, {"batch_size": {"a": 1, "b": 0, "c": 1}}], ids=str)
def test_shares_that_lack_an_adapter(shares):
    with pytest.raises((ValueError, KeyError), match="a positive share for every adapter"):
        AdapterBatchSampler(SIZES, **{"batch_size": 4, **shares})


@pytest.mark.parametrize("ids", [[1, -1], ["a", "__base__"], [0, "a"], [torch.tensor(1), torch.tensor(0)]], ids=str)
def test_a_collator_leaves_all_else_to_another(ids):
    rows = [{"input_ids": [1, 2], "label": 0, "adapter_ids": ids[0]}, {"input_ids": [3, 4], "label": 1}]
    rows[1]["adapter_ids"] = ids[1]
    seen = []
    batch = AdapterCollator(lambda rows: seen.extend(rows) or default_data_collator(rows))(rows)
    assert [sorted(row) for row in seen] == [["input_ids", "label"]] * 2
    assert batch["labels"].tolist() == [0, 1]
    assert [*batch["adapter_ids"]] == ids
    assert isinstance(batch["adapter_ids"], list) == any(isinstance(each, str) for each in ids)
    assert "adapter_ids" in rows[0]


def test_a_stream_has_no_length():
    with pytest.raises(errors.UnsupportedError, match=r"dataset of 'b' is a list_iterator.*Convert a stream"):
        MixedDataset({"a": [{"x": 1}], "b": iter([{"x": 1}])})


@pytest.mark.parametrize("order", [1, -1], ids=["first row lacks it", "first row has it"])
def test_a_column_that_only_some_datasets_have(order):
    """Collators read the columns of the first row, so an adapter's rows would lose their mask to another's."""
    rows = [{"x": 1, "adapter_ids": "a", "note": "-"}, {"x": 2, "adapter_ids": "b", "attention_mask": [0, 1]}]
    with pytest.raises((errors.UnsupportedError, KeyError), match=r"attention_mask"):
        AdapterCollator()(rows[::order])
    batch = AdapterCollator(lambda rows: {"x": [row["x"] for row in rows], "attention_mask": "made"})(rows)
    assert batch["attention_mask"] == "made"
    assert AdapterCollator()([{"x": 1, "adapter_ids": 0}, {"x": 2, "adapter_ids": 1, "note": "-"}])["x"].tolist() == [
        1,
        2,
    ]


def test_a_row_without_an_adapter():
    with pytest.raises(errors.AdapterIdsError, match=r"row 1 of a batch has no adapter_ids \(one of 2.*remove_unused"):
        AdapterCollator()([{"x": 1, "adapter_ids": 0}, {"x": 2}, {"x": 3, "adapter_ids": None}])


def test_batches_over_several_epochs():
    sampler = AdapterBatchSampler(SIZES, {"a": 4, "b": 1, "c": 1})
    assert len(sampler) == 5
    assert sampler.batches(5) == {"a": 3, "b": 5, "c": 1}
    assert sampler.batches(12) == {"a": 8, "b": 12, "c": 3}
    assert math.isclose(sum(sampler.batches(1).values()), 3)
