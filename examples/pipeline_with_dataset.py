"""Run a pipeline over a dataset with a column for the adapter of each prompt.

    python examples/pipeline_with_dataset.py

A small Llama with random weights and a tokenizer of 200 words stand for yours, and a list of dictionaries stands for a
`datasets.Dataset` with the same columns. The last batch is shorter than the others.
"""

import torch
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

import peft_multibatch


torch.manual_seed(0)
words = {word: index for index, word in enumerate(["pad", "unknown", *(f"word{number}" for number in range(198))])}
words_only = Tokenizer(WordLevel(words, unk_token="unknown"))
words_only.pre_tokenizer = Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words_only, pad_token="pad", unk_token="unknown", padding_side="left"
)
config = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=200,
    pad_token_id=0, eos_token_id=None,
)  # fmt: skip
lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=TaskType.CAUSAL_LM, init_lora_weights=False)
model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name="sql")
model.add_adapter("poet", lora)
model.eval()

requests = [
    {"prompt": "word3 word14 word15", "adapter": "sql"},
    {"prompt": "word92 word6", "adapter": "poet"},
    {"prompt": "word53 word58 word9 word79", "adapter": "__base__"},
    {"prompt": "word32", "adapter": "poet"},
    {"prompt": "word38 word46 word26", "adapter": "sql"},
]
options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
generator = pipeline("text-generation", model=model.get_base_model(), tokenizer=tokenizer)

mb = peft_multibatch.enable(model)
answers = []
for batch in DataLoader(requests, batch_size=2, collate_fn=list):
    with mb.batch([request["adapter"] for request in batch]):
        # a batch size equal to the number of ids makes the pipeline call the model once, with all samples
        found = generator([request["prompt"] for request in batch], batch_size=len(batch), **options)
    answers += [answer[0]["generated_text"] for answer in found]
mb.disable()

for request, answer in zip(requests, answers):
    if request["adapter"] == "__base__":
        with model.disable_adapter():
            alone = generator(request["prompt"], **options)[0]["generated_text"]
    else:
        model.set_adapter(request["adapter"])
        alone = generator(request["prompt"], **options)[0]["generated_text"]
    assert alone == answer
    print(f"{request['prompt']!r}, adapter {request['adapter']}: {answer!r} (matches PEFT)")
