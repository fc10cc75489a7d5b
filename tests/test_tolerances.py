"""The tolerances catch an error of 1 % in every dtype, and NaN."""

from __future__ import annotations

import pytest
import torch
from tolerances import RELATIVE_ERROR, assert_close


@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
def test_one_percent_is_caught(dtype):
    expected = torch.randn(64, 32, dtype=torch.float64)
    assert_close(expected.to(dtype), expected)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close((expected * 1.01).to(dtype), expected)


def test_float32_is_not_tf32_on_a_gpu():
    backends = torch.backends
    for each in (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul):
        assert each.fp32_precision != "tf32"


def test_nan_is_caught():
    expected = torch.randn(4)
    actual = expected.clone()
    actual[2] = float("nan")
    with pytest.raises(AssertionError, match="relative error nan"):
        assert_close(actual, expected)
