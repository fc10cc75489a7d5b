"""The table of tolerances, and the comparison that uses it.

The error of a tensor is ‖actual - expected‖ / ‖expected‖. Every entry is below 1 %, the size of an error that
`test_tolerances.py` proves to be caught in every dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


RELATIVE_ERROR = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 8e-3,
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare by relative error; NaN never passes. ``dtype`` is that of the computation, if it differs from the
    result's."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    allowed = RELATIVE_ERROR[dtype or actual.dtype]
    error = relative_error(actual, expected)
    assert error <= allowed, f"relative error {error:.2e} is more than {allowed:.0e}"
