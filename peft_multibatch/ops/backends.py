"""Which backend runs here."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import Literal

import torch

from peft_multibatch.errors import BackendUnavailableError


Backend = Literal["auto", "triton", "torch"]
"""What may be asked for as ``backend``."""


def choose_backend(backend: Backend) -> tuple[str, str, ModuleType | None]:
    """The backend, why it is this one, and the module of the kernels where it has any."""
    if backend not in ("auto", "triton", "torch"):
        raise BackendUnavailableError(f"backend is {backend!r}: expected 'auto', 'triton' or 'torch'.")
    if backend == "torch":
        return "torch", "asked for", None
    missing = None
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        missing = "torch finds no CUDA device"
    elif importlib.util.find_spec("triton") is None:
        missing = "the package triton is not installed"
    if missing is None:
        kernels = importlib.import_module("peft_multibatch.ops.triton_backend")
        return "triton", "asked for" if backend == "triton" else "there is a CUDA device and triton", kernels
    if backend == "triton":
        raise BackendUnavailableError(
            f"backend is 'triton', and {missing}: expected a CUDA device and triton. Pass backend='auto' or 'torch'."
        )
    return "torch", missing, None
