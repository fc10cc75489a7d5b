"""`transformers.pipeline` inside a block of ids: one batch of the pipeline is one call of the model."""

from __future__ import annotations

import pytest
import transformers
from models import SIZES, alone, peft_model
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tolerances import assert_close
from torch.utils.data import DataLoader

import peft_multibatch
from peft_multibatch import errors


NAMES = ["three", "__base__", "eight", "four", "three", "eight"]
PROMPTS = ["w3 w5 w6", "w10 w11", "w20 w31 w2 w3", "w7", "w8 w9", "w4 w7 w9 w31 w31"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}


def tokenizer(side="left"):
    names = ["pad", "unknown", *(f"w{index}" for index in range(2, SIZES["vocab_size"]))]
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(names)}, unk_token="unknown"))
    words.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="pad", unk_token="unknown", padding_side=side
    )


@pytest.fixture
def model():
    return peft_model()


@pytest.fixture
def writer(model):
    return transformers.pipeline("text-generation", model=model.get_base_model(), tokenizer=tokenizer())


@pytest.fixture
def expected(model, writer):
    return [
        alone(model, name, lambda prompt=prompt: said(writer([prompt], **GREEDY)))[0]
        for name, prompt in zip(NAMES, PROMPTS)
    ]


def said(answers):
    return [answer["generated_text"] for found in answers for answer in found]


def test_text_generation(model, writer, expected):
    mb = peft_multibatch.enable(model)
    with mb.batch(NAMES):
        assert said(writer(PROMPTS, batch_size=6, **GREEDY)) == expected
        sequences = said(writer(PROMPTS, batch_size=6, num_beams=3, num_return_sequences=2, **GREEDY))
    assert said(writer(PROMPTS, batch_size=6, adapter_ids=NAMES, **GREEDY)) == expected
    mb.disable()
    beams = {"num_beams": 3, "num_return_sequences": 2}
    for row, (name, prompt) in enumerate(zip(NAMES, PROMPTS)):
        own = alone(model, name, lambda prompt=prompt: said(writer([prompt], **beams, **GREEDY)))
        assert sequences[2 * row : 2 * row + 2] == own


def test_a_pipeline_around_a_peft_model(model, expected):
    writer = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer())
    mb = peft_multibatch.enable(model)
    with mb.batch(NAMES):
        assert said(writer(PROMPTS, batch_size=6, **GREEDY)) == expected


@pytest.mark.parametrize("size", [1, 2, 4])
def test_batches_that_are_smaller_than_the_block(model, writer, size):
    """The default `batch_size` is 1."""
    mb = peft_multibatch.enable(model)
    message = f"6 entries for a batch of {size} samples"
    with mb.batch(NAMES), pytest.raises(errors.AdapterIdsLengthError, match=message):
        writer(PROMPTS, batch_size=size, **GREEDY)
    with mb.batch(NAMES[:4]), pytest.raises(errors.AdapterIdsLengthError, match="4 entries for a batch of 2 samples"):
        writer(PROMPTS, batch_size=4, **GREEDY)  # the last batch is smaller


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_a_column_of_names(model, writer, expected, kind):
    requests = [{"prompt": prompt, "adapter": name} for prompt, name in zip(PROMPTS, NAMES)]
    if kind == "datasets":
        requests = pytest.importorskip("datasets").Dataset.from_list(requests)
    mb = peft_multibatch.enable(model)
    answers = []
    for batch in DataLoader(requests, batch_size=4, collate_fn=list):
        with mb.batch([request["adapter"] for request in batch]):
            answers += said(writer([request["prompt"] for request in batch], batch_size=len(batch), **GREEDY))
    assert answers == expected


def test_feature_extraction(model):
    reader = transformers.pipeline("feature-extraction", model=model.get_base_model().model, tokenizer=tokenizer())
    prompts = ["w3 w5 w6", "w10 w11 w4", "w20 w31 w2", "w7 w7 w7", "w8 w9 w2", "w4 w7 w9"]
    texts = zip(NAMES, prompts)
    expected = [alone(model, name, lambda text=text: reader(text, return_tensors=True)) for name, text in texts]
    mb = peft_multibatch.enable(model)
    with mb.batch(NAMES):
        found = reader(prompts, batch_size=6, return_tensors=True)
    for mine, theirs in zip(found, expected):
        assert_close(mine, theirs)


def test_text_classification():
    """Each adapter has its own head."""
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=160, num_labels=3
    )
    lora = LoraConfig(r=4, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS, init_lora_weights=False)
    model = get_peft_model(transformers.BertForSequenceClassification(config), lora, "three").eval()
    for name in ("eight", "four"):
        model.add_adapter(name, lora)
    for key, parameter in model.named_parameters():
        if "modules_to_save" in key:
            parameter.data.normal_()
    judge = transformers.pipeline("text-classification", model=model.get_base_model(), tokenizer=tokenizer("right"))
    expected = [alone(model, name, lambda text=text: judge(text, top_k=None)) for name, text in zip(NAMES, PROMPTS)]
    mb = peft_multibatch.enable(model)
    with mb.batch(NAMES):
        found = judge(PROMPTS, batch_size=6, top_k=None)
    assert len({label["label"] for (label, *_) in expected}) > 1
    for mine, theirs in zip(found, expected):
        assert [label["label"] for label in mine] == [label["label"] for label in theirs]
        assert [label["score"] for label in mine] == pytest.approx([label["score"] for label in theirs], rel=1e-4)
