"""``peft-multibatch inspect``: show the contents of adapters, and whether they fit a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peft_multibatch.errors import MultibatchError


if TYPE_CHECKING:
    from peft_multibatch.adapters.store.contents import Contents


def inspect(
    adapters: Annotated[list[Path], typer.Argument(help="Folders that PEFT's save_pretrained wrote.")],
    model: Annotated[
        str | None,
        typer.Option(help="Model to check the adapters against: a folder, a name on the hub, or 'demo'."),
    ] = None,
    allow_download: Annotated[
        bool, typer.Option("--allow-download", help="Download the model's configuration from the hub.")
    ] = False,
) -> None:
    """Show the contents of adapters, and with --model whether they fit that model. Reads no weights.

    Exits with 1 if an adapter can't be read, or doesn't fit the model.
    """
    from rich.console import Console

    from peft_multibatch.adapters.store.contents import read_contents

    console = Console(soft_wrap=True, highlight=False, markup=False)
    fitting = None
    if model is not None:
        from peft_multibatch.commands.fitting import Fitting

        try:
            fitting = Fitting(model, allow_download)
        except (OSError, ValueError) as error:
            console.print(f"the model {model!r} can't be read: {error}")
            raise typer.Exit(2) from None
    is_good = True
    for folder in adapters:
        try:
            found = read_contents(folder.name or str(folder), folder)
        except MultibatchError as error:
            console.print(f"{folder}\n  can't be read: {error}\n")
            is_good = False
            continue
        lines = _lines(found)
        problem, refusal = fitting.check(found) if fitting is not None else ("", found.refusal)
        if fitting is not None:
            lines.append(("fits model", f"no: {problem}" if problem else "yes"))
        if not problem:
            lines.append(("store", f"no: {refusal}" if refusal else "yes"))
        is_good = is_good and not problem
        console.print("\n".join([str(folder), *(f"  {key:<11} {value}" for key, value in lines), ""]))
    if not is_good:
        raise typer.Exit(1)


def _lines(found: Contents) -> list[tuple[str, str]]:
    targets = found.targets if isinstance(found.targets, str) else ", ".join(found.targets)
    lines = [
        ("kind", found.kind),
        ("rank", ", ".join(map(str, found.ranks)) or "-"),
        ("alpha", "-" if found.alpha is None else f"{found.alpha:g}"),
        ("targets", targets or "-"),
        ("modules", f"{found.modules} in {found.layers} layers"),
        ("dtype", ", ".join(found.dtypes) or "-"),
        ("size", f"{found.parameters:,} parameters, {found.bytes / 1e6:.2f} MB"),
    ]
    lines += [("task", found.task)] if found.task else []
    return [*lines, *([("base model", found.base)] if found.base else [])]
