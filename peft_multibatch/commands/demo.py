"""``peft-multibatch demo``: its options and its output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from peft_multibatch.errors import DemoModelMissing


if TYPE_CHECKING:
    from peft_multibatch.demo.run import Outcome


def demo(
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate per prompt.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, each of which times every method once.")] = 3,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto uses a GPU if there is one.")] = "auto",
) -> None:
    """Generate a batch with several adapters, compare every row with PEFT, and time it."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from peft_multibatch.demo.run import Demo

    console = Console()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("loading", total=None)

            def report(step: str, done: int, total: int) -> None:
                progress.update(task, description=step, completed=done, total=total)

            outcome = Demo(device, report).run(new_tokens, repeats)
    except DemoModelMissing as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None
    console.print(_rows(outcome))
    console.print(_times(outcome))
    wrong = [row.prompt for row in outcome.rows if not row.equal]
    if wrong:
        console.print(f"[red]{len(wrong)} rows differ from PEFT, one adapter at a time: {wrong}[/red]")
        raise typer.Exit(1)
    console.print(f"All {len(outcome.rows)} rows match what PEFT generates, one adapter at a time.")


def _rows(outcome: Outcome) -> Table:
    table = Table(title="One batch, one call of generate", box=box.SIMPLE, show_lines=True, title_justify="left")
    table.add_column("prompt", style="bold", ratio=2)
    table.add_column("adapter", style="cyan", no_wrap=True)
    table.add_column("continuation", ratio=4)
    table.add_column("= PEFT", justify="center")
    for row in outcome.rows:
        mark = "[green]yes[/green]" if row.equal else "[red]NO[/red]"
        table.add_row(repr(row.prompt)[1:-1], row.adapter, " ".join(row.continuation.split()), mark)
    return table


def _times(outcome: Outcome) -> Table:
    title = f"Time of the whole batch, {outcome.num_tokens} new tokens per row, {outcome.device}"
    rounds = "1 round" if outcome.rounds == 1 else f"medians of {outcome.rounds} rounds"
    table = Table("", "seconds", "× base model", title=f"{title}, {rounds}", box=box.SIMPLE, title_justify="left")
    for name, seconds in outcome.seconds.items():
        table.add_row(name, f"{seconds:.2f}", f"{outcome.ratios[name]:.2f}")
    return table
