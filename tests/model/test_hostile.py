"""Calls in realistic programs: refusals, threads, tasks, hooks, and changes in the middle of a block."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import transformers
from models import alone, base_model, left_padded, lora_configs, peft_model, row_by_row
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tolerances import assert_close
from torch import nn

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.layers.table import choose
from peft_multibatch.model import scan


NAMES = ["three", "eight", "__base__", "four", "three", "eight"]
OTHERS = NAMES[::-1]


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**left_padded(), **kwargs).logits


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive(), "a thread waits for ever"
    return results[0]


def test_inference_mode_first():
    model = peft_model()
    expected = torch.cat(row_by_row(model, NAMES, left_padded(), lambda row: logits_of(model, row)))
    mb = peft_multibatch.enable(model)
    with torch.inference_mode():
        model.generate(**left_padded(), adapter_ids=NAMES, max_new_tokens=2)
    assert_close(logits(model, adapter_ids=NAMES), expected)
    fast = torch.compile(model.get_base_model(), backend="eager")
    with torch.inference_mode(), mb.batch(NAMES):
        fast(**left_padded(), use_cache=False)
    with mb.batch(OTHERS):
        assert_close(logits(fast, use_cache=False), logits(model, adapter_ids=OTHERS))


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_a_refusal_is_repeated_and_changes_nothing(monkeypatch):
    monkeypatch.setattr("peft_multibatch.adapters.checks.CONTEXT_VARIANTS", ("ALora",))
    model = peft_model()
    mb = peft_multibatch.enable(model)
    mixed = logits(model, adapter_ids=NAMES)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[1, 2])
    model.add_adapter("positions", config)
    for _ in range(2):
        with pytest.raises(errors.UnsupportedError, match="variant ALora"):
            logits(model, adapter_ids=[*NAMES[:-1], "positions"])
        assert torch.equal(logits(model, adapter_ids=NAMES), mixed)  # other adapters still run
    refused = mb.report().adapters[3]
    assert (refused.name, refused.state) == ("positions", "refused")
    assert "variant ALora" in refused.reason
    model.delete_adapter("positions")
    assert torch.equal(logits(model, adapter_ids=NAMES), mixed)
    assert mb.adapter_names == ["three", "four", "eight", None]  # the refused adapter has an id, because PEFT had it


def test_adding_adapters_while_other_threads_run(monkeypatch):
    def slowly(model):
        found = scan.LayerScan(model)
        threading.Event().wait(0.02)
        return found

    monkeypatch.setattr("peft_multibatch.model.handle.LayerScan", slowly)
    model = peft_model()
    mb = peft_multibatch.enable(model)
    expected = logits(model, adapter_ids=NAMES)
    wrong = []

    def work():
        for _ in range(6):
            if not torch.allclose(logits(model, adapter_ids=NAMES), expected, atol=1e-5):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for index in range(3):
        model.add_adapter(f"new{index}", lora_configs()["four"])
        assert f"new{index}" in mb.adapter_names
    for thread in threads:
        thread.join()
    assert wrong == []


def merge(model):
    model.set_adapter("eight")
    model.merge_adapter(["eight"])


def delete(model):
    model.delete_adapter("eight")


@pytest.mark.parametrize("through", ["model", "submodule"])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (merge, errors.MergedAdaptersError),
        (delete, errors.UnknownAdapterError),
    ],
)
def test_changes_inside_a_block_are_noticed(change, error, through):
    model = peft_model()
    mb = peft_multibatch.enable(model)
    call = model if through == "model" else model.get_base_model().model
    with torch.no_grad(), mb.batch(NAMES):
        call(**left_padded())
        with pytest.raises(error):
            change(model)
            call(**left_padded())


def test_disabled_adapters_come_before_ids_as_in_peft():
    model = peft_model()
    peft_multibatch.enable(model)
    mixed = logits(model, adapter_ids=NAMES)
    with model.disable_adapter():
        plain = logits(model)
        assert torch.equal(logits(model, adapter_ids=NAMES), plain)
    assert not torch.equal(mixed, plain)
    assert torch.equal(logits(model, adapter_ids=NAMES), mixed)


def test_an_adapter_added_inside_a_block_adds_nothing_to_other_rows():
    model = peft_model()
    model.delete_adapter("eight")
    names = ["three", "four", "__base__", "four", "three", "three"]
    expected = torch.cat(row_by_row(model, names, left_padded(), lambda row: logits_of(model, row)))
    mb = peft_multibatch.enable(model)
    with mb.batch(names):
        logits(model)
        model.add_adapter("new", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
        model.set_adapter("new")
        assert_close(logits(model), expected)


def test_submodules_see_changes_and_take_ids():
    model = peft_model()
    mb = peft_multibatch.enable(model)
    inner = model.get_base_model().model
    with torch.no_grad(), mb.batch(NAMES):
        before = inner(**left_padded()).last_hidden_state
        model.base_model.model.model.layers[0].self_attn.q_proj.set_scale("three", 9.0)
        after = inner(**left_padded()).last_hidden_state
    assert not torch.allclose(before, after, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(inner(**left_padded(), adapter_ids=NAMES).last_hidden_state, after)
    with pytest.raises(errors.UnknownAdapterError):
        inner(**left_padded(), adapter_ids=[99] * 6)


def test_tasks_do_not_meet():
    model = peft_model()
    mb = peft_multibatch.enable(model)
    plain, expected = logits(model), {key: logits(model, adapter_ids=[key] * 6) for key in ("three", "eight")}
    wrong = []

    async def task(name, begin, wait):
        await asyncio.sleep(begin)
        with mb.batch([name] * 6):
            await asyncio.sleep(wait)
            if not torch.equal(logits(model), expected[name]):
                wrong.append(name)

    async def main():
        await asyncio.gather(task("three", 0, 0.1), task("eight", 0.05, 0.1))

    asyncio.run(main())
    assert wrong == []
    assert torch.equal(logits(model), plain)


def test_a_block_that_is_left_on_another_thread_says_so():
    model = peft_model()
    mb = peft_multibatch.enable(model)

    def stream():
        with mb.batch(NAMES):
            yield logits(model)

    generator = stream()
    in_thread(lambda: next(generator))
    with pytest.raises(errors.ModelStateError, match="a generator that holds"):
        next(generator)


def test_a_block_that_is_left_before_one_that_began_later_says_so():
    model = peft_model()
    mb = peft_multibatch.enable(model)
    expected = logits(model, adapter_ids=OTHERS)

    def stream():
        with mb.batch(NAMES):
            yield

    generator = stream()
    next(generator)
    with mb.batch(OTHERS):
        with pytest.raises(errors.ModelStateError, match="a generator that holds"):
            generator.close()
        assert torch.equal(logits(model), expected)
        # as if this function's frame had the memory that the generator's had
        call = mb._router.live()
        assert len(call.suspended) == 1
        call.suspended = {id(sys._getframe())}
        assert torch.equal(logits(model), expected)


def test_layers_that_see_other_rows_are_refused():
    config = transformers.T5Config(d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=32, vocab_size=50)
    base = transformers.T5ForConditionalGeneration(config)
    model = get_peft_model(base, LoraConfig(target_modules=["relative_attention_bias"]), "one")
    with pytest.raises(errors.UnsupportedError, match="sees positions, not samples"):
        peft_multibatch.enable(model)


def test_compiled_calls_of_two_threads():
    torch._dynamo.reset()
    model = peft_model()
    mb = peft_multibatch.enable(model)
    fast = torch.compile(model.get_base_model(), backend="eager")
    expected = logits(model, adapter_ids=OTHERS)

    def work():
        with mb.batch(OTHERS):
            return logits(fast, use_cache=False)

    with mb.batch(NAMES):
        assert_close(in_thread(work), expected)  # before anything is compiled
        assert_close(logits(fast, use_cache=False), logits(model, adapter_ids=NAMES))
        assert_close(in_thread(work), expected)
        assert_close(in_thread(lambda: logits(model, adapter_ids=OTHERS)), expected)

        def plain():
            with pytest.raises(errors.ModelStateError, match="while ids are active on another"):
                logits(fast, use_cache=False)
            return True

        assert in_thread(plain)


def test_compiled_training_does_not_drop_dropout():
    torch._dynamo.reset()
    config = LoraConfig(target_modules=["q_proj"], lora_dropout=0.9, init_lora_weights=False)
    model = get_peft_model(base_model(), config, "one").train()
    mb = peft_multibatch.enable(model)
    fast = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    with mb.batch([0] * 6), pytest.raises(Exception, match="an adapter trains with dropout"):
        fast(**left_padded(), use_cache=False)


def test_hooks_on_base_layers_keep_what_they_saw():
    model = peft_model()
    peft_multibatch.enable(model)
    base = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    expected, kept = logits(model, adapter_ids=NAMES), []
    handle = base.register_forward_hook(lambda module, inputs, output: kept.append((output, output.clone())))
    assert torch.equal(logits(model, adapter_ids=NAMES), expected)
    handle.remove()
    assert torch.equal(*kept[0])
    base.register_forward_hook(lambda module, inputs, output: kept[0][0])
    for _ in range(2):
        assert torch.equal(logits(model, adapter_ids=NAMES), expected)


def test_adapters_inside_a_saved_module_are_refused():
    shared = {"init_lora_weights": False}
    model = get_peft_model(
        base_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"], **shared), "one"
    )
    model.add_adapter("two", LoraConfig(target_modules=["q_proj", "up_proj"], **shared))
    with pytest.raises(errors.UnsupportedError, match="with adapters inside it"):
        peft_multibatch.enable(model)


def test_a_layer_under_two_parents():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 6)

        def forward(self, x):
            return self.lin(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            block = Block()
            self.layers = nn.ModuleList([block, block])

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    model = get_peft_model(Net(), LoraConfig(target_modules=["lin"], init_lora_weights=False), "one")
    x = torch.randn(2, 6)
    one, plain = alone(model, "one", lambda: model(x)), alone(model, None, lambda: model(x))
    mb = peft_multibatch.enable(model)
    assert_close(model(x, adapter_ids=[0, -1]), torch.stack([one[0], plain[1]]))
    assert peft_multibatch.enable(model.base_model) is mb


def test_a_disabled_handle_stays_away_from_the_model():
    model = peft_model()
    mb = peft_multibatch.enable(model)
    mb.disable()
    model.add_adapter("new", lora_configs()["four"])
    for use in (lambda: mb.adapter_names, mb.report):
        with pytest.raises(errors.NotEnabledError):
            use()
    assert not any("_multibatch" in module.__dict__ for module in model.modules())


def test_the_same_config_object_again():
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "one")
    model.add_adapter("two", config)
    model.eval()
    peft_multibatch.enable(model)
    logits(model, adapter_ids=[0, 1] * 3)
    model.delete_adapter("two")
    config.target_modules = {"q_proj", "up_proj"}
    model.add_adapter("two", config)
    model.eval()
    names = ["one", "two"] * 3
    expected = torch.cat(row_by_row(model, names, left_padded(), lambda row: logits_of(model, row)))
    assert_close(logits(model, adapter_ids=names), expected)


def test_other_entry_points_do_not_ignore_ids():
    from accelerate.utils import extract_model_from_parallel

    model = peft_model().get_base_model()
    mb = peft_multibatch.enable(model)
    mixed = logits(model, adapter_ids=NAMES)
    with mb.batch([0]), pytest.raises(errors.UnsupportedError, match="while adapter ids per sample are active"):
        model.generate_batch([[1, 2]])
    unwrapped = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert torch.equal(logits(unwrapped, adapter_ids=NAMES), mixed)


def test_a_default_device():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]), "one")
    peft_multibatch.enable(model)
    x = torch.randn(3, 4)
    with torch.device("meta"):
        model(x, adapter_ids=[0, -1, 0])


def test_compiled_graphs_keep_nothing():
    torch._dynamo.reset()
    model = peft_model()
    mb = peft_multibatch.enable(model)
    attention = model.get_base_model().model.layers[0].self_attn

    @torch.compile(backend="eager")
    def only_q(x):
        return attention.q_proj(x)  # k and v are computed in vain

    with torch.no_grad(), mb.batch(NAMES):
        only_q(torch.randn(6, 3, 48))
    assert mb._router.graph.sibling_outputs == {}


def test_a_users_own_forward():
    model, log = peft_model().get_base_model(), []
    first = model.forward
    model.forward = lambda *args, **kwargs: (log.append("first"), first(*args, **kwargs))[1]
    mb = peft_multibatch.enable(model)
    ours = model.forward
    model.forward = lambda *args, **kwargs: (log.append("second"), ours(*args, **kwargs))[1]
    logits(model, adapter_ids=NAMES)
    assert log == ["second", "first"]
    mb.disable()
    logits(model)
    assert log == ["second", "first"] * 2


def test_samples_inside_containers_are_counted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, inputs):
            return self.lin(inputs["x"])

    model = get_peft_model(Net(), LoraConfig(target_modules=["lin"]), "one")
    peft_multibatch.enable(model)
    with pytest.raises(errors.AdapterIdsLengthError, match="3 entries for a batch of 6 samples"):
        model({"x": torch.randn(6, 4)}, adapter_ids=[0, -1, 0])


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
def test_a_model_whose_adapters_are_all_gone():
    model = peft_model()
    for name in ("three", "four", "eight"):
        model.delete_adapter(name)
    inner = model.base_model.model  # PEFT's get_base_model() needs an active adapter
    peft_multibatch.enable(model)
    with pytest.raises(errors.NoAdaptersError):
        inner(**left_padded(), adapter_ids=[0] * 6)


def test_part_of_a_model_is_refused():
    with pytest.raises(errors.UnsupportedError, match="expected the model to which they were added"):
        peft_multibatch.enable(peft_model().get_base_model().model)


def test_an_empty_batch():
    model = get_peft_model(nn.Sequential(nn.Embedding(5, 4)), LoraConfig(target_modules=["0"]), "one")
    peft_multibatch.enable(model)
    assert model(torch.zeros(0, 3, dtype=torch.long), adapter_ids=[]).shape == (0, 3, 4)


def test_a_disabled_handle_lets_go_of_the_model():
    import gc
    import weakref

    model = peft_model()
    mb = peft_multibatch.enable(model)
    logits(model, adapter_ids=NAMES)
    mb.disable()
    gone = weakref.ref(model.get_base_model())
    del model
    gc.collect()
    assert gone() is None
    assert mb is not None


def test_models_whose_rows_are_tiled_are_refused_by_name():
    layer = peft_model().base_model.model.model.layers[0].self_attn.q_proj
    for kind in ("dia", "musicgen", "mask2former"):
        choice = choose("decoder.q_proj", layer, SimpleNamespace(config=SimpleNamespace(model_type=kind)))
        assert f"of type '{kind}', and its rows are" in choice.refusal


def test_generate_that_drops_rows():
    """As Whisper does with long audio: half of six rows are still a multiple of three ids, but of other samples'
    rows."""
    model = peft_model()
    peft_multibatch.enable(model)

    def dropping(inner, input_ids, **kwargs):
        inner(input_ids=input_ids.repeat_interleave(2, 0))
        return inner(input_ids=input_ids)

    inputs = {key: value[:3] for key, value in left_padded().items()}
    with pytest.raises(errors.RowMappingError, match="generate continued with 3 rows after 6"):
        model.generate(**inputs, adapter_ids=[0, 1, 2], max_new_tokens=2, custom_generate=dropping)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_generate_without_inputs_is_one_sample(options):
    model = peft_model()
    mb = peft_multibatch.enable(model)
    for call in (lambda **k: model.generate(**k, adapter_ids=[0, 1]), model.generate):
        with mb.batch([0, 1]), pytest.raises(errors.AdapterIdsLengthError, match="2 entries for a batch of 1 samples"):
            call(bos_token_id=1, max_new_tokens=2, **options)
    model.generate(bos_token_id=1, max_new_tokens=2, adapter_ids=[0], **options)


def test_parts_without_adapters_have_rows_of_their_own():
    text = transformers.LlamaConfig(**{**base_model().config.to_dict(), "num_hidden_layers": 1})
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=9)
    lora = LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    model = get_peft_model(transformers.LlavaForConditionalGeneration(config).eval(), lora, "one")
    mb = peft_multibatch.enable(model)
    images = torch.randn(4, 3, 8, 8)
    expected = model.get_base_model().get_image_features(images).pooler_output
    with mb.batch(["one", -1]):
        actual = model.get_base_model().get_image_features(images).pooler_output
    for mine, theirs in zip(actual, expected):
        assert torch.equal(mine, theirs)


def test_generators_with_open_blocks_that_take_turns():
    """Context variables aren't switched with generators, so the first would get the ids of the second."""
    model = peft_model()
    mb = peft_multibatch.enable(model)
    one, other = ["three"] * 6, ["four"] * 6
    expected = {ids[0]: logits(model, adapter_ids=ids) for ids in (one, other)}

    def generate(ids):
        with mb.batch(ids):
            for _ in range(3):
                yield logits(model)

    def call_inside(ids):
        with mb.batch(ids):
            yield
            yield logits(model, adapter_ids=ids)

    first, second = generate(one), generate(other)
    assert_close(next(first), expected["three"])
    assert_close(next(second), expected["four"])
    with pytest.raises(errors.ModelStateError, match="another generator, was still open"):
        next(first)
    assert_close(next(second), expected["four"])
    second.close()
    first, second = call_inside(one), generate(other)
    next(first), next(second)
    assert_close(next(first), expected["three"])
    second.close(), first.close()
    assert_close(logits(model, adapter_ids=one), expected["three"])


def test_asynchronous_generators_with_open_blocks_that_take_turns():
    model = peft_model()
    mb = peft_multibatch.enable(model)

    async def generate(ids):
        with mb.batch(ids):
            for _ in range(2):
                await asyncio.sleep(0)
                yield logits(model)

    async def take_turns():
        first, second = generate(["three"] * 6), generate(["four"] * 6)
        await anext(first), await anext(second)
        with pytest.raises(errors.ModelStateError, match="another generator, was still open"):
            await anext(first)
        await second.aclose()

    asyncio.run(take_turns())


def test_blocks_that_context_managers_open():
    """They are suspended generators, too."""
    model = peft_model()
    mb = peft_multibatch.enable(model)
    expected = logits(model, adapter_ids=NAMES)

    @contextlib.contextmanager
    def block(ids):
        with mb.batch(ids):
            yield

    async def ask():
        with block(["three"] * 6), block(NAMES):
            await asyncio.sleep(0)
            return logits(model)

    with block(["three"] * 6), mb.batch(["four"] * 6), block(NAMES):
        assert_close(logits(model), expected)
        assert_close(asyncio.run(ask()), expected)
    with contextlib.ExitStack() as stack:
        for ids in (["three"] * 6, NAMES):
            stack.enter_context(block(ids))
            stack.enter_context(mb.batch(ids))
        assert_close(logits(model), expected)


def test_adapters_are_enabled_again_on_another_thread(monkeypatch):
    """A batch runs between PEFT's own call and what is recorded of it."""
    model = peft_model()
    peft_multibatch.enable(model)
    expected, found = logits(model, adapter_ids=NAMES), []
    enable = BaseTunerLayer.enable_adapters

    def while_batches_run(layer, enabled):
        found.append(in_thread(lambda: logits(model, adapter_ids=NAMES)))
        enable(layer, enabled)
        found.append(in_thread(lambda: logits(model, adapter_ids=NAMES)))

    monkeypatch.setattr(BaseTunerLayer, "enable_adapters", while_batches_run)
    with model.disable_adapter():
        pass
    assert len(found) > 20
    for each in found:
        assert_close(each, expected)
