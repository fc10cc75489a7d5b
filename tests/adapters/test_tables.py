"""Tables of all layers in blocks: one copy brings the rows of a new adapter, and each bank reads only its own."""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from models import base_model, left_padded, lora_configs, peft_model
from stored import edit_tensors, logits, save_all, save_many
from weight_tables import make_table, update

import peft_multibatch
from peft_multibatch.adapters.adapter import AnyAdapter
from peft_multibatch.adapters.bank import Bank
from peft_multibatch.adapters.tables import WIDTH, LayerWeights, TableBlock, Tables


triton_backend = pytest.importorskip("peft_multibatch.ops.triton_backend", reason="needs triton")

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and not triton_backend.INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1"
)
NAMES = [*lora_configs()]
COUNT = 8


@pytest.fixture
def copies(monkeypatch):
    """The slots whose rows were copied to the device."""
    found, copy = [], TableBlock._copy
    monkeypatch.setattr(TableBlock, "_copy", lambda self, slot, *args: (found.append(slot), copy(self, slot, *args)))
    return found


def inputs(rows):
    return {key: value[:1].repeat(rows, 1).to(DEVICE) for key, value in left_padded(1, 4).items()}


def stored(folder, **options):
    model = base_model().to(DEVICE)
    mb = peft_multibatch.enable(model, backend="triton")
    mb.adapter_store("1MB", "1MB", slots=16, **options).register_folder(folder)
    return model, mb


def in_slots(mb, names):
    found = mb._registry.adapters([mb._registry.names.ids[name] for name in names])
    return {adapter.slot: adapter for adapter in found.values()}


def banks_of(mb):
    """The banks that run."""
    return [group.bank for group in mb._groups] + [each.bank for each in mb._layers.values() if each.group is None]


@contextmanager
def before_a_step(mb, names):
    """What continuous batching does before it replays a graph."""
    router, ids = mb._router, [mb._registry.names.ids[name] for name in names]
    with torch.no_grad(), router.routing(ids, expands=False, packed=True) as call:
        call.begin_model()
        call.for_graphs = True
        router.graph.prepare(call, DEVICE)
        yield call


def captured(mb, names):
    """Make graphs read the tables of all banks, as when steps are captured."""
    with before_a_step(mb, names) as call:
        for bank in banks_of(mb):
            mb._router.graph.fixed(call, bank, DEVICE, False)


def check_device(mb):
    """Check that all tables equal what was written to them."""
    for block in mb._registry.tables._blocks:
        assert block.rows.cpu().equal(torch.from_numpy(block.numbers))


def check_rows(mb, names):
    """Check the rows of adapters in all tables against their weights."""
    tables = [table for bank in banks_of(mb) for table in bank._tables[DEVICE].values()]
    assert tables
    for slot, adapter in in_slots(mb, names).items():
        for table in tables:
            parts = adapter.parts(table.layers)
            assert table.serials[slot] == adapter.serial
            for row, part in zip(table.rows[slot].tolist(), parts):
                if part is None or part.lora_a.dtype != table.dtype:
                    assert row == [0, 0, 0, 0]
                    continue
                bits = torch.tensor(part.scaling, dtype=torch.float32).view(torch.int32).item()
                assert row == [part.lora_a.data_ptr(), part.lora_b.data_ptr(), len(part.lora_a), bits]
    check_device(mb)


def halve_some(tensors):
    return {key: each.half() if "v_proj" in key or "down" in key else each for key, each in tensors.items()}


@pytest.mark.parametrize("dtype", [None, torch.float16, "file"], ids=str)
def test_rows_of_stored_adapters(tmp_path, dtype):
    """Different layers, ranks, scalings and dtypes; computed without looking at layers, and from their weights."""
    save_all(tmp_path)
    edit_tensors(tmp_path / "eight", halve_some)
    model, mb = stored(tmp_path, dtype=dtype)
    for names in (["three"], ["four", "eight"], ["eight", "three", "__base__"]):
        logits(model, inputs(len(names)), adapter_ids=names)
        check_rows(mb, [name for name in names if name != "__base__"])
    (block,) = mb._registry.tables._blocks
    for adapter in in_slots(mb, NAMES).values():
        formats = [AnyAdapter.formats(adapter, table.layers) for table in block.tables()]  # reads the weights
        assert [adapter.formats(table.layers) for table in block.tables()] == formats
        for table in block.tables():
            table.serials.clear()
        quick, slow = adapter.rows(block), AnyAdapter.rows(adapter, block)
        np.testing.assert_array_equal(quick.numbers, slow.numbers)
        assert [*map(id, quick.serials)] == [*map(id, slow.serials)] == [id(each.serials) for each in block.tables()]


def test_one_copy_for_a_new_stored_adapter(tmp_path, copies, monkeypatch):
    names = save_many(tmp_path, COUNT)
    _, mb = stored(tmp_path)
    captured(mb, names[:1])
    captured(mb, names[:2])
    looks, serves = [], Bank.serves
    monkeypatch.setattr(Bank, "serves", lambda self, *args: looks.append(self) or serves(self, *args))
    for number in range(2, COUNT):
        copies.clear()
        in_use = names[number - 2 : number + 1]
        plan = mb._router.plan([mb._registry.names.ids[name] for name in in_use])
        assert not mb._router.graph._tables.are_outgrown_by(plan)
        with before_a_step(mb, in_use):
            assert copies == [*in_slots(mb, in_use[2:])]
        check_rows(mb, in_use)
    assert len(banks_of(mb)) == 2 and not looks
    copies.clear()
    with before_a_step(mb, in_use):
        assert not copies


def test_one_copy_for_a_new_adapter_of_peft(copies):
    model = peft_model().to(DEVICE)
    mb = peft_multibatch.enable(model, backend="triton")
    captured(mb, NAMES[:1])
    copies.clear()
    with before_a_step(mb, NAMES):
        assert sorted(copies) == sorted(in_slots(mb, NAMES[1:]))
    check_rows(mb, NAMES)


def test_layouts_that_graphs_know_are_forgotten_when_tables_are_replaced(tmp_path):
    """Graphs don't read the new tables."""
    names = save_many(tmp_path, COUNT)
    _, mb = stored(tmp_path)
    captured(mb, names[:1])
    captured(mb, names[:2])
    tables, bank = mb._router.graph._tables, banks_of(mb)[0]
    plan = mb._router.plan([mb._registry.names.ids[names[2]]])
    assert not tables.are_outgrown_by(plan)
    bank.tables(in_slots(mb, names[3:4]), DEVICE, 2 * plan.slots)  # simulates another thread
    assert tables.are_outgrown_by(plan)


def test_a_bank_without_a_table_for_the_dtype_makes_one():
    """Another bank of the block has one already, and wrote the rows of all."""
    model = peft_model().to(DEVICE)
    mb = peft_multibatch.enable(model, backend="triton", fuse=False)
    layers = [each.self_attn.q_proj for each in model.base_model.model.model.layers]
    banks = [layer._multibatch.bank for layer in layers]
    for bank in banks:
        assert [table.dtype for table in bank.tables(in_slots(mb, ["three"]), DEVICE, 16)] == [torch.float32]
    for layer in layers:
        layer.lora_A["eight"].half(), layer.lora_B["eight"].half()
    adapters = in_slots(mb, ["eight"])
    for bank in banks:
        (table,) = bank.tables(adapters, DEVICE, 16)
        assert (table.dtype, table.rank) == (torch.float16, 8)
        assert bank.has_rows(adapters, DEVICE, 16)
    check_device(mb)


def test_an_error_in_the_middle(tmp_path, monkeypatch):
    names = save_many(tmp_path, COUNT)
    _, mb = stored(tmp_path)
    captured(mb, names[:1])
    captured(mb, names[:2])
    count, copy = [], torch.Tensor.copy_

    def fail(self, other, **options):
        if self.dtype == torch.int64:
            count.append(1)
            if len(count) == 3:
                raise RuntimeError("no device")
        return copy(self, other, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", fail)
        with pytest.raises(RuntimeError, match="no device"), before_a_step(mb, names[2:7]):
            pass
    assert len(count) == 3
    check_device(mb)
    with before_a_step(mb, names[2:7]):
        check_rows(mb, names[2:7])


def test_rows_of_a_freed_table_are_used_again_once_no_graph_reads_them(copies):
    memory, cpu = Tables(), torch.device("cpu")

    def make(count):
        return memory.make(torch.float32, 4, [object() for _ in range(count)], {torch.float32}, cpu)

    first, other = make(3), make(2)
    weights = torch.ones(2, 4)
    update(first, {1: [LayerWeights(weights, weights.t().contiguous(), 2.0)] * 3})
    rows, place = first.rows, first.rows.data_ptr()
    assert rows[1, :, 2].tolist() == [2, 2, 2]
    del first
    later = make(3)
    assert later.rows.data_ptr() != place and rows[1, :, 2].tolist() == [2, 2, 2]
    del rows
    gc.collect()
    again = make(3)
    assert again.rows.data_ptr() == place and not again.rows.any() and not again.serials
    assert again.describe([0, 1, 2, 3])[1:] == (torch.float32, 0, True)
    assert len(memory._blocks) == 1
    assert other.block is again.block and torch.from_numpy(again.block.numbers).equal(again.block.rows)


def test_more_rows_than_a_block_has(copies):
    memory, cpu = Tables(), torch.device("cpu")
    tables = [memory.make(torch.float32, 4, [object(), object()], {torch.float32}, cpu) for _ in range(WIDTH // 2 + 1)]
    assert len(memory._blocks) == 2 and len({table.block for table in tables}) == 2
    assert len({table.rows.data_ptr() for table in tables}) == len(tables)
    larger = memory.make(torch.float32, 8, [object()], {torch.float32}, cpu)
    assert len(larger.rows) == 8 and len(memory._blocks) == 3
    del tables
    gc.collect()
    memory.make(torch.float32, 8, [object()], {torch.float32}, cpu)
    assert memory._blocks == [larger.block]


def test_rows_that_are_the_same_are_not_copied(copies):
    table = make_table(torch.float32, 4, 1, "cpu")
    weights = torch.ones(8, 8)
    for _ in range(2):
        update(table, {2: [LayerWeights(weights, weights, 2.0)]})
    assert copies == [2] and table.describe([2])[1:] == (torch.float32, 8, True)


def test_a_step_does_not_wait_for_an_adapter_that_is_being_registered(tmp_path, monkeypatch):
    """Registering covers layers, for which it waits for the step."""
    save_all(tmp_path)
    model = base_model()
    mb = peft_multibatch.enable(model)
    store = mb.adapter_store()
    store.register("three", tmp_path / "three")
    begun, looked = threading.Event(), threading.Event()
    cover = store._model.cover

    def wait(*args):
        begun.set()
        assert looked.wait(60)
        return cover(*args)

    monkeypatch.setattr(store._model, "cover", wait)
    thread = threading.Thread(target=store.register, args=("eight", tmp_path / "eight"))
    thread.start()
    assert begun.wait(60)
    layers = [*mb._layers]
    looking = threading.Thread(target=lambda: (store.expect(layers, lambda *_: True), looked.set()), daemon=True)
    looking.start()
    looking.join(30)
    was_looked = looked.is_set()
    looked.set()
    thread.join()
    assert was_looked and "eight" in mb.adapter_names
