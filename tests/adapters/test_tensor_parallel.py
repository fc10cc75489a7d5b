"""A model split over two ranks by `tp_plan`: mixed batches against PEFT on the whole model, one adapter at a time."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import torch.distributed as dist
import transformers
from mixtures import MIXTURES, OTHERS, expected
from models import LLAMA_LIKE, SIZES, left_padded, lora_configs, row_by_row
from peft import LoraConfig, PeftModel, get_peft_model
from ranks import launched, main, report
from tolerances import assert_close, relative_error
from transformers.distributed import DistributedConfig

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.adapters import shards
from peft_multibatch.compat import SPLITS_ADAPTERS
from peft_multibatch.layers.table import choose


UPGRADE = r"peft 0\.\S+ doesn't split its adapters.*: expected peft 0\.21\.1 or newer\. Upgrade peft\."
NAMES = ["three", "__base__", "eight", "four", "eight", "three"]
GREEDY = {"max_new_tokens": 10, "do_sample": False}
MODELS = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 12}),
}


def files(folder, device):
    """Write base models and adapters; Llama has biases on all projections, including row-wise ones."""
    for kind in MODELS if dist.get_rank() == 0 else ():
        torch.manual_seed(0)
        config_class, sizes = MODELS[kind]
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**SIZES | sizes))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(std=0.1)
        model.save_pretrained(folder / kind)
        configs = lora_configs()
        configs["five"] = LoraConfig(r=5, target_modules=LLAMA_LIKE, init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, configs["three"], "three")
        for name in ("four", "eight", "five"):
            model.add_adapter(name, configs[name])
        model.save_pretrained(folder / f"{kind}-adapters")
    dist.barrier()


def read_base(folder, kind, device, split, dtype=torch.float32):
    """Load the base model, split over the ranks or whole on each."""
    how = {"distributed_config": DistributedConfig(tp_size=dist.get_world_size())} if split else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / kind, dtype=dtype, **how)
    return model.to(device).eval()


@functools.cache
def read(folder, kind, device, split, dtype=torch.float32):
    """Load the model with the adapters three, four and eight."""
    adapters = folder / f"{kind}-adapters"
    model = read_base(folder, kind, device, split, dtype)
    model = PeftModel.from_pretrained(model, adapters / "three", adapter_name="three")
    for name in ("four", "eight"):
        model.load_adapter(adapters / name, adapter_name=name)
    return model.eval()


def inputs_on(device):
    return {key: value.to(device) for key, value in left_padded().items()}


def logits(model, inputs, **ids):
    with torch.no_grad():
        return model(**inputs, **ids).logits


def compare(folder, device, kind, names, **options):
    """Compare tokens and logits of a mixed batch with PEFT on the whole model."""
    split, whole, inputs = read(folder, kind, device, True), read(folder, kind, device, False), inputs_on(device)
    mb = peft_multibatch.enable(split)
    try:
        actual = split.generate(**inputs, **GREEDY, **options, adapter_ids=names)
        mixed = logits(split, inputs, adapter_ids=names)
    finally:
        mb.disable()
    tokens = row_by_row(whole, names, inputs, lambda row: whole.generate(**row, **GREEDY, **options))
    assert torch.equal(actual, torch.cat(tokens))
    assert_close(mixed, torch.cat(row_by_row(whole, names, inputs, lambda row: logits(whole, row))))


def greedy_tokens_and_logits(folder, device):
    compare(folder, device, "llama", NAMES)


def norms_on_split_heads(folder, device):
    compare(folder, device, "qwen3", NAMES)


def rows_in_any_order(folder, device):
    for order in ([3, 0, 5, 1, 4, 2], [2, 4, 0, 5, 3, 1]):
        compare(folder, device, "llama", [NAMES[row] for row in order])
    compare(folder, device, "llama", ["__base__"] * 6)


def beams(folder, device):
    compare(folder, device, "llama", NAMES, num_beams=3)


def peft_on_the_split_model(folder, device):
    """PEFT on the split model is as close to the whole model as we are, so our tolerance hides no error of the
    split."""
    split, inputs = read(folder, "llama", device, True), inputs_on(device)
    peft = torch.cat(row_by_row(split, NAMES, inputs, lambda row: logits(split, row)))
    mb = peft_multibatch.enable(split)
    try:
        labels = {entry.how for entry in mb.report()}
        assert labels == {"fused q_proj/k_proj/v_proj", "segmented", "fused gate_proj/up_proj"}
        assert_close(logits(split, inputs, adapter_ids=NAMES), peft)
    finally:
        mb.disable()
    assert torch.equal(torch.cat(row_by_row(split, NAMES, inputs, lambda row: logits(split, row))), peft)


def one_collective_for_a_row_wise_layer(folder, device):
    """There are as many collectives as in the base model, plus one that compares ids."""
    split, inputs = read(folder, "llama", device, True), inputs_on(device)
    counts, counted = [0], dist.all_reduce

    def all_reduce(*args, **kwargs):
        counts[0] += 1
        return counted(*args, **kwargs)

    mb = peft_multibatch.enable(split)
    dist.all_reduce = all_reduce
    try:
        with split.disable_adapter():
            logits(split, inputs)
        base, counts[0] = counts[0], 0
        logits(split, inputs, adapter_ids=NAMES)
    finally:
        dist.all_reduce = counted
        mb.disable()
    assert base == 2 * SIZES["num_hidden_layers"]
    assert counts[0] == base + 1


def half_precision(folder, device):
    """Errors against float32 are no larger than those of PEFT on the split model."""
    split, inputs = read(folder, "llama", device, True, torch.bfloat16), inputs_on(device)
    whole, real = read(folder, "llama", device, False, torch.bfloat16).float(), inputs["attention_mask"].bool()
    reference = torch.cat(row_by_row(whole, NAMES, inputs, lambda row: logits(whole, row)))[real]
    peft = torch.cat(row_by_row(split, NAMES, inputs, lambda row: logits(split, row)))[real]
    mb = peft_multibatch.enable(split)
    try:
        mixed = logits(split, inputs, adapter_ids=NAMES)[real]
    finally:
        mb.disable()
    assert mixed.dtype == torch.bfloat16
    ours, theirs = relative_error(mixed, reference), relative_error(peft, reference)
    assert ours <= 1.1 * theirs, (ours, theirs)


def mixtures(folder, device):
    split, whole, inputs = read(folder, "llama", device, True), read(folder, "llama", device, False), inputs_on(device)
    mb = peft_multibatch.enable(split)
    try:
        for entries in (MIXTURES, *OTHERS):
            with mb.batch(entries):
                mixed = logits(split, inputs)
            assert_close(mixed, expected(whole, entries, inputs, lambda row: logits(whole, row)))
    finally:
        mb.disable()


def adapters_that_come_change_and_go(folder, device):
    split, whole, inputs = read(folder, "llama", device, True), read(folder, "llama", device, False), inputs_on(device)
    mb = peft_multibatch.enable(split)

    def check(names):
        oracle = torch.cat(row_by_row(whole, names, inputs, lambda row: logits(whole, row)))
        for _ in range(2):
            assert_close(logits(split, inputs, adapter_ids=names), oracle)

    names = ["three", "five", "eight", "__base__", "five", "four"]
    try:
        check(NAMES)
        for model in (split, whole):
            model.load_adapter(folder / "llama-adapters" / "five", adapter_name="five")
        check(names)
        for model in (split, whole):
            layer = model.base_model.model.model.layers[0]
            for projection in (layer.self_attn.q_proj, layer.mlp.down_proj):
                for part in (projection.lora_A["five"], projection.lora_B["five"]):
                    part.weight.data.mul_(1.5)  # changes this rank's part of the DTensor
                projection.scaling["eight"] *= 2
        check(names)
        for model in (split, whole):  # another adapter of another rank under the same name
            model.delete_adapter("five")
            model.load_adapter(folder / "llama-adapters" / "four", adapter_name="five")
        check(names)
        for model in (split, whole):
            model.delete_adapter("five")
        check(NAMES)
        with pytest.raises(errors.UnknownAdapterError):
            split(**inputs, adapter_ids=names)
    finally:
        mb.disable()
        for model in (split, whole):
            layer = model.base_model.model.model.layers[0]
            layer.self_attn.q_proj.scaling["eight"] /= 2
            layer.mlp.down_proj.scaling["eight"] /= 2


def hooks_on_base_layers(folder, device):
    """A hook gets the base layer's whole output, which isn't modified afterwards."""
    split, whole, inputs = read(folder, "llama", device, True), read(folder, "llama", device, False), inputs_on(device)
    seen = []
    for projection in ("self_attn.o_proj", "self_attn.v_proj"):
        layer = split.get_submodule(f"base_model.model.model.layers.0.{projection}")
        hook = layer.base_layer.register_forward_hook(lambda module, args, output: seen.append((output, output + 0)))
        mb = peft_multibatch.enable(split)
        try:
            actual = logits(split, inputs, adapter_ids=NAMES)
        finally:
            mb.disable()
            hook.remove()
        assert_close(actual, torch.cat(row_by_row(whole, NAMES, inputs, lambda row: logits(whole, row))))
    assert len(seen) == 2
    assert all(torch.equal(output, kept) for output, kept in seen)


def ranks_with_different_ids_are_told(folder, device):
    split, inputs = read(folder, "llama", device, True), inputs_on(device)
    mb = peft_multibatch.enable(split)
    try:
        ids = NAMES if dist.get_rank() else NAMES[::-1]
        with pytest.raises(errors.AdapterIdsError, match=r"different adapter_ids.*expected the same.*Pass every rank"):
            split.generate(**inputs, **GREEDY, adapter_ids=ids)
        with pytest.raises(errors.AdapterIdsError, match="different adapter_ids"):
            split(**inputs, adapter_ids=ids)
        for wrong, error in ((["nobody"] * 6, errors.UnknownAdapterError), (NAMES[1:], errors.AdapterIdsLengthError)):
            told = error if dist.get_rank() else errors.AdapterIdsError
            with pytest.raises(errors.AdapterIdsError) as caught:  # and no rank waits for another that raised
                split(**inputs, adapter_ids=wrong if dist.get_rank() else NAMES)
            assert caught.type is told
            with pytest.raises(error):
                split(**inputs, adapter_ids=wrong)
        logits(split, inputs, adapter_ids=NAMES)
    finally:
        mb.disable()


def continuous_batching_is_refused(folder, device):
    split = read(folder, "llama", device, True)
    mb = peft_multibatch.enable(split)
    try:
        with pytest.raises(errors.UnsupportedError, match=r"continuous batching.*split over devices"):
            split.generate_batch([[3, 4], [5, 6]], adapter_ids=["three", -1])
    finally:
        mb.disable()


def gradients_and_compiled_code_are_refused(folder, device):
    split, inputs = read(folder, "llama", device, True), inputs_on(device)
    mb = peft_multibatch.enable(split)
    try:
        split.set_adapter("three")  # makes its weights require gradients
        with pytest.raises(errors.UnsupportedError, match=r"with gradients.*torch.no_grad"):
            split(**inputs, adapter_ids=NAMES)
        split.set_requires_grad(["three", "four", "eight"], requires_grad=False)
        mixed = split(**inputs, adapter_ids=NAMES).logits  # nothing requires gradients
        assert_close(mixed, logits(split, inputs, adapter_ids=NAMES))
        with mb.batch(NAMES), torch.no_grad():
            compiled = torch.compile(split.get_base_model(), backend="eager")
            with pytest.raises(errors.UnsupportedError, match="was compiled"):
                compiled(**inputs)
        torch._dynamo.reset()
        if device.type == "cuda":
            mb.disable()
            mb = peft_multibatch.enable(split, backend="torch")
            mixed = logits(split, inputs, adapter_ids=NAMES)
            oracle = read(folder, "llama", device, False)
            assert_close(mixed, torch.cat(row_by_row(oracle, NAMES, inputs, lambda row: logits(oracle, row))))
    finally:
        mb.disable()


def what_cannot_be_split_is_refused(folder, device):
    split = read(folder, "llama", device, True)
    shared = {"r": 4, "task_type": "CAUSAL_LM"}
    for options, message in (
        ({"target_modules": ["q_proj"], "lora_bias": True}, "variant or a bias"),
        ({"target_modules": ["lm_head"]}, "the plan 'colwise_gather_output', for which PEFT doesn't split"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's warning about lm_head
            model = get_peft_model(read_base(folder, "llama", device, True), LoraConfig(**shared, **options))
        with pytest.raises(errors.UnsupportedError, match=message):
            peft_multibatch.enable(model)
    layer = split.base_model.model.model.layers[0].self_attn.q_proj
    assert "sharded by FSDP" in choose("q_proj", layer, None, is_gathered=True).refusal
    layer = layer.lora_B["three"]
    before, base = layer.weight, split.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    base._hf_tp_plan = None  # as versions of PEFT that don't know transformers' plans leave it
    for splits_adapters, message in ((True, "the plan None.*expected plain LoRA"), (False, UPGRADE)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "SPLITS_ADAPTERS", splits_adapters)
            mb = peft_multibatch.enable(split)
        with pytest.raises(errors.UnsupportedError, match=message):
            logits(split, inputs_on(device), adapter_ids=NAMES)
        mb.disable()
    base._hf_tp_plan = "colwise"
    mb, inputs = peft_multibatch.enable(split), inputs_on(device)
    others = [name if name != "three" else "eight" for name in NAMES]
    before_all = logits(split, inputs, adapter_ids=others)
    layer.weight = torch.nn.Parameter(before.full_tensor(), requires_grad=False)
    with pytest.raises(errors.UnsupportedError, match="adapter 'three' are not split with it"):
        logits(split, inputs, adapter_ids=NAMES)
    assert_close(logits(split, inputs, adapter_ids=others), before_all)
    layer.weight = before
    logits(split, inputs, adapter_ids=NAMES)
    mb.disable()


def an_older_peft_is_named(folder, device):
    """It adds adapters to split layers, and fails in its own forward."""
    split = read(folder, "llama", device, True)
    with pytest.raises(RuntimeError, match="The size of tensor"):
        logits(split, inputs_on(device))
    with pytest.raises(errors.UnsupportedError, match=UPGRADE):
        peft_multibatch.enable(split)


CASES = [
    files, greedy_tokens_and_logits, norms_on_split_heads, rows_in_any_order, beams, peft_on_the_split_model,
    one_collective_for_a_row_wise_layer, half_precision, mixtures, adapters_that_come_change_and_go,
    hooks_on_base_layers, ranks_with_different_ids_are_told, continuous_batching_is_refused,
    gradients_and_compiled_code_are_refused,
    what_cannot_be_split_is_refused,
]  # fmt: skip


on_cpus, on_gpus = launched(__file__, "gloo"), launched(__file__, "nccl")


needs_plans = pytest.mark.skipif(
    not SPLITS_ADAPTERS, reason="this PEFT doesn't split adapters with transformers' plans"
)


@pytest.mark.skipif(SPLITS_ADAPTERS, reason="needs peft 0.21.0")
def test_an_older_peft_is_named(on_cpus):
    report(on_cpus["files"])
    report(on_cpus["an_older_peft_is_named"])


@needs_plans
@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_two_ranks(on_cpus, case):
    report(on_cpus[case])


@needs_plans
@pytest.mark.multi_gpu
@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_two_gpus(on_gpus, case):
    report(on_gpus[case])


if __name__ == "__main__":
    main(CASES if SPLITS_ADAPTERS else [files, an_older_peft_is_named])
