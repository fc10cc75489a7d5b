"""Many LoRA adapters in one batch, on any model that PEFT can adapt.

mb = peft_multibatch.enable(model)
model.generate(**inputs, adapter_ids=[0, 0, 1])
"""

import importlib
from typing import TYPE_CHECKING, Any

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


if TYPE_CHECKING:
    from peft_multibatch.adapters.store.store import AdapterStore, Registered
    from peft_multibatch.api import Multibatch, disable, enable
    from peft_multibatch.continuous.manager import AdapterBatchingManager
    from peft_multibatch.plan.ids import AdapterId, AdapterIds
    from peft_multibatch.plan.segment_buffer import SegmentBuffer
    from peft_multibatch.plan.segments import Segments
    from peft_multibatch.report import (
        AdapterReport,
        LayerCheck,
        LayerReport,
        OutputCheck,
        Report,
        StoreStats,
        Verification,
    )


__version__ = "0.2.0"

__all__ = [
    "AdapterBatchingManager",
    "AdapterFileError",
    "AdapterId",
    "AdapterIds",
    "AdapterIdsError",
    "AdapterIdsLengthError",
    "AdapterIdsTypeError",
    "AdapterMismatchError",
    "AdapterReport",
    "AdapterStore",
    "AdapterUnsupportedError",
    "BackendUnavailableError",
    "LayerCheck",
    "LayerReport",
    "MergedAdaptersError",
    "ModelStateError",
    "Multibatch",
    "MultibatchError",
    "NoAdaptersError",
    "NotEnabledError",
    "OutputCheck",
    "Registered",
    "Report",
    "RowMappingError",
    "SegmentBuffer",
    "Segments",
    "StoreFullError",
    "StoreStats",
    "UnknownAdapterError",
    "UnsupportedError",
    "Verification",
    "disable",
    "enable",
]

# Names that are imported when they are first used, so that the command line can print its help without torch.
_LAZY = {
    "AdapterBatchingManager": "continuous.manager",
    "AdapterId": "plan.ids",
    "AdapterIds": "plan.ids",
    "AdapterReport": "report",
    "AdapterStore": "adapters.store.store",
    "LayerCheck": "report",
    "LayerReport": "report",
    "Multibatch": "api",
    "OutputCheck": "report",
    "Registered": "adapters.store.store",
    "Report": "report",
    "SegmentBuffer": "plan.segment_buffer",
    "Segments": "plan.segments",
    "StoreStats": "report",
    "Verification": "report",
    "disable": "api",
    "enable": "api",
}


if not TYPE_CHECKING:  # for checkers a module with this function would have every name

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
