"""A soak test: callers add and cancel requests and name bad adapters, others change adapters, and `generate` runs too.

``MULTIBATCH_REQUESTS=2000`` sets the number of requests, on a GPU with CUDA graphs too. Every valid request gets
the tokens that it gets alone, every invalid one an error, and the loop survives. There is no limit on the total
time: the test fails only if the loop stops returning outputs.
"""

from __future__ import annotations

import os
import random
import threading
import time
import traceback

import pytest
import torch
from batching import DEVICE, generation, row_by_row, settings
from models import LLAMA_LIKE, base_model
from peft import LoraConfig, get_peft_model

import peft_multibatch


REQUESTS = int(os.environ.get("MULTIBATCH_REQUESTS", 60))
PATIENCE = 120  # seconds without any output
PACE = max(1, REQUESTS / 400)  # more requests per change and call in long runs
TOKENS = 6
SHARED = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
PLAIN = {f"plain {rank}": {"r": rank, "target_modules": LLAMA_LIKE[rank % 3 :: 2]} for rank in (1, 2, 4, 8, 16)}
KINDS = {
    "rslora": {"r": 4, "use_rslora": True, "target_modules": LLAMA_LIKE},
    "DoRA": {"r": 4, "use_dora": True, "target_modules": ["v_proj", "up_proj"]},
    "bias": {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
    "head": {"r": 4, "target_modules": ["lm_head", "v_proj"]},
    "copy": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "tokens": {"r": 4, "target_modules": ["k_proj"], "trainable_token_indices": [7, 8]},
}
BAD = ("NaN", "overflow", "missing")
OTHERS = {name: {"r": 4, "target_modules": LLAMA_LIKE} for name in ("swapped", "deleted", *BAD)}


def weights_of(model, name):
    return [module.weight for path, module in model.named_modules() if path.endswith(f"lora_B.{name}")]


def served_model(kinds):
    torch.manual_seed(0)
    model = base_model()
    for name, options in kinds.items():
        config = LoraConfig(**{"lora_alpha": 8} | options, **SHARED)
        if hasattr(model, "peft_config"):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_embedding_B", "modules_to_save.", "trainable_tokens_delta")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        weights_of(model, "NaN")[5][0, 0] = float("nan")
        for weight in weights_of(model, "overflow"):
            weight.fill_(1e30)
    model.eval().to(DEVICE)
    missing = weights_of(model, "missing")[2]
    for module in model.modules():
        if module._parameters.get("weight") is missing:
            module._parameters["weight"] = torch.nn.Parameter(missing.to("meta"), requires_grad=False)
    return model


class Soak:
    """A manager, the requests that it gets, and the expected results."""

    def __init__(self, model, mb, entries):
        chance = random.Random(0)
        self.model, self.mb = model, mb
        self.begun = [[7, 8, 9] * 6, [5] * 16, []]
        self.prompts = [
            chance.choice(self.begun) + [chance.randrange(2, 160) for _ in range(chance.randrange(1, 30))]
            for _ in range(12)
        ] + [[7]]
        self.pairs = [(prompt, entry) for entry in entries for prompt in chance.sample(range(len(self.prompts)), 3)]
        self.good = {pair: self._alone([pair]) for pair in self.pairs if pair[1] not in BAD}
        self.asked: dict[object, tuple[int, str]] = {}
        self.cancelled: set[object] = set()
        self.failures: list[str] = []
        self.is_over = threading.Event()
        self.generated = self.changed = self.deleted = 0
        self.swapped = weights_of(model, "swapped")

    def _alone(self, pairs):
        return row_by_row(self.model, [self.prompts[each] for each, _ in pairs], [entry for _, entry in pairs], TOKENS)

    def again(self, seconds):
        """Wait a while; returns whether to continue."""
        return not self.is_over.wait(seconds * PACE)

    def swap(self, manager):
        """Change the weights of one adapter and restore them."""
        kept = [weight.clone() for weight in self.swapped]
        while True:
            with manager.changing("swapped"):
                for weight, before in zip(self.swapped, kept):
                    weight.data.copy_(before * (-2 if self.changed % 2 == 0 else 1))
                self.changed += 1
            if not self.again(0.2):
                return

    def delete(self, manager):
        """Delete one adapter and add another one in its place."""
        config = self.model.peft_config["deleted"]
        while True:
            with manager.changing("deleted"):
                self.model.delete_adapter("deleted")
            with manager.changing():
                self.model.add_adapter("deleted", config)
                self.model.eval()
            self.deleted += 1
            if not self.again(0.3):
                return

    def generate(self, manager):
        """Run `generate` on another thread, with pauses in which steps run alone, and in CUDA graphs."""
        pairs = [pair for pair in self.good if pair[1] not in ("swapped", "deleted")]
        chance = random.Random(1)
        while True:
            pair = chance.choice(pairs)
            try:
                found = self._alone([pair])
            except ValueError as error:
                if "without a paged attention cache" not in str(error):  # the error of older versions of transformers
                    raise
                found = self.good[pair]
            if found != self.good[pair]:
                self.failures.append(f"generate gives other tokens for {pair}")
            self.generated += 1
            if not self.again(chance.random() * 0.1):
                return

    def add(self, manager, seed, number):
        """Run one caller."""
        chance = random.Random(seed)
        for index in range(number):
            pair = chance.choice(self.pairs)
            name = (seed, index) if chance.random() < 0.5 else f"{seed}/{index}"
            self.asked[name] = pair
            manager.add_request(self.prompts[pair[0]], name, adapter_id=pair[1])
            if chance.random() < 0.05:
                self.cancelled.add(name)
                manager.cancel_request(name)
            time.sleep(chance.random() * 0.02)

    def check(self, name, output):
        parent = next(
            each for each in (name, *self.asked) if name in (each, f"{each}__child#0") and each in self.asked
        )
        pair = self.asked[parent]
        if output.error and parent in self.cancelled and "was cancelled" in output.error:
            return
        if pair[1] in BAD:
            if not output.error:
                self.failures.append(f"{name} under {pair} has no error")
        elif pair[1] == "deleted":
            if not output.error and len(output.generated_tokens) != TOKENS:
                self.failures.append(f"{name} under {pair} has neither tokens nor an error")
        elif output.error or output.generated_tokens not in self.good[pair]:
            self.failures.append(f"{name} under {pair}: {output.error or output.generated_tokens}")

    def _run(self, target, *args):
        try:
            target(*args)
        except Exception:
            self.failures.append(traceback.format_exc())

    def _threads(self, manager):
        adding = [(self.add, manager, seed, REQUESTS // 4) for seed in range(4)]
        beside = [(each, manager) for each in (self.swap, self.delete, self.generate)]
        return [threading.Thread(target=self._run, args=each) for each in (*adding, *beside)]

    def run(self, config):
        options = {"num_return_sequences": 2, "do_sample": True, "top_k": 1, "max_new_tokens": TOKENS}
        found = {}
        with self.mb.continuous_batching(
            generation_config=generation(**options), continuous_batching_config=config
        ) as manager:
            threads, last = self._threads(manager), time.monotonic()
            try:
                for thread in threads:
                    thread.start()
                while len(found) < 2 * 4 * (REQUESTS // 4) and time.monotonic() < last + PATIENCE:
                    output = manager.get_result(timeout=1)
                    if output is not None and output.is_finished():
                        assert output.request_id not in found
                        found[output.request_id], last = output, time.monotonic()
                    if self.failures or not manager.is_running():
                        break
            finally:
                self.is_over.set()
                for thread in threads:
                    thread.join()
            assert not self.failures, self.failures[:5]
            assert manager.is_running()
            assert len(found) == 2 * 4 * (REQUESTS // 4)
        for name, output in found.items():
            self.check(name, output)
        assert not self.failures, self.failures[:5]
        assert self.generated and self.changed and self.deleted


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    "graphs",
    [
        pytest.param((False, False), id="eager"),
        pytest.param((False, True), id="async"),
        pytest.param((True, False), id="graphs", marks=pytest.mark.gpu),
        pytest.param((True, True), id="graphs async", marks=pytest.mark.gpu),
    ],
)
def test_everything_at_once(graphs, request):
    uses_graphs, is_asynchronous = graphs
    if is_asynchronous:
        request.getfixturevalue("asynchronous")
    kinds = PLAIN | ({} if uses_graphs else KINDS) | OTHERS
    model = served_model(kinds)
    mb = peft_multibatch.enable(model)
    soak = Soak(model, mb, [*kinds, "__base__"])
    for weight in soak.swapped:
        weight.data.mul_(-2)
    for pair in soak.good:
        if pair[1] == "swapped":
            soak.good[pair] += soak._alone([pair])
    for weight in soak.swapped:
        weight.data.div_(-2)
    config = settings(8, use_cuda_graph=uses_graphs, use_async_batching=is_asynchronous)
    soak.run(config)
    assert not uses_graphs or mb._router.graph.captures
    mb.disable()
