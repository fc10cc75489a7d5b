"""``python -m peft_multibatch demo`` and ``peft-multibatch demo``."""

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
    from peft_multibatch.demo.cli import app

    app()


if __name__ == "__main__":
    main()
