"""Every error message says what came, what was expected and what to do."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from models import base_model, left_padded, peft_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tolerances import assert_close

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.plan.ids import resolve
from peft_multibatch.plan.names import AdapterNames


KNOWN = "0 ('three'), 1 ('four'), 2 ('eight'), -1 ('__base__')"
WHAT_IS_EXPECTED = (
    "expected a list, tuple or tensor with one id or name per sample, such as [0, 0, 1] or ['sql', '__base__']."
)

BAD_IDS = {
    "unknown id": (
        [0, 0, 7, 0, 0, 0],
        errors.UnknownAdapterError,
        f"adapter_ids[2] is 7, and no adapter has this id: expected one of {KNOWN}.",
    ),
    "negative id": (
        [-2] * 6,
        errors.UnknownAdapterError,
        f"adapter_ids[0] is -2, and no adapter has this id: expected one of {KNOWN}.",
    ),
    "unknown name": (
        ["three", "sqll", 0, 0, 0, 0],
        errors.UnknownAdapterError,
        f"adapter_ids[1] is 'sqll', and no adapter has this name: expected one of {KNOWN}.",
    ),
    "too short": (
        [0, 0, 1],
        errors.AdapterIdsLengthError,
        "adapter_ids has 3 entries for a batch of 6 samples: expected one entry per sample. Use -1 for the base "
        "model.",
    ),
    "too long": (
        [0] * 12,
        errors.AdapterIdsLengthError,
        "adapter_ids has 12 entries for a batch of 6 samples: expected one entry per sample. Use -1 for the base "
        "model.",
    ),
    "empty": (
        [],
        errors.AdapterIdsLengthError,
        "adapter_ids has 0 entries for a batch of 6 samples: expected one entry per sample. Use -1 for the base "
        "model.",
    ),
    "one string": (
        "three",
        errors.AdapterIdsTypeError,
        f"adapter_ids is 'three' of type str: {WHAT_IS_EXPECTED}",
    ),
    "one number": (1, errors.AdapterIdsTypeError, f"adapter_ids is 1 of type int: {WHAT_IS_EXPECTED}"),
    "a set": ({1}, errors.AdapterIdsTypeError, f"adapter_ids is {{1}} of type set: {WHAT_IS_EXPECTED}"),
    "a float": (
        [0, 1.0, 0, 0, 0, 0],
        errors.AdapterIdsTypeError,
        "adapter_ids[1] is 1.0 of type float: expected an integer id or an adapter's name, -1 or '__base__' for "
        "the base model, or a mixture such as {'sql': 0.7, 'poet': 0.3}.",
    ),
    "a bool": (
        [True] * 6,
        errors.AdapterIdsTypeError,
        "adapter_ids[0] is True of type bool: expected an integer id or an adapter's name, -1 or '__base__' for "
        "the base model, or a mixture such as {'sql': 0.7, 'poet': 0.3}.",
    ),
    "None for a row": (
        [0, None, 0, 0, 0, 0],
        errors.AdapterIdsTypeError,
        "adapter_ids[1] is None of type NoneType: expected an integer id or an adapter's name, -1 or '__base__' "
        "for the base model, or a mixture such as {'sql': 0.7, 'poet': 0.3}.",
    ),
    "a tensor of floats": (
        torch.zeros(6),
        errors.AdapterIdsTypeError,
        "adapter_ids is a tensor of shape [6] and dtype torch.float32: expected a 1-D integer tensor with one id per "
        "sample.",
    ),
    "a tensor of two dimensions": (
        torch.zeros(6, 1, dtype=torch.long),
        errors.AdapterIdsTypeError,
        "adapter_ids is a tensor of shape [6, 1] and dtype torch.int64: expected a 1-D integer tensor with one id per "
        "sample.",
    ),
}


@pytest.fixture(scope="module")
def model():
    model = peft_model()
    peft_multibatch.enable(model)
    return model


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(("ids", "error", "message"), BAD_IDS.values(), ids=BAD_IDS)
def test_bad_ids(model, call, ids, error, message):
    method = model if call == "forward" else lambda **kwargs: model.generate(**kwargs, max_new_tokens=1)
    with torch.no_grad():
        plain = model(**left_padded()).logits
        with pytest.raises(error) as caught:
            method(**left_padded(), adapter_ids=ids)
        assert str(caught.value) == message
        assert isinstance(caught.value, ValueError)
        assert torch.equal(model(**left_padded()).logits, plain)


def test_a_batch_of_another_size_inside_batch(model):
    mb = peft_multibatch.enable(model)
    with mb.batch([0, 0, 1]), pytest.raises(errors.AdapterIdsLengthError, match="3 entries for a batch of 6 samples"):
        model(**left_padded())


def test_ids_and_names_at_once(model):
    with pytest.raises(errors.AdapterIdsError) as caught:
        model(**left_padded(), adapter_ids=[0] * 6, adapter_names=["three"] * 6)
    assert str(caught.value) == (
        "both adapter_ids and adapter_names were passed: expected one of them. adapter_ids also accepts names."
    )


def test_merged_adapters():
    model = peft_model()
    peft_multibatch.enable(model)
    model.set_adapter("eight")
    model.merge_adapter(["eight"])
    with pytest.raises(errors.MergedAdaptersError) as caught:
        model(**left_padded(), adapter_ids=[0] * 6)
    assert str(caught.value) == (
        "adapter_ids was passed while ['eight'] is merged into the base weights of model.layers.0.self_attn.q_proj: "
        "expected unmerged adapters. Call model.unmerge_adapter() first."
    )
    model.unmerge_adapter()
    model(**left_padded(), adapter_ids=[0] * 6)


def test_no_adapters():
    model = base_model()
    peft_multibatch.enable(model)
    with pytest.raises(errors.NoAdaptersError) as caught:
        model(**left_padded(), adapter_ids=[0] * 6)
    assert str(caught.value) == (
        "adapter_ids was passed, but the model has no adapters: expected at least one. Add it with "
        "model.load_adapter(...) or model.add_adapter(...), or register some with mb.adapter_store(...)."
    )


@pytest.mark.parametrize("thing", ["llama", None, torch.nn.Linear(2, 2), {}], ids=["str", "None", "Linear", "dict"])
def test_enable_on_something_that_is_no_model(thing):
    with pytest.raises(errors.UnsupportedError) as caught:
        peft_multibatch.enable(thing)
    assert str(caught.value) == (
        f"enable got an object of type {type(thing).__name__}: expected a PeftModel, or a transformers model. Add "
        "adapters to it with add_adapter() or load_adapter()."
    )
    assert isinstance(caught.value, TypeError)


def test_other_tuners():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(base_model(), config, adapter_name="other")
    with pytest.raises(errors.UnsupportedError) as caught:
        peft_multibatch.enable(model)
    assert str(caught.value) == (
        "adapter 'other' has the PEFT type PROMPT_TUNING: expected LoRA, or a tuner whose layers compute a row only "
        "from the row and the adapter. Delete it, or run the adapters one at a time without adapter_ids."
    )


def test_backends_that_are_not_there():
    with pytest.raises(errors.BackendUnavailableError) as caught:
        peft_multibatch.enable(peft_model(), backend="cuda")
    assert str(caught.value) == "backend 'cuda' is unknown: expected 'auto', 'triton' or 'torch'."


@pytest.mark.skipif(torch.cuda.is_available(), reason="triton can run here")
def test_triton_where_it_can_not_run_is_an_error_and_no_fallback(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(errors.BackendUnavailableError) as caught:
        peft_multibatch.enable(peft_model(), backend="triton")
    assert str(caught.value) == (
        "backend 'triton' is not available, because torch finds no CUDA device: expected a CUDA device and triton. "
        "Pass backend='auto' or 'torch'."
    )


def test_other_options_on_an_enabled_model(model):
    with pytest.raises(errors.ModelStateError) as caught:
        peft_multibatch.enable(model, fuse=False)
    assert str(caught.value) == (
        "enable was called with backend='auto' and fuse=False on a model that is enabled with backend='auto' and "
        "fuse=True: expected the same options. Call disable first."
    )


def test_rows_that_can_not_be_mapped():
    model = peft_model()
    mb = peft_multibatch.enable(model)
    with mb.batch([0, 1, 2, 0]), pytest.raises(errors.RowMappingError, match="received 6 rows for 4 adapter ids"):
        model.base_model.model.model.layers[0](torch.randn(6, 3, 48), position_embeddings=None)


@pytest.mark.parametrize(
    "ids",
    [
        [0, 1, -1],
        (0, 1, -1),
        torch.tensor([0, 1, -1]),
        np.array([0, 1, -1]),
        [np.int64(0), torch.tensor(1), "__base__"],
    ],
    ids=["list", "tuple", "tensor", "array", "mixed"],
)
def test_good_ids(ids):
    assert resolve(ids, AdapterNames(["a", "b"])) == [0, 1, -1]


@pytest.mark.parametrize("entry", ["__base__", {"__base__": 0.5}])
def test_an_adapter_called_base_is_reached_by_its_id(entry):
    names = AdapterNames(["sql", "__base__"])
    assert resolve([-1, 1, "sql", {1: 0.5}], names) == [-1, 1, 0, ((1, 0.5),)]
    with pytest.raises(errors.AdapterIdsError) as caught:
        resolve([0, entry], names)
    assert str(caught.value) == (
        "adapter_ids[1] is '__base__', which stands for the base model, but an adapter has this name: expected "
        "another name for the adapter. Write -1 for the base model, or 1 for the adapter."
    )
    assert resolve(["__base__"], AdapterNames(["sql"])) == [-1]


def test_ids_without_enable():
    """The statements of docs/loops.md about models that aren't enabled, or no longer are."""
    model = peft_model()
    for _ in range(2):
        for owner in (model, model.get_base_model()):
            with pytest.raises(ValueError, match="not used by the model"):
                owner.generate(**left_padded(), adapter_ids=[0] * 6, max_new_tokens=2)
        mb = peft_multibatch.enable(model)
        assert peft_multibatch.enable(model) is mb
        with pytest.raises(errors.NotEnabledError, match="copy of an enabled model"):
            copy.deepcopy(model)(**left_padded(), adapter_ids=[0] * 6)
        mb.disable()
        with pytest.raises(errors.NotEnabledError, match="was disabled"), mb.batch([0] * 6):
            pass


MISSPELT = ["adapter_id", "adapters", "adapter_name", "adaptor_ids", "adpater_ids", "lora_request", "peft_ids"]


@pytest.mark.parametrize("keyword", MISSPELT)
@pytest.mark.parametrize("part", ["outer", "inner", "decoder", "copy"])
def test_misspelt_ids(keyword, part):
    outer = peft_model()
    peft_multibatch.enable(outer)
    model = {"outer": lambda: outer, "inner": outer.get_base_model, "copy": lambda: copy.deepcopy(outer)}.get(
        part, lambda: outer.get_base_model().model
    )()
    methods = [model, model.forward, model.generate] if part != "decoder" else [model, model.forward]
    for method in methods:
        with pytest.raises(errors.AdapterIdsTypeError) as caught:
            method(**left_padded(), **{keyword: [0] * 6})
        name = "generate" if method == methods[-1] and part != "decoder" else "forward"
        assert str(caught.value) == (
            f"{name} got the argument {keyword}, which nothing reads: expected adapter_ids for adapters. Write "
            "adapter_ids=..., or leave it out."
        )
    with torch.no_grad():
        model(**left_padded(), **{keyword: None})  # None means not given


def test_misspelt_ids_of_a_compiled_model(compiled):
    _, mb, model, _ = compiled
    with pytest.raises(Exception, match="compiled model, whose graph can't take"), torch.no_grad():
        model(**left_padded(), adapter_id=[0] * 6)
    with mb.batch([0] * 6), torch.no_grad():
        model(**left_padded())


def test_what_models_read_themselves_is_passed_on():
    """Arguments that models read by name, deep inside or through keywords, and those that transformers and PEFT
    add."""

    class Mixer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(6, 6)

        def forward(self, x, adapter_gate=1.0, **kwargs):
            return self.linear(x) * adapter_gate

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = Mixer()

        def forward(self, x, **kwargs):
            return self.mixer(x, **kwargs)

    model = get_peft_model(Net(), LoraConfig(target_modules=["linear"], init_lora_weights=False))
    mb = peft_multibatch.enable(model)
    x = torch.randn(2, 6)
    assert torch.equal(model(x, adapter_gate=2.0), 2 * model(x))
    with mb.batch([0, 0]):
        assert_close(model(x, adapter_gate=2.0, lengths=[3]), 2 * model(x))
    with pytest.raises(errors.AdapterIdsTypeError, match="adapter_gates"):
        model(x, adapter_gates=2.0)
    decoder = peft_model()
    plain = decoder(**left_padded()).logits
    peft_multibatch.enable(decoder)
    more = {"num_items_in_batch": 3, "output_attentions": False, "is_causal": True, "alora_offsets": None}
    assert torch.equal(decoder(**left_padded(), **more, cache_position=torch.arange(9)).logits, plain)


def test_the_hierarchy_is_the_one_that_is_drawn():
    drawn = {line.replace("├── ", "│   ").replace("└── ", "│   ").replace("│", " ").split()[0] for line in
             errors.__doc__.splitlines() if (line.strip() and "Error" in line) or "Missing" in line}  # fmt: skip
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert drawn == defined
    for name in defined - {"MultibatchError"}:
        assert issubclass(getattr(errors, name), errors.MultibatchError)
