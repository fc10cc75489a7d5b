"""Run the demo: generate, compare with PEFT and measure times. ``commands/demo.py`` shows the results."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers.utils import logging

import peft_multibatch
from peft_multibatch.demo.model import ADAPTERS_DIR, load_model
from peft_multibatch.plan.ids import BASE_NAME


ADAPTERS = ("shakespeare", "devil", "kjv")

# (adapter, prompt); neighbours have different adapters, so that the batch is as mixed as possible
PROMPTS = (
    ("shakespeare", "HAMLET.\nThe night is long, and"),
    ("devil", "PROGRAMMER, n."),
    ("kjv", "And it came to pass in those days, that"),
    (BASE_NAME, "The capital of France is"),
    ("shakespeare", "JULIET.\nO gentle night,"),
    ("devil", "LOVE, n."),
    ("kjv", "Blessed is the man that"),
    (BASE_NAME, "Water boils at"),
)


@dataclass(frozen=True)
class Row:
    """A sample of the batch: its prompt, its output, and whether PEFT generates the same."""

    prompt: str
    adapter: str
    continuation: str
    equal: bool


@dataclass(frozen=True)
class Outcome:
    """Rows and times of a run of the demo.

    Attributes:
        rows: one per sample.
        seconds: time of each method to generate the batch, by its name; median over rounds.
        ratios: time of each method relative to the base model; median of the ratios within rounds.
        rounds: number of rounds.
        num_tokens: number of new tokens per row.
        device: the device that it ran on.
    """

    rows: Sequence[Row]
    seconds: dict[str, float]
    ratios: dict[str, float]
    rounds: int
    num_tokens: int
    device: str


class Demo:
    """The demo's model with its three adapters.

    Args:
        device: the device to run on.
        report: called with the current step's name, the amount done and the total.
    """

    def __init__(self, device: str = "cpu", report: Callable[[str, int, int], None] = lambda *_: None) -> None:
        self.device = device
        self.report = report
        # its progress bars would overlap with PEFT's
        logging.disable_progress_bar()
        report("loading SmolLM2-135M-Instruct", 0, 1)
        model, self.tokenizer = load_model(device=device)
        self.model = load_adapters(model)
        encoded = self.tokenizer([prompt for _, prompt in PROMPTS], return_tensors="pt", padding=True)
        self.inputs = {key: encoded[key].to(device) for key in ("input_ids", "attention_mask")}
        self.names = [name for name, _ in PROMPTS]

    def run(self, new_tokens: int, repeats: int) -> Outcome:
        """Generate, compare with PEFT, one adapter at a time, and time every method.

        Methods alternate, so that changes in the machine's speed affect all of them.

        Args:
            new_tokens: number of tokens to generate per prompt.
            repeats: number of rounds, each of which times every method once, after a warmup round.
        """
        options = {"max_new_tokens": new_tokens, "do_sample": False}

        def base() -> Tensor:
            with self.model.disable_adapter():
                return self.model.generate(**self.inputs, **options)

        def mixed() -> Tensor:
            return self.model.generate(**self.inputs, **options, adapter_ids=self.names)

        def peft_mixed() -> Tensor:
            return self.model.generate(**self.inputs, **options, adapter_names=self.names)

        def one_at_a_time() -> Tensor:
            return self._one_at_a_time(options)

        # only our method runs on the enabled model
        ways = {
            "base model, no adapters": (base, False),
            "peft_multibatch, mixed batch": (mixed, True),
            "PEFT adapter_names, mixed batch": (peft_mixed, False),
            "PEFT, one adapter at a time": (one_at_a_time, False),
        }
        results: dict[str, Tensor] = {}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(repeats + 1):
            for index, (name, (way, enabled)) in enumerate(ways.items()):
                self.report(name, turn * len(ways) + index, (repeats + 1) * len(ways))
                if enabled:
                    peft_multibatch.enable(self.model)
                    self.model.generate(**self.inputs, max_new_tokens=2, do_sample=False, adapter_ids=self.names)
                result, elapsed = self._timed(way)
                peft_multibatch.disable(self.model)
                if turn == 0:
                    results[name] = result
                else:
                    times[name].append(elapsed)
        seconds = {name: statistics.median(each) for name, each in times.items()}
        ratios = {
            name: statistics.median(own / base for own, base in zip(each, times["base model, no adapters"]))
            for name, each in times.items()
        }
        ours, expected = results["peft_multibatch, mixed batch"], results["PEFT, one adapter at a time"]
        start = self.inputs["input_ids"].shape[1]
        rows = [
            Row(
                prompt,
                name,
                self.tokenizer.decode(ours[i, start:], skip_special_tokens=True),
                _equal(ours[i], expected[i]),
            )
            for i, (name, prompt) in enumerate(PROMPTS)
        ]
        return Outcome(rows, seconds, ratios, repeats, new_tokens, self.device)

    def _one_at_a_time(self, options: dict) -> Tensor:
        parts, order = [], []
        for name in dict.fromkeys(self.names):
            mine = [row for row, own in enumerate(self.names) if own == name]
            inputs = {key: value[mine] for key, value in self.inputs.items()}
            if name == BASE_NAME:
                with self.model.disable_adapter():
                    parts.append(self.model.generate(**inputs, **options))
            else:
                self.model.set_adapter(name)
                parts.append(self.model.generate(**inputs, **options))
            order += mine
        length = max(part.shape[1] for part in parts)
        pad = self.tokenizer.pad_token_id
        padded = torch.cat([torch.nn.functional.pad(part, (0, length - part.shape[1]), value=pad) for part in parts])
        return padded[torch.tensor(order).argsort()]

    def _timed(self, way: Callable[[], Tensor]) -> tuple[Tensor, float]:
        begin = time.perf_counter()
        result = way().cpu()
        return result, time.perf_counter() - begin


def load_adapters(model: torch.nn.Module, names: Sequence[str] = ADAPTERS) -> PeftModel:
    """Load the demo's adapters into its model.

    Args:
        model: what [`load_model`][peft_multibatch.demo.model.load_model] returned.
        names: any of ``"shakespeare"``, ``"devil"`` and ``"kjv"``.
    """
    adapted = PeftModel.from_pretrained(model, ADAPTERS_DIR / names[0], adapter_name=names[0])
    for name in names[1:]:
        adapted.load_adapter(ADAPTERS_DIR / name, adapter_name=name)
    return adapted.eval()


def _equal(ours: Tensor, expected: Tensor) -> bool:
    """Whether two rows have the same tokens, apart from padding."""
    length = min(len(ours), len(expected))
    rest = torch.cat([ours[length:], expected[length:]])
    return torch.equal(ours[:length], expected[:length]) and (len(rest) == 0 or len(rest.unique()) == 1)
