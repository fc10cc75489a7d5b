"""Serve a stream of requests for thousands of adapters in files, with a few of them in memory.

    python examples/thousands_of_adapters.py --adapters 2000 --requests 200 --new-tokens 16

It uses SmolLM2-135M and adapters with random weights of rank 2 on q_proj and v_proj (0.5 MB in memory), which it first
writes to a temporary folder. Requests arrive at random times, the adapters' popularity follows Zipf's law, and all
requests run in continuous batching. Meanwhile a table shows how many found their adapter in memory, and how long they
waited for their first token; if the output isn't a terminal, a line is printed from time to time. At the end, three
answers are compared with PEFT.
"""

import json
import random
import shutil
import statistics
import tempfile
import threading
import time
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

import torch
import typer
from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.live import Live
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

import peft_multibatch
from peft_multibatch.demo.model import load_model


BEGINNINGS = ("The night is", "LOVE, n.", "And it came to pass", "Water boils at", "My lord,", "PEACE, n.")
RANK, TARGETS = 2, ("q_proj", "v_proj")


def write_adapters(model: torch.nn.Module, folder: Path, count: int, console: Console) -> None:
    """Write the files that PEFT's `save_pretrained` would write, without building a PEFT model for each adapter."""
    layers = {name: module for name, module in model.named_modules() if name.endswith(TARGETS)}
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    text = json.dumps(
        {key: list(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    )
    for number in track(range(count), description="writing adapters", console=console):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, layer in layers.items():
            a = torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5
            b = torch.randn(layer.out_features, RANK, generator=generator) * 0.05
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.bfloat16()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.bfloat16()
        path = folder / f"customer-{number}"
        path.mkdir()
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(text)


class Watch:
    """Statistics so far."""

    def __init__(self, store: peft_multibatch.AdapterStore, total: int) -> None:
        self.store, self.total = store, total
        self.begin = time.perf_counter()
        self.waits: list[float] = []  # times to the first token, in seconds
        self.tokens = 0

    def numbers(self) -> dict[str, str]:
        stats = self.store.stats()
        waits, seconds = sorted(self.waits) or [0.0], time.perf_counter() - self.begin
        recent = self.waits[-50:] or [0.0]
        return {
            "requests": f"{len(self.waits)} of {self.total}",
            "hit rate": f"{stats.hits / max(stats.hits + stats.misses, 1):.0%}",
            "loads, evictions": f"{stats.loads}, {stats.evictions}",
            "in memory": f"{(stats.device_bytes or stats.host_bytes) / 1e6:.1f} MB",
            "first token, median": f"{statistics.median(waits):.2f} s (last 50: {statistics.median(recent):.2f} s)",
            "first token, 95 %": f"{waits[int(0.95 * (len(waits) - 1))]:.2f} s",
            "new tokens per second": f"{self.tokens / seconds:.1f}",
        }

    def __rich__(self) -> Table:
        table = Table(title=f"{len(self.store)} adapters registered", show_header=False, min_width=50)
        for what, number in self.numbers().items():
            table.add_row(what, number)
        return table

    def line(self) -> str:
        return "; ".join(f"{what} {number}" for what, number in self.numbers().items())


def main(
    adapters: int = 2000,
    requests: int = 200,
    per_second: float = 20,
    new_tokens: int = 16,
    room: str = "50MB",
    seed: int = 0,
) -> None:
    """Run the example. ROOM limits adapter memory on the model's device; a GPU run also uses 500 MB of host memory."""
    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(device=device)
    folder = Path(tempfile.mkdtemp())
    try:
        write_adapters(model, folder, adapters, console)
        serve(model, tokenizer, folder, requests, per_second, new_tokens, room, random.Random(seed), console)
    finally:
        shutil.rmtree(folder)


def serve(model, tokenizer, folder, requests, per_second, new_tokens, room, chance, console) -> None:
    mb = peft_multibatch.enable(model)
    host = "500MB" if model.device.type == "cuda" else room
    store = mb.adapter_store(max_host_memory=host, max_device_memory=room, roots=[folder])
    begin = time.perf_counter()
    names = store.register_folder(folder).names
    console.print(f"{len(names)} adapters registered in {time.perf_counter() - begin:.2f} s")

    chance.shuffle(names)
    weights = list(accumulate(1 / rank for rank in range(1, len(names) + 1)))
    wanted = chance.choices(names, cum_weights=weights, k=requests)
    texts = [chance.choice(BEGINNINGS) for _ in wanted]

    def feed() -> None:
        for row, (text, name) in enumerate(zip(texts, wanted)):
            time.sleep(chance.expovariate(per_second))
            prompt = tokenizer(text).input_ids
            manager.add_request(prompt, f"request {row}", new_tokens, adapter_id=name, record_timestamps=True)

    options = {
        "generation_config": GenerationConfig(do_sample=False, eos_token_id=tokenizer.eos_token_id),
        "continuous_batching_config": ContinuousBatchingConfig(
            num_blocks=64, max_batch_tokens=256, max_requests_per_batch=16
        ),
    }
    outputs = {}
    watch = Watch(store, requests)
    is_live = console.is_terminal
    with mb.continuous_batching(**options) as manager:
        feeding = threading.Thread(target=feed)
        feeding.start()
        with Live(watch, console=console, refresh_per_second=4) if is_live else nullcontext():
            while len(outputs) < requests:
                output = manager.get_result(timeout=1)
                if output is None or not output.is_finished():
                    continue
                if output.error:
                    raise SystemExit(output.error)
                outputs[output.request_id] = output
                watch.waits.append(output.timestamps[0] - output.created_time)
                watch.tokens += len(output.generated_tokens)
                if not is_live and (len(outputs) % max(requests // 5, 1) == 0 or len(outputs) == requests):
                    console.print(watch.line(), soft_wrap=True)
        feeding.join()
    mb.disable()

    for name in list(dict.fromkeys(wanted))[:3]:
        row = wanted.index(name)
        inputs = tokenizer(texts[row], return_tensors="pt").to(model.device)
        peft_model = PeftModel.from_pretrained(model, str(folder / name)).eval()
        alone = peft_model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        peft_model.unload()
        tokens = outputs[f"request {row}"].generated_tokens
        assert alone[0, inputs["input_ids"].shape[1] :].tolist() == tokens
        console.print(f"{texts[row]!r}, {name}: {tokenizer.decode(tokens)!r} (matches PEFT)", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
