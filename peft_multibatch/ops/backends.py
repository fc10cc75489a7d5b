"""Backend selection."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import Literal

import torch

from peft_multibatch.errors import BackendUnavailableError


Backend = Literal["auto", "triton", "torch"]
"""Values of ``backend``."""


def choose_backend(backend: Backend) -> tuple[str, str, ModuleType | None]:
    """The backend, the reason for choosing it, and its module with kernels, or None.

    Raises:
        BackendUnavailableError: the backend is unknown, or not available here.
    """
    if backend not in ("auto", "triton", "torch"):
        raise BackendUnavailableError(f"backend {backend!r} is unknown: expected 'auto', 'triton' or 'torch'.")
    if backend == "torch":
        return "torch", "requested", None
    missing = None
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        missing = "torch finds no CUDA device"
    elif importlib.util.find_spec("triton") is None:
        missing = "the package triton is not installed"
    if missing is None:
        kernels = importlib.import_module("peft_multibatch.ops.triton_backend")
        return "triton", "requested" if backend == "triton" else "a CUDA device and triton are available", kernels
    if backend == "triton":
        raise BackendUnavailableError(
            f"backend 'triton' is not available, because {missing}: expected a CUDA device and triton. Pass "
            "backend='auto' or 'torch'."
        )
    return "torch", missing, None
