"""Which versions of what this package reaches into were tested, and a word where others are installed."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The oldest and the newest release that all tests ran with; patch releases of the newest count as tested.
TESTED = {"peft": ("0.21.0", "0.21"), "transformers": ("5.17.0", "5.23"), "torch": ("2.11.0", "2.13")}


def check() -> None:
    """Log a warning for every installed version outside of what was tested."""
    for package, (oldest, newest) in TESTED.items():
        installed = Version(version(package))
        if installed < Version(oldest) or installed.release[:2] > Version(newest).release[:2]:
            logger.warning(
                f"peft_multibatch was tested with {package} {oldest} to {newest}, and {installed} is installed: "
                "results may be wrong where its internals changed. Install a version in between, or run the tests."
            )
