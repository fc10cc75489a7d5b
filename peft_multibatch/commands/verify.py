"""``peft-multibatch verify``: compare a mixed batch of a model and its adapters with PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_multibatch.errors import MultibatchError


if TYPE_CHECKING:
    from rich.table import Table

    from peft_multibatch.report import Verification

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time there was",
    "Dear customer, thank you for",
    "SELECT name FROM users WHERE",
    "In physics, energy is",
    "Q: What is a prime number? A:",
)
"""Default prompts, used in rotation, each with a number before it so that no two are equal."""


def verify(
    model: Annotated[str, typer.Argument(help="Base model: a folder, a name on the hub, or 'demo'.")],
    adapters: Annotated[list[str], typer.Argument(help="Adapters' folders, or NAME=FOLDER.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt to use, in rotation with others; repeatable.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Maximum relative error; by default depends on the dtype.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device for the model.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (as in the files).")] = "auto",
    allow_download: Annotated[
        bool, typer.Option("--allow-download", help="Download the base model from the hub.")
    ] = False,
) -> None:
    """Run a batch with one sample per adapter and one for the base model, and compare each with PEFT.

    Exits with 1 if a sample differs, or nothing could be compared.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    try:
        named = _named(adapters)
        names, texts, found = _verify(model, named, prompt or [], tolerance, (device, dtype, None, allow_download))
    except (MultibatchError, OSError, ValueError) as error:
        console.print(f"verify can't run: {error}", soft_wrap=True)
        raise typer.Exit(2) from None
    console.print(_table(names, texts, found))
    console.print(str(found), soft_wrap=True)
    if not found:
        raise typer.Exit(1)


def _verify(
    base: str, adapters: dict[str, Path], prompts: list[str], tolerance: float | None, options: tuple[Any, ...]
) -> tuple[list[str], list[str], Verification]:
    from peft import PeftModel

    from peft_multibatch.api import enable
    from peft_multibatch.plan.ids import BASE_NAME
    from peft_multibatch.serve.cli import load_base

    loaded, tokenizer = load_base(base, *options)
    adapted: Any = None
    for name, folder in adapters.items():
        if adapted is None:
            adapted = PeftModel.from_pretrained(loaded, str(folder), adapter_name=name)
        else:
            adapted.load_adapter(str(folder), adapter_name=name)
    names = [*adapters, BASE_NAME]
    said = prompts or [f"{number}. {PROMPTS[number % len(PROMPTS)]}" for number in range(len(names))]
    texts = [said[number % len(said)] for number in range(len(names))]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    inputs = {key: encoded[key].to(loaded.device) for key in ("input_ids", "attention_mask")}
    return names, texts, enable(adapted.eval()).verify(names, tolerance, **inputs)


def _named(adapters: list[str]) -> dict[str, Path]:
    from peft_multibatch.plan.ids import BASE_NAME

    found: dict[str, Path] = {}
    for each in adapters:
        name, is_named, path = each.partition("=")
        folder = Path(path if is_named else each).resolve()
        name = name if is_named else folder.name
        if not name or name in found or name == BASE_NAME:
            raise ValueError(f"two adapters are called {name!r}: expected different names. Write NAME={folder}.")
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}: expected one that PEFT's save_pretrained wrote.")
        found[name] = folder
    return found


def _table(names: list[str], texts: list[str], found: Verification) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    wrong = {sample for output in found.outputs for sample in output.wrong}
    is_seen = any(output.is_seen for output in found.outputs)
    table = Table("sample", "adapter", "prompt", "= PEFT", box=box.SIMPLE)
    for sample, (name, text) in enumerate(zip(names, texts)):
        mark = Text("NO", "red") if sample in wrong else Text("yes", "green") if is_seen else Text("?", "yellow")
        table.add_row(str(sample), Text(name), Text(repr(text)[1:-1]), mark)
    return table
