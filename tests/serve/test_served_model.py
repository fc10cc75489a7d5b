"""The server with the demo's model and adapters."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from peft import PeftModel
from serving import chat_ids, serving, text_alone

from peft_multibatch.demo.model import ADAPTERS_DIR, gguf_path, load_model
from peft_multibatch.errors import DemoModelMissing


PROMPTS = ("HAMLET.\nThe night is long, and", "PROGRAMMER, n.", "And it came to pass in those days, that")
NAMES = ("base", "shakespeare", "devil", "kjv")


@pytest.fixture(scope="module")
def real():
    try:
        gguf_path()
    except DemoModelMissing as missing:
        pytest.skip(str(missing))
    return load_model()


def run_the_page(url):
    """Run the example of docs/serving.md as printed."""
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    names: dict = {}
    for snippet in re.findall(r"```py\n(.*?)```", page, re.DOTALL):
        snippet = snippet.replace("http://127.0.0.1:8000", url).replace("HuggingFaceTB/SmolLM2-135M-Instruct", "base")
        exec(compile(snippet.replace("stream=True", "stream=True, max_tokens=4"), "docs/serving.md", "exec"), names)
    names["client"].close()
    answer = names["answer"].choices[0]
    assert answer.finish_reason == "stop"
    assert json.loads(answer.message.content)["colour"] in ("red", "green")


@pytest.mark.xdist_group("real model")
def test_64_requests_mixed_and_streamed_are_pefts(real):
    model, tokenizer = real
    expected = {}
    for name in NAMES:
        alone = model if name == "base" else PeftModel.from_pretrained(model, str(ADAPTERS_DIR / name))
        for prompt in PROMPTS:
            expected["text", name, prompt] = text_alone(alone, tokenizer, tokenizer(prompt).input_ids, 12)
        expected["chat", name, PROMPTS[0]] = text_alone(alone, tokenizer, chat_ids(tokenizer, PROMPTS[0]), 12)
        if name != "base":
            alone.unload()
    assert len({expected["text", name, PROMPTS[0]] for name in NAMES}) == 4
    with serving(model, tokenizer, ADAPTERS_DIR, max_batch=64, max_batch_tokens=256, max_cache_tokens=4096) as served:
        client = served.client(timeout=300)

        def run(case):
            index, (kind, name, prompt) = case
            options = {"model": name, "max_tokens": 12, "temperature": 0, "stream": bool(index % 2)}
            if kind == "text":
                answer = client.completions.create(prompt=prompt, **options)
                return "".join(c.choices[0].text for c in answer) if index % 2 else answer.choices[0].text
            answer = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **options)
            if index % 2:
                return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            return answer.choices[0].message.content

        cases = [key for key in expected for _ in range(4)]
        with ThreadPoolExecutor(64) as threads:
            found = list(threads.map(run, enumerate(cases)))
        run_the_page(served.url)
    assert len(cases) == 64
    assert found == [expected[case] for case in cases]
