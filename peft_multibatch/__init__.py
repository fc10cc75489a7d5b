"""Many LoRA adapters in one batch, on any model that PEFT can adapt.

mb = peft_multibatch.enable(model)
model.generate(**inputs, adapter_ids=[0, 0, 1])
"""

from peft_multibatch.adapters.store.store import AdapterStore
from peft_multibatch.api import Multibatch, disable, enable
from peft_multibatch.errors import (
    AdapterFileError,
    AdapterIdsError,
    AdapterIdsLengthError,
    AdapterIdsTypeError,
    AdapterMismatchError,
    AdapterUnsupportedError,
    BackendUnavailableError,
    MergedAdaptersError,
    ModelStateError,
    MultibatchError,
    NoAdaptersError,
    NotEnabledError,
    RowMappingError,
    StoreFullError,
    UnknownAdapterError,
    UnsupportedError,
)
from peft_multibatch.plan.segments import SegmentBuffer, Segments
from peft_multibatch.report import LayerReport, Report


__version__ = "0.1.0"

__all__ = [
    "AdapterFileError",
    "AdapterIdsError",
    "AdapterIdsLengthError",
    "AdapterIdsTypeError",
    "AdapterMismatchError",
    "AdapterStore",
    "AdapterUnsupportedError",
    "BackendUnavailableError",
    "LayerReport",
    "MergedAdaptersError",
    "ModelStateError",
    "Multibatch",
    "MultibatchError",
    "NoAdaptersError",
    "NotEnabledError",
    "Report",
    "RowMappingError",
    "SegmentBuffer",
    "Segments",
    "StoreFullError",
    "UnknownAdapterError",
    "UnsupportedError",
    "disable",
    "enable",
]
