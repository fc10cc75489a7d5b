"""Serve a stream of requests, most of them for the same few adapters, with one model.

    python examples/continuous_batching.py --requests 64 --per-second 8 --new-tokens 32

It uses SmolLM2-135M and the demo's three adapters. Requests arrive at random times, the adapters' popularity follows
Zipf's law, and all requests run in transformers' continuous batching. At the end, three answers are compared with
PEFT.
"""

import random
import statistics
import threading
import time
from collections import Counter

import torch
import typer
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

import peft_multibatch
from peft_multibatch.demo.model import ADAPTERS_DIR, load_model


BEGINNINGS = ("The night is", "LOVE, n.", "And it came to pass", "Water boils at", "My lord,", "PEACE, n.")


def label(name: str | dict[str, float]) -> str:
    return name if isinstance(name, str) else " + ".join(f"{weight:g} {each}" for each, weight in name.items())


def main(requests: int = 18, per_second: float = 20, new_tokens: int = 8, seed: int = 0) -> None:
    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model()
    model = PeftModel.from_pretrained(model, ADAPTERS_DIR / "shakespeare", adapter_name="shakespeare")
    for name in ("devil", "kjv"):
        model.load_adapter(ADAPTERS_DIR / name, adapter_name=name)
    model.to(device).eval()
    mb = peft_multibatch.enable(model)

    chance = random.Random(seed)
    names = ["shakespeare", "devil", "kjv", "__base__", {"shakespeare": 0.5, "kjv": 0.5}]
    wanted = chance.choices(names, weights=[1 / rank for rank in range(1, len(names) + 1)], k=requests)
    texts = [chance.choice(BEGINNINGS) for _ in wanted]
    prompts = [tokenizer(text).input_ids for text in texts]
    ids: dict[str, int] = {}

    def feed() -> None:
        for index, (prompt, name) in enumerate(zip(prompts, wanted)):
            time.sleep(chance.expovariate(per_second))
            request = manager.add_request(prompt, adapter_id=name, max_new_tokens=new_tokens, record_timestamps=True)
            ids[request] = index

    options = {
        "generation_config": GenerationConfig(do_sample=False, eos_token_id=tokenizer.eos_token_id),
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256),
    }
    outputs = []
    with mb.continuous_batching(**options) as manager, Progress(console=console) as progress:
        feeding = threading.Thread(target=feed)
        begin = time.perf_counter()
        feeding.start()
        for _ in progress.track(range(requests), description="requests"):
            output = None
            while output is None or not output.is_finished():
                output = manager.get_result(timeout=1)
            if output.error:
                raise SystemExit(output.error)
            outputs.append(output)
        seconds = time.perf_counter() - begin
        feeding.join()
        served = dict(manager.served)
    mb.disable()

    waits = sorted(output.timestamps[0] - output.created_time for output in outputs)
    asked = Counter(label(name) for name in wanted)
    produced = sum(len(output.generated_tokens) for output in outputs)
    console.print(f"{produced / seconds:.1f} new tokens per second on {device}")
    console.print(f"first token after {statistics.median(waits):.2f} s (median), {waits[-1]:.2f} s (slowest)")
    table = Table("adapter", "requests", "tokens processed, including prompts")
    for name, number in asked.most_common():
        table.add_row(name, str(number), str(served[name]))
    console.print(table)

    plain = [output for output in outputs if isinstance(wanted[ids[output.request_id]], str)]
    for output in plain[:3]:
        index = ids[output.request_id]
        inputs = tokenizer(texts[index], return_tensors="pt").to(device)
        call = {**inputs, "max_new_tokens": new_tokens, "do_sample": False}
        if wanted[index] == "__base__":
            with model.disable_adapter():
                alone = model.generate(**call)
        else:
            model.set_adapter(wanted[index])
            alone = model.generate(**call)
        assert alone[0, inputs["input_ids"].shape[1] :].tolist() == output.generated_tokens
        answer = tokenizer.decode(output.generated_tokens)
        console.print(f"{texts[index]!r}, adapter {wanted[index]}: {answer!r} (matches PEFT)", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
