"""PEFT's tests that are expected to fail, because a refused call runs, or has another error message.

Each must fail in the way listed here. A test that passes, or that fails in another way, such as by a wrong row,
fails the run.
"""

from __future__ import annotations

import pytest

from peft_multibatch import MultibatchError


# The batch that should be refused ran. If the test compares rows, it did so before, and they were right.
LIFTED = pytest.RaisesExc(pytest.fail.Exception, match="DID NOT RAISE")

# It was refused with the exception type that the test expects, but with our own message.
REWORDED = pytest.RaisesExc(AssertionError, check=lambda error: isinstance(error.__context__, MultibatchError))

CUSTOM = "test_custom_models.py::TestMixedAdapterBatches::test_mixed_adapter_batches"
PARAMETERS = "test_target_parameters.py::TestDecoderModelsTargetParameters::test"

# part of a test's id: (how it fails, why)
DEVIATIONS = {
    f"{CUSTOM}_training_mode_raises": (LIFTED, "mixed batches run in training mode"),
    f"{CUSTOM}_lora_with_dora_raises": (LIFTED, "DoRA runs"),
    f"{PARAMETERS}_mixed_adapter_batches": (LIFTED, "experts as parameters run"),
    f"{PARAMETERS}_generate_with_mixed_adapter_batches": (LIFTED, "experts as parameters run"),
    f"{CUSTOM}_length_mismatch_raises": (REWORDED, "AdapterIdsLengthError"),
    f"{CUSTOM}_merged_raises": (REWORDED, "MergedAdaptersError"),
    f"{CUSTOM}_lora_wrong_adapter_name_raises": (REWORDED, "UnknownAdapterError"),
    f"{CUSTOM}_unsupported_layer_raises": (REWORDED, "a GRU in modules_to_save, which returns a tuple"),
    f"{CUSTOM}_mha_raises": (REWORDED, "attention over the samples of the batch: MultiheadAttention without a batch"),
}
