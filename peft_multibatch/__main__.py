"""The command line: ``peft-multibatch``, also as ``python -m peft_multibatch``."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Entry point of the command line."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"the command line needs {' and '.join(missing)}: install them with pip install 'peft-multibatch[demo]'"
        )
    from peft_multibatch.commands.app import app

    app()


if __name__ == "__main__":
    main()
