"""A server over HTTP in this process, with a tiny random model or the demo's, and OpenAI's client."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from pathlib import Path
from typing import Any

import torch
import uvicorn
from openai import OpenAI
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peft_multibatch.serve.app import build_app
from peft_multibatch.serve.core import Core
from peft_multibatch.serve.engine import Engine
from peft_multibatch.serve.process import CoreProcess
from peft_multibatch.serve.server import configuration
from peft_multibatch.serve.settings import Settings


SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 512,
}


def tiny_model(tokenizer: Any) -> LlamaForCausalLM:
    """Build a random model with the tokenizer's vocabulary that rarely ends by itself."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
        model.lm_head.weight[tokenizer.eos_token_id] *= 1.5  # makes it end occasionally
    return model


class Served:
    """A running server.

    Attributes:
        url: its URL.
        engine: its engine.
        records: records of the finished requests.
    """

    def __init__(self, core: Core | CoreProcess, settings: Settings) -> None:
        self.engine = Engine(core)
        self.engine.start()
        self.records: list = []
        self.settings = settings
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        app = build_app(self.engine, [self.records.append])
        self.server = uvicorn.Server(configuration(app, settings.grace, "127.0.0.1", port))
        self.loop: Any = None
        self._clients: list[OpenAI] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def _run(self) -> None:
        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            await self.server.serve()

        asyncio.run(serve())

    def client(self, key: str = "none", **options: Any) -> OpenAI:
        """Return a client that doesn't retry."""
        options = {"max_retries": 0, "timeout": 60} | options
        self._clients.append(OpenAI(base_url=f"{self.url}/v1", api_key=key, **options))
        return self._clients[-1]

    def stop(self) -> None:
        """Stop the server."""
        for client in self._clients:
            client.close()
        self.server.should_exit = True
        self._thread.join()


@contextlib.contextmanager
def serving(model: Any, tokenizer: Any = None, folder: Path | None = None, **options: Any):
    """Run a server inside a block; the model runs in a process of its own if it is a function that loads it."""
    limits = {"max_cache_tokens": 2048, "max_batch_tokens": 64, "max_batch": 16} | options
    settings = Settings(adapters_dir=folder, **limits)
    served = Served(CoreProcess(model, settings) if tokenizer is None else Core(model, tokenizer, settings), settings)
    try:
        yield served
    finally:
        served.stop()


def save_tokenizer(folder: Path) -> Any:
    """Save the demo's tokenizer."""
    from peft_multibatch.demo.model import load_model

    load_model()[1].save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def save_adapters(folder: Path, tokenizer: Any, names: tuple[str, ...] = ("red", "green", "blue")) -> Path:
    """Save different adapters of the tiny model with PEFT."""
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny_model(tokenizer), config)
        torch.manual_seed(100 + seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.3)
        model.save_pretrained(str(folder / name), save_embedding_layers=False)
    return folder


def chat_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a chat with one message."""
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def tokens_alone(model: Any, prompt: list[int], count: int) -> list[int]:
    """Generate greedily with a model alone, including the end token."""
    inputs = torch.tensor([prompt])
    found = model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return found[0, len(prompt) :].tolist()


def text_alone(model: Any, tokenizer: Any, prompt: list[int], count: int) -> str:
    """The same as text."""
    return tokenizer.decode(tokens_alone(model, prompt, count), skip_special_tokens=True)
