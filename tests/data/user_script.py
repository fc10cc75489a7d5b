"""A user's script for type checkers, which must report every line marked as wrong."""

from typing import Literal

import numpy as np
import torch
from torch import nn

import peft_multibatch
from peft_multibatch import AdapterId, AdapterIds, AdapterStore, Multibatch, Report


def right(model: nn.Module) -> None:
    mb: Multibatch = peft_multibatch.enable(model, backend="triton", fuse="weights")
    mb = peft_multibatch.enable(model, fuse=False)
    with mb.batch([0, -1, 1]), mb.batch(("sql", "__base__")), mb.batch([{"sql": 0.7, "poet": 0.3}, "sql", -1]):
        pass
    with mb.batch(torch.tensor([0, 1])), mb.batch(np.array([0, 1])), mb.batch([np.int64(0)]), mb.batch(range(2)):
        pass
    names: list[str] = ["sql"]
    mixed: list[AdapterId] = [0, "sql", {"sql": 0.5, "poet": 0.5}]
    mixtures = [{"sql": 0.5}]
    by_id = [{0: 0.5}]
    either: AdapterIds = names if len(mixed) else mixed
    for ids in (names, mixed, either):
        with mb.batch(ids):
            pass
    with mb.batch(mixtures), mb.batch(by_id):
        pass
    with mb.continuous_batching(warmup=False, timeout=3.0, mixtures=2) as manager:
        manager.add_request([1, 2], adapter_id={"sql": 0.5})
        manager.add_requests([[1, 2]], adapter_ids=["sql"])
        with manager.changing("sql", 0):
            pass
    store: AdapterStore = mb.adapter_store(max_host_memory="1GB", dtype="file", roots=["adapters"])
    mb.adapter_store(dtype=torch.bfloat16)
    store.register("sql", "adapters/sql", pin=True)
    report: Report = mb.report()
    how: str = report[0].how
    ways: list[str] = [layer.how for layer in report[:3]]
    if report.adapters[0].state == "ready" and mb.verify(adapter_ids=[0, 1], input_ids=torch.ones(2, 3)).ok:
        print(how, ways, report.store.hits if report.store is not None else 0)


def wrong(model: nn.Module) -> None:
    peft_multibatch.enable(model, backend="cuda")  # wrong
    peft_multibatch.enable(model, fuse="all")  # wrong
    mb = peft_multibatch.enable(model)
    mb.batch("sql")  # wrong
    mb.batch(0)  # wrong
    mb.batch([0.5])  # wrong
    mb.batch([["sql"]])  # wrong
    mb.batch({"sql": 0.7})  # wrong
    mb.batch([{"sql": "much"}])  # wrong
    mb.batch({0, 1})  # wrong
    mb.batch(None)  # wrong
    mb.verify("sql")  # wrong
    mb.continuous_batching(warm_up=False)  # wrong
    mb.continuous_batching(warmup="no")  # wrong
    mb.adapter_store(dtype="bfloat16")  # wrong
    mb.adapter_store(max_rank="8")  # wrong
    with mb.continuous_batching() as manager:
        manager.add_request([1], adapter_id=["sql"])  # wrong
        manager.add_requests([[1]], adapter_ids="sql")  # wrong
        manager.changing({"sql": 0.5})  # wrong
    report = mb.report()
    print(report[0].speed)  # wrong
    state: Literal["fine", "ill"] = report.adapters[0].state  # wrong
    print(state)
    peft_multibatch.enabled(model)  # wrong
