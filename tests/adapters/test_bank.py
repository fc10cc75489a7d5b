"""After any change to adapters, the next call uses their current weights, never stale ones."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import OrderedDict

import pytest
import torch
from models import left_padded, lora_configs, peft_model, row_by_row
from peft import LoraConfig
from peft.utils.hotswap import hotswap_adapter
from tolerances import assert_close
from weight_tables import make_table, update

import peft_multibatch
from peft_multibatch.adapters.tables import TableBlock, WeightTable


NAMES = ["three", "eight", "__base__", "four", "three", "eight"]


def layer_of(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


def double_in_place(model):
    for name in ("three", "eight"):
        layer_of(model).lora_B[name].weight.data.mul_(2)  # changes neither `_version` nor `data_ptr`


def copy_in_place(model):
    weight = layer_of(model).lora_A["three"].weight
    weight.data.copy_(torch.randn_like(weight))


def replace_data(model):
    weight = layer_of(model).lora_A["three"].weight
    weight.data = torch.randn_like(weight)


def replace_parameter(model):
    module = layer_of(model).lora_A["three"]
    module.weight = torch.nn.Parameter(torch.randn_like(module.weight))


def replace_module(model):
    layer = layer_of(model)
    layer.lora_A["three"] = torch.nn.Linear(layer.in_features, 5, bias=False)
    layer.lora_B["three"] = torch.nn.Linear(5, layer.out_features, bias=False)


def swap_tensors(model):
    weight = layer_of(model).lora_A["three"].weight
    torch.utils.swap_tensors(weight, torch.nn.Parameter(torch.randn_like(weight)))


def write_through_an_old_alias(model, alias=[]):  # noqa: B006
    alias[0].mul_(3)


def set_scale(model):
    layer_of(model).set_scale("three", 3.0)
    layer_of(model).scaling["eight"] *= 0.5


def scaling_becomes_a_tensor(model):
    layer_of(model).scaling["three"] = torch.tensor(2.5)


def optimizer_step(model):
    weight = layer_of(model).lora_B["three"].weight.requires_grad_()
    weight.grad = torch.randn_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


def to_double(model):
    model.double()


def add_adapter(model):
    config = lora_configs()["eight"]
    config.target_modules = {"q_proj", "down_proj", "lm_head"}  # includes layers that had no adapter before
    model.add_adapter("new", config)


def delete_and_add_again(model):
    model.delete_adapter("four")
    torch.manual_seed(5)
    model.add_adapter("four", lora_configs()["three"])


def hotswap(model, folder=None):
    hotswap_adapter(model, folder, adapter_name="three", torch_device="cpu")


CHANGES = [
    double_in_place, copy_in_place, replace_data, replace_parameter, replace_module, swap_tensors, set_scale,
    scaling_becomes_a_tensor, optimizer_step, to_double, add_adapter, delete_and_add_again,
]  # fmt: skip


def logits(model, names=NAMES):
    with torch.no_grad():
        return model(**left_padded(), adapter_ids=names).logits


def expected(model, names=NAMES):
    with torch.no_grad():
        return torch.cat(row_by_row(model, names, left_padded(), lambda row: model(**row).logits))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_after_enable_are_seen(change):
    model = peft_model()
    mb = peft_multibatch.enable(model)
    before = logits(model)
    change(model)
    names = [*NAMES[:-1], "new"] if change is add_adapter else NAMES
    after = logits(model, names)
    assert not torch.allclose(before.double(), after.double(), atol=1e-4) or change is to_double
    assert_close(after, expected(model, names), torch.float32)
    if change is add_adapter:
        assert mb.adapter_names == ["three", "four", "eight", "new"]


def test_an_alias_taken_before_enable_still_writes_what_is_read():
    model = peft_model()
    alias = layer_of(model).lora_B["three"].weight.data
    peft_multibatch.enable(model)
    before = logits(model)
    write_through_an_old_alias(model, [alias])
    assert not torch.allclose(before, logits(model), atol=1e-4)
    assert_close(logits(model), expected(model))


def test_hotswap(tmp_path):
    model, other = peft_model(), peft_model()
    for name, parameter in other.named_parameters():
        if ".three." in name:
            parameter.data = torch.randn_like(parameter)
    other.save_pretrained(tmp_path, selected_adapters=["three"])
    peft_multibatch.enable(model)
    before = logits(model)
    hotswap_adapter(model, str(tmp_path / "three"), adapter_name="three", torch_device="cpu")
    assert not torch.allclose(before, logits(model), atol=1e-4)
    assert_close(logits(model), expected(other))


def test_changes_inside_batch_are_seen_by_the_next_call():
    model = peft_model()
    mb = peft_multibatch.enable(model)
    with torch.no_grad(), mb.batch(NAMES):
        before = model(**left_padded()).logits
        for change in (replace_data, set_scale, replace_module):
            change(model)
            after = model(**left_padded()).logits
            assert not torch.allclose(before, after, atol=1e-5)
            before = after
    assert_close(after, expected(model))


def test_weights_stay_where_peft_put_them():
    model = peft_model()
    places = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    peft_multibatch.enable(model)
    logits(model)
    assert places == {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}


def test_ids_stay_with_their_names():
    model = peft_model()
    mb = peft_multibatch.enable(model)
    model.delete_adapter("four")
    assert mb.adapter_names == ["three", None, "eight"]
    with pytest.raises(peft_multibatch.UnknownAdapterError, match="has this id any more, because it was deleted"):
        logits(model, [0, 0, 0, 1, 0, 0])
    model.add_adapter("new", lora_configs()["three"])
    model.add_adapter("four", lora_configs()["four"])
    assert mb.adapter_names == ["three", "four", "eight", "new"]
    assert_close(
        logits(model, [0, 2, -1, 1, 3, 2]), expected(model, ["three", "eight", "__base__", "four", "new", "eight"])
    )


def test_weights_on_the_meta_device_are_never_read():
    model = peft_model()
    peft_multibatch.enable(model)
    layer_of(model).lora_A["three"].to("meta")
    with pytest.raises(peft_multibatch.ModelStateError, match="adapter 'three' are on the meta device"):
        logits(model)


def test_memory_is_not_doubled():
    """No tensor kept between calls is as large as one adapter."""
    model = peft_model()
    peft_multibatch.enable(model)
    logits(model)

    def bytes_held():
        gc.collect()
        tensors = {
            t.untyped_storage().data_ptr(): t
            for t in gc.get_objects()
            if type(t) in (torch.Tensor, torch.nn.Parameter)
        }
        return sum(t.untyped_storage().nbytes() for t in tensors.values())

    before = bytes_held()
    for _ in range(3):
        logits(model)
    model.generate(**left_padded(), max_new_tokens=3, adapter_ids=NAMES)
    smallest = min(
        sum(p.nbytes for key, p in model.named_parameters() if f".{name}." in key)
        for name in ("three", "four", "eight")
    )
    assert bytes_held() - before < smallest / 4


def test_memory_of_adapters_that_moved_is_let_go():
    """This includes adapters that the next call doesn't use."""
    model = peft_model()
    peft_multibatch.enable(model)
    logits(model)
    before = [weakref.ref(p.untyped_storage()) for name, p in model.named_parameters() if ".four." in name]
    gc.collect()
    assert all(ref() is not None for ref in before)
    model.double()
    logits(model, ["three"] * 6)
    gc.collect()
    assert [ref() for ref in before] == [None] * len(before)


def test_adapters_that_are_compared_in_turns_all_have_one():
    """This also holds if steps with more and with fewer adapters alternate."""
    model = peft_model()
    for index in range(5):
        model.add_adapter(f"more {index}", lora_configs()["eight"])
    registry = peft_multibatch.enable(model)._registry
    many, few = list(range(8)), list(range(5))
    before = registry.adapters(many)
    last = layer_of(model).lora_B["more 4"]
    last.weight = torch.nn.Parameter(last.weight * 2)
    for step in range(8):
        registry.adapters([few, many][step % 2], checks=4)
    assert registry.adapters(many, checks=0)[7] is not before[7]


def test_adapters_that_another_thread_lets_go_of_are_read_again():
    registry = peft_multibatch.enable(peft_model())._registry

    class LetGo(OrderedDict):
        def get(self, number):
            found = super().get(number)
            self.clear()
            return found

    before = registry.adapters([0])
    registry._current = LetGo(registry._current)
    assert registry.adapters([0])[0].name == before[0].name


def test_a_rank_that_grows_behind_an_adapter_is_not_taken_for_the_old_one():
    """An open block uses the adapter as it was read, although weights of another rank have replaced it."""
    model = peft_model()
    mb = peft_multibatch.enable(model)
    registry, bank, device = mb._registry, layer_of(model)._multibatch.bank, torch.device("cpu")

    def in_slots():
        return {adapter.slot: adapter for adapter in registry.adapters([2]).values()}

    before = in_slots()
    bank.tables(before, device, 16)
    bank.extend_for_graphs(before, device, lambda *_: True, is_fixed=False)
    assert [table.rank for table in bank.graph_tables] == [8]
    a, b = layer_of(model).lora_A["eight"].weight, layer_of(model).lora_B["eight"].weight
    a.data, b.data = torch.randn(40, a.shape[1]), torch.randn(b.shape[0], 40)
    after = in_slots()
    assert not {*after} & {*before}
    bank.tables(after, device, 16)  # simulates another thread
    (found,) = bank.tables(before, device, 16)
    assert found.rank == 8
    assert found.rows[[*before], :, 2].tolist() == [[8]]
    bank.extend_for_graphs(before, device, lambda *_: True, is_fixed=False)
    bank.extend_for_graphs(after, device, lambda *_: True, is_fixed=False)
    assert [table.rank for table in bank.graph_tables] == [40]
    assert found.rows[[*after], :, 2].tolist() == [[40]]


def test_an_adapter_that_graphs_can_run_costs_no_look_at_the_others(monkeypatch):
    """Otherwise, a step in which an adapter is new would take longer the more adapters there are."""
    model = peft_model()
    mb = peft_multibatch.enable(model)
    bank, device = layer_of(model)._multibatch.bank, torch.device("cpu")

    def extend(number):
        adapters = {adapter.slot: adapter for adapter in mb._registry.adapters([number]).values()}
        bank.tables(adapters, device, 16)
        return bank.extend_for_graphs(adapters, device, lambda *_: True, is_fixed=False)

    assert extend(0)
    tables, looked = bank.graph_tables, []
    likely = bank._likely
    monkeypatch.setattr(bank, "_likely", lambda *args: looked.append(1) or likely(*args))
    assert not extend(1)
    assert bank.graph_tables is tables
    assert not looked
    model.add_adapter("larger", LoraConfig(r=64, target_modules=["q_proj"], init_lora_weights=False))
    assert extend(3)
    assert looked
    assert [table.rank for table in bank.graph_tables] == [64]


def test_threads_that_make_a_table_at_the_same_time(monkeypatch):
    """Each thread reads the rows of its own adapters, whichever table is kept."""
    model = peft_model()
    mb = peft_multibatch.enable(model)
    bank, device = layer_of(model)._multibatch.bank, torch.device("cpu")
    begun, written, done = threading.Event(), threading.Event(), threading.Event()
    make, write, found = WeightTable.__init__, TableBlock.write, {}

    def read(number):
        adapters = {adapter.slot: adapter for adapter in mb._registry.adapters([number]).values()}
        (table,) = bank.tables(adapters, device, 16)
        found[number] = table.rows[[*adapters], 0, 2].tolist()

    def make_late(self, *args):
        if threading.current_thread() is slow:
            begun.set()
            written.wait(1)  # the other thread may have to wait for this one, so this times out
        make(self, *args)

    def write_and_wait(self, adapters):
        write(self, adapters)
        if threading.current_thread() is not slow:
            written.set()
            done.wait(1)

    monkeypatch.setattr(WeightTable, "__init__", make_late)
    monkeypatch.setattr(TableBlock, "write", write_and_wait)
    slow = threading.Thread(target=lambda: (read(0), done.set()))
    slow.start()
    begun.wait(10)
    read(2)
    slow.join()
    assert found == {0: [3], 2: [8]}


def test_a_table_is_written_for_adapters_that_are_new_to_it(monkeypatch):
    """The cost of a step depends on the adapters that are new in it, not on all in use."""
    model = peft_model()
    mb = peft_multibatch.enable(model)
    bank = mb._router.graph.banks[0]
    cpu = torch.device("cpu")
    seen = []
    write = TableBlock.write
    monkeypatch.setattr(TableBlock, "write", lambda self, adapters: (seen.append([*adapters]), write(self, adapters)))

    def tables(names):
        registry = mb._registry
        adapters = registry.adapters([registry.names.ids[name] for name in names])
        return bank.tables({adapter.slot: adapter for adapter in adapters.values()}, cpu, registry.slots.capacity)

    (first,), (both,), (again,) = tables(["three"]), tables(["three", "eight"]), tables(["three"])
    assert [len(each) for each in seen] == [1, 1]
    assert (first.rank, both.rank, again.rank) == (3, 8, 3) and first.rows is both.rows
    layer_of(model).lora_A["three"].weight.data = torch.randn_like(layer_of(model).lora_A["three"].weight)
    tables(["three", "eight"])
    assert len(seen[-1]) == 1
    fresh = make_table(torch.float32, len(both.rows), both.rows.shape[1], cpu)
    registry = mb._registry
    for adapter in registry.adapters([registry.names.ids[name] for name in ("three", "eight")]).values():
        update(fresh, {adapter.slot: adapter.parts(bank.layers)})
        assert both.rows[adapter.slot].equal(fresh.rows[adapter.slot])


def test_slots_are_given_back_and_ids_are_not():
    model = peft_model()
    mb = peft_multibatch.enable(model)
    for index in range(40):
        model.add_adapter(f"new {index}", lora_configs()["three"])
        logits(model, [f"new {index}"] * 6)
        model.delete_adapter(f"new {index}")
    assert mb._registry.slots.capacity == 16
    assert mb.adapter_names == ["three", "four", "eight"] + [None] * 40
