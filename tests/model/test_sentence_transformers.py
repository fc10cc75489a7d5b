"""Loops of Sentence Transformers, which sort by length: every text gets its own adapter, wherever the loop puts it."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from test_pipelines import tokenizer
from tolerances import assert_close

import peft_multibatch
from peft_multibatch import errors
from peft_multibatch.model import sentence_transformers as followed


library = pytest.importorskip("sentence_transformers")

NAMES = ["a", "b", -1, "c", "a", "__base__", 2, {"a": 0.5, "c": 1.5}, "b"]
TEXTS = ["w3 w5 w6", "w10", "w20 w31 w2 w3 w9 w9 w14", "w7 w8", "w10", "w4 w7 w9 w31", "w3 w5 w6", "w9 w8", "w44"]
PAIRS = [(text, f"w{index + 5} w9") for index, text in enumerate(TEXTS)]
BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 160,
    "initializer_range": 0.2,
}


def folder(path, kind="BertModel", **options):
    torch.manual_seed(0)
    getattr(transformers, kind)(transformers.BertConfig(**BERT, **options)).save_pretrained(path)
    tokenizer("right").save_pretrained(path)
    return str(path)


def lora():
    return LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value", "dense"], init_lora_weights=False)


def adapted(path, model):
    """Load adapters from folders with the library's own method."""
    base = copy.deepcopy(model.transformers_model)
    for name in "abc":
        get_peft_model(copy.deepcopy(base), lora(), adapter_name=name).save_pretrained(path / "adapters")
        model.load_adapter(str(path / "adapters" / name), adapter_name=name)
    return model


@pytest.fixture
def reader(tmp_path):
    model = library.SentenceTransformer(folder(tmp_path / "base"), device="cpu")
    model.prompts = {"query": "w9 w8", "document": "w7 ", "none": ""}
    return adapted(tmp_path, model)


@pytest.fixture
def judge(tmp_path):
    path = folder(tmp_path / "base", "BertForSequenceClassification", num_labels=1)
    return adapted(tmp_path, library.CrossEncoder(path, device="cpu"))


def under(model, entry, call):
    """PEFT alone: a plain call with one adapter active, none, or the sum of two combined into one."""
    inner = model.transformers_model
    layers = [each for each in inner.modules() if hasattr(each, "lora_A")]
    if entry in (-1, "__base__"):
        for layer in layers:
            layer.enable_adapters(False)
        try:
            return call()
        finally:
            for layer in layers:
                layer.enable_adapters(True)
    weights = entry if isinstance(entry, dict) else {"abc"[entry] if isinstance(entry, int) else entry: 1.0}
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.set_adapter(list(weights))
        for name, weight in weights.items():
            layer.scaling[name] *= weight
    try:
        return call()
    finally:
        for layer, scaling in zip(layers, before):
            layer.scaling.update(scaling)
            layer.set_adapter("a")


def one_by_one(model, method, inputs, **options):
    """The reference: every input by itself."""
    call = getattr(model, method)
    rows = [under(model, entry, lambda each=each: call([each], **options)) for entry, each in zip(NAMES, inputs)]
    return torch.as_tensor(np.concatenate(rows))


@pytest.mark.parametrize("size", [1, 2, 4, 32])
def test_encode(reader, size):
    expected = one_by_one(reader, "encode", TEXTS)
    mb = peft_multibatch.enable(reader)
    assert mb is peft_multibatch.enable(reader.transformers_model)
    assert_close(torch.as_tensor(reader.encode(TEXTS, adapter_ids=NAMES, batch_size=size)), expected)
    assert_close(torch.as_tensor(reader.encode(TEXTS, adapter_names=NAMES, batch_size=size)), expected)
    assert_close(reader.encode(inputs=tuple(TEXTS), adapter_ids=NAMES, convert_to_tensor=True), expected)
    assert_close(torch.as_tensor(reader.encode(np.array(TEXTS), adapter_ids=NAMES, batch_size=size)), expected)
    with mb.batch(NAMES):
        assert_close(torch.as_tensor(reader.encode(TEXTS, batch_size=size)), expected)
        assert_close(torch.as_tensor(reader.encode(sentences=TEXTS, batch_size=size)), expected)
        other = reader.encode(TEXTS, batch_size=size, adapter_ids=[0] * len(TEXTS))
    assert_close(torch.as_tensor(other), torch.as_tensor(under(reader, 0, lambda: reader.encode(TEXTS))))


@pytest.mark.parametrize("size", [2, 32])
@pytest.mark.parametrize("method", ["encode_query", "encode_document"])
def test_prompts(reader, method, size):
    expected = one_by_one(reader, method, TEXTS)
    mb = peft_multibatch.enable(reader)
    assert_close(torch.as_tensor(getattr(reader, method)(TEXTS, adapter_ids=NAMES, batch_size=size)), expected)
    with mb.batch(NAMES):
        assert_close(torch.as_tensor(getattr(reader, method)(TEXTS, batch_size=size)), expected)


@pytest.mark.parametrize("size", [1, 4, 32])
def test_predict(judge, size):
    expected = one_by_one(judge, "predict", PAIRS)
    mb = peft_multibatch.enable(judge)
    assert_close(torch.as_tensor(judge.predict(PAIRS, adapter_ids=NAMES, batch_size=size)), expected)
    assert_close(torch.as_tensor(judge.predict(np.array(PAIRS), adapter_ids=NAMES, batch_size=size)), expected)
    with mb.batch(NAMES):
        assert_close(torch.as_tensor(judge.predict(list(map(list, PAIRS)), batch_size=size)), expected)
    one = judge.predict(PAIRS[0], adapter_ids=["a"])
    assert one.shape == ()
    assert_close(torch.as_tensor(one), expected[0])
    assert_close(torch.as_tensor(judge.predict(np.array(PAIRS[0]), adapter_ids=["a"])), expected[0])


def test_rank(judge):
    expected = [
        under(judge, entry, lambda text=text: judge.rank("w9", [text])[0]["score"])
        for entry, text in zip(NAMES, TEXTS)
    ]
    mb = peft_multibatch.enable(judge)
    with mb.batch(NAMES):
        found = {each["corpus_id"]: each["score"] for each in judge.rank("w9", TEXTS, batch_size=4)}
    assert_close(torch.tensor([found[index] for index in range(len(TEXTS))]), torch.tensor(expected))


def test_one_text(reader):
    expected = [under(reader, name, lambda: reader.encode(TEXTS[0])) for name in ("b", -1)]
    mb = peft_multibatch.enable(reader)
    assert_close(torch.as_tensor(reader.encode(TEXTS[0], adapter_ids=["b"])), torch.as_tensor(expected[0]))
    with mb.batch([-1]):
        assert_close(torch.as_tensor(reader.encode(TEXTS[0])), torch.as_tensor(expected[1]))
    with pytest.raises(errors.AdapterIdsTypeError, match="adapter_ids is 'b' of type str"):
        reader.encode(TEXTS[0], adapter_ids="b")
    with pytest.raises(errors.AdapterIdsLengthError, match="2 entries for a batch of 1"):
        reader.encode(TEXTS[0], adapter_ids=["b", "a"])
    assert reader.encode([], adapter_ids=[]).shape == (0,)


def test_other_values(reader):
    """Tokens, all features, and quantized embeddings."""
    options = {"output_value": "token_embeddings"}
    tokens = [
        under(reader, name, lambda text=text: reader.encode(text, **options)) for name, text in zip(NAMES, TEXTS)
    ]
    features = under(reader, "b", lambda: reader.encode([TEXTS[1]], output_value=None))[0]
    peft_multibatch.enable(reader)
    found = reader.encode(TEXTS, adapter_ids=NAMES, batch_size=4, **options)
    for mine, theirs in zip(found, tokens):
        assert_close(mine, theirs)
    mine = reader.encode(TEXTS, adapter_ids=NAMES, output_value=None, batch_size=4)[1]
    assert mine.keys() == features.keys()
    assert_close(mine["sentence_embedding"], features["sentence_embedding"])
    bits = reader.encode(TEXTS, adapter_ids=NAMES, precision="ubinary", normalize_embeddings=True, truncate_dim=16)
    assert bits.shape == (len(TEXTS), 2)


def test_progress_is_the_library_s(reader, capsys):
    peft_multibatch.enable(reader)
    reader.encode(TEXTS, adapter_ids=NAMES, batch_size=2, show_progress_bar=True)
    assert "Batches: 100%" in capsys.readouterr().err
    calls = []
    reader.transformers_model.embeddings.register_forward_hook(lambda *_: calls.append(1))
    reader.encode(TEXTS, adapter_ids=NAMES, batch_size=2)
    assert len(calls) == 5


def test_features_take_ids(reader):
    expected = one_by_one(reader, "encode", TEXTS)
    mb = peft_multibatch.enable(reader)
    features = reader.preprocess(TEXTS)
    with torch.no_grad():
        assert_close(reader(features | {"adapter_ids": NAMES})["sentence_embedding"], expected)
        assert_close(reader(dict(features), adapter_ids=NAMES)["sentence_embedding"], expected)
        with mb.batch(NAMES):
            assert_close(reader(dict(features))["sentence_embedding"], expected)
    with pytest.raises(errors.AdapterIdsLengthError):
        reader(dict(features), adapter_ids=NAMES[1:])


def test_plain_calls_and_disable(reader):
    before = reader.encode(TEXTS)
    attributes = set(vars(reader))
    mb = peft_multibatch.enable(reader)
    assert np.array_equal(reader.encode(TEXTS), before)
    with pytest.raises(errors.UnknownAdapterError):
        reader.encode(TEXTS, adapter_ids=["d"] * len(TEXTS))
    with pytest.raises(TypeError):
        reader.encode(adapter_ids=NAMES)
    assert np.array_equal(reader.encode(TEXTS), before)
    peft_multibatch.disable(reader)
    assert set(vars(reader)) == attributes
    with pytest.raises(errors.NotEnabledError):
        mb.batch(NAMES).__enter__()
    with pytest.raises(ValueError, match="adapter_ids"):  # the library's own error
        reader.encode(TEXTS, adapter_ids=NAMES)
    assert np.array_equal(reader.encode(TEXTS), before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_plain(reader, duplicate):
    before = reader.encode(TEXTS)
    mb = peft_multibatch.enable(reader)
    other = duplicate(reader)
    assert np.array_equal(other.encode(TEXTS), before)
    with pytest.raises((ValueError, errors.NotEnabledError), match=r"does not use|a copy of an enabled model"):
        other.encode(TEXTS, adapter_ids=NAMES)
    expected = reader.encode(TEXTS, adapter_ids=NAMES)
    assert peft_multibatch.enable(other) is not mb
    assert np.array_equal(other.encode(TEXTS, adapter_ids=NAMES), expected)


def test_only_the_model_inside_is_enabled(reader):
    """Then its loops aren't followed, and a block's ids would reach the wrong texts."""
    mb = peft_multibatch.enable(reader.transformers_model)
    with mb.batch(NAMES), pytest.raises(errors.UnsupportedError, match="Pass the SentenceTransformer"):
        reader.encode(TEXTS)
    assert_close(
        torch.as_tensor(_in_block(mb, ["b"] * len(TEXTS), lambda: reader.encode(TEXTS))),
        torch.as_tensor(under(reader, "b", lambda: reader.encode(TEXTS))),
    )


def _in_block(mb, ids, call):
    with mb.batch(ids):
        return call()


def test_a_peft_model_inside(tmp_path):
    reader = library.SentenceTransformer(folder(tmp_path / "base"), device="cpu")
    model = get_peft_model(reader[0].model, lora(), adapter_name="a")
    for name in "bc":
        model.add_adapter(name, lora())
    reader[0].model = model.eval()
    expected = one_by_one(reader, "encode", TEXTS)
    peft_multibatch.enable(reader)
    assert_close(torch.as_tensor(reader.encode(TEXTS, adapter_ids=NAMES, batch_size=4)), expected)


def test_a_peft_model_around(tmp_path):
    reader = library.SentenceTransformer(folder(tmp_path / "base"), device="cpu")
    model = PeftModel(reader, lora(), adapter_name="a")
    for name in "bc":
        model.add_adapter(name, lora())
    model.eval()
    expected = one_by_one(reader, "encode", TEXTS)
    mb = peft_multibatch.enable(model)
    with mb.batch(NAMES):
        assert_close(torch.as_tensor(model.encode(TEXTS, batch_size=4)), expected)
    assert_close(torch.as_tensor(reader.encode(TEXTS, adapter_ids=NAMES, batch_size=4)), expected)
    mb.disable()
    assert peft_multibatch.enable(reader) is not mb
    assert_close(torch.as_tensor(reader.encode(TEXTS, adapter_ids=NAMES, batch_size=4)), expected)


@pytest.mark.parametrize("kind", ["SparseEncoder", "MultiVectorEncoder"])
def test_other_encoders(tmp_path, kind):
    head = "BertForMaskedLM" if kind == "SparseEncoder" else "BertModel"
    encoder = adapted(tmp_path, getattr(library, kind)(folder(tmp_path / "base", head), device="cpu"))
    alone = [under(encoder, name, lambda text=text: encoder.encode([text])[0]) for name, text in zip(NAMES, TEXTS)]
    mb = peft_multibatch.enable(encoder)
    with mb.batch(NAMES):
        blocked = encoder.encode(TEXTS, batch_size=4)
    for found in (blocked, encoder.encode(TEXTS, adapter_ids=NAMES, batch_size=4)):
        for mine, theirs in zip(found, alone):
            assert_close(mine.to_dense(), theirs.to_dense())


def test_threads_with_other_ids(reader):
    """Each thread uses its own ids, while a third has none."""
    choices = [NAMES, NAMES[::-1], None]
    peft_multibatch.enable(reader)
    expected = [reader.encode(TEXTS, adapter_ids=ids, batch_size=2) for ids in choices]
    found = [[] for _ in choices]

    def encode(index):
        for _ in range(5):
            found[index].append(reader.encode(TEXTS, adapter_ids=choices[index], batch_size=2))

    threads = [threading.Thread(target=encode, args=(index,)) for index in range(len(choices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for mine, right in zip(found, expected):
        assert len(mine) == 5
        for each in mine:
            assert_close(torch.as_tensor(each), torch.as_tensor(right))


def test_after_an_exception(reader):
    before = reader.encode(TEXTS)
    mb = peft_multibatch.enable(reader)
    layer = reader.transformers_model.encoder.layer[1]
    calls = iter([False, False, True])
    hook = layer.register_forward_hook(lambda *_: 1 / 0 if next(calls) else None)
    with mb.batch(NAMES), pytest.raises(ZeroDivisionError):
        reader.encode(TEXTS, batch_size=2)
    hook.remove()
    assert np.array_equal(reader.encode(TEXTS), before)


def test_what_is_refused(reader):
    mb = peft_multibatch.enable(reader)
    for options in ({"pool": {"processes": []}}, {"device": ["cpu", "cpu"]}):
        with pytest.raises(errors.UnsupportedError, match="a pool of processes"):
            reader.encode(TEXTS, adapter_ids=NAMES, **options)
        with mb.batch(NAMES), pytest.raises(errors.UnsupportedError, match="a pool of processes"):
            reader.encode(TEXTS, **options)
    for keyword in ("adapter_id", "adapters", "adaptor_ids", "lora_request", "adpater_ids"):
        with pytest.raises(
            errors.AdapterIdsTypeError, match=f"encode got the argument {keyword}, which nothing reads"
        ):
            reader.encode(TEXTS, **{keyword: NAMES})
        with pytest.raises(errors.AdapterIdsTypeError, match=f"forward got the argument {keyword}"):
            reader(reader.preprocess(TEXTS), **{keyword: NAMES})


def test_a_loop_that_cannot_be_followed(reader, monkeypatch):
    """It creates its own texts, or calls the model in another way."""
    peft_multibatch.enable(reader)
    with monkeypatch.context() as patch:
        patch.setattr(reader, "preprocess", type(reader).preprocess.__get__(reader))
        with pytest.raises(Exception):  # noqa: B017 - the tokenizer's own
            reader.encode(TEXTS, adapter_ids=NAMES)
    with monkeypatch.context() as patch:
        preprocess = type(reader).preprocess.__get__(reader)
        patch.setattr(reader, "preprocess", lambda inputs, **_: preprocess([text for (text,) in inputs]))
        with pytest.raises(errors.UnsupportedError, match="called the model 0 times for 9 inputs"):
            reader.encode(TEXTS, adapter_ids=NAMES)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # torch 2.11 warns
def test_compiled(reader):
    expected = reader.encode(TEXTS)
    peft_multibatch.enable(reader)
    reader.compile(backend="eager")
    with pytest.raises(errors.UnsupportedError, match="on a compiled SentenceTransformer"):
        reader.encode(TEXTS, adapter_ids=NAMES)
    assert_close(torch.as_tensor(reader.encode(TEXTS)), torch.as_tensor(expected))


def test_routes(reader, tmp_path):
    """The document's route has no adapters, so ids on it are refused."""
    from sentence_transformers.base.modules import Router, Transformer

    router = Router.for_query_document([reader[0]], [Transformer(folder(tmp_path / "other"))])
    both = library.SentenceTransformer(modules=[router, reader[1]], device="cpu")
    expected = one_by_one(both, "encode_query", TEXTS)
    peft_multibatch.enable(both)
    assert_close(torch.as_tensor(both.encode_query(TEXTS, adapter_ids=NAMES, batch_size=4)), expected)
    with pytest.raises(errors.UnsupportedError, match="a route without the enabled model"):
        both.encode_document(TEXTS, adapter_ids=NAMES)


def test_no_model_to_enable():
    static = library.sentence_transformer.modules.StaticEmbedding(tokenizer().backend_tokenizer, embedding_dim=8)
    with pytest.raises(errors.UnsupportedError, match="of 0 transformers models"):
        peft_multibatch.enable(library.SentenceTransformer(modules=[static], device="cpu"))


def test_packed_rows(reader, monkeypatch):
    """As flash attention reads them on a GPU."""
    peft_multibatch.enable(reader)
    real = type(reader).preprocess
    monkeypatch.setattr(type(reader), "preprocess", lambda *a, **k: real(*a, **k) | {"cu_seq_lens_q": torch.ones(2)})
    with pytest.raises(errors.UnsupportedError, match="packed into one row"):
        reader.encode(TEXTS, adapter_ids=NAMES)


def test_a_sample_has_the_length_of_what_it_holds():
    for value in ("w3 w4", ("w3", "w4 w5"), {"text": "w3 w4"}, np.zeros((3, 4)), torch.zeros(5), ["w1", "w2"]):
        length = library.SentenceTransformer._input_length
        assert length(followed.Sample(value, 0)) == length(value)
