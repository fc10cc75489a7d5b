"""The ``peft-multibatch`` command and its subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from peft_multibatch import __version__
from peft_multibatch.commands.demo import demo
from peft_multibatch.commands.inspect import inspect
from peft_multibatch.commands.verify import verify
from peft_multibatch.serve.cli import serve


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Run many LoRA adapters in one batch.",
)
for command in (demo, verify, inspect, serve):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)
