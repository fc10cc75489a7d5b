"""Everything that this package raises.

    MultibatchError
    ├── AdapterIdsError (ValueError)        what was passed as `adapter_ids` can't be used
    │   ├── AdapterIdsTypeError (TypeError)     not ids and not names, or misspelt
    │   ├── AdapterIdsLengthError               not one entry for every sample
    │   └── UnknownAdapterError                 no such id, no such name
    ├── ModelStateError (RuntimeError)      the model can't run a mixed batch as it stands now
    │   ├── NotEnabledError                     `enable` was not called on this very model
    │   ├── AdapterMismatchError                an adapter's weights don't fit the model; others run
    │   ├── AdapterFileError                    a stored adapter's files can't be read, or changed; others run
    │   ├── StoreFullError                      a batch's stored adapters find no room in time; others run
    │   ├── NoAdaptersError                     no adapter was added yet
    │   └── MergedAdaptersError (ValueError)    an adapter is merged into the base weights
    ├── UnsupportedError (TypeError)        this model, tuner or layer is not supported
    │   └── AdapterUnsupportedError             not in an adapter store; PEFT's load_adapter may do it
    ├── RowMappingError (ValueError)        a layer's rows can't be mapped to samples
    ├── BackendUnavailableError (RuntimeError)
    └── DemoModelMissing (ImportError)

Every message says what came, what was expected and what to do.
"""


class MultibatchError(Exception):
    """Base class of all errors of this package."""


class AdapterIdsError(MultibatchError, ValueError):
    """What was passed as ``adapter_ids`` can't be used."""


class AdapterIdsTypeError(AdapterIdsError, TypeError):
    """``adapter_ids`` is neither a sequence of ids, nor one of names, nor a tensor of integers; or it is misspelt."""


class AdapterIdsLengthError(AdapterIdsError):
    """``adapter_ids`` doesn't have one entry for every sample."""


class UnknownAdapterError(AdapterIdsError):
    """``adapter_ids`` names an adapter that the model doesn't have (any more)."""


class ModelStateError(MultibatchError, RuntimeError):
    """The model can't run a mixed batch as it stands now; the message says what to call first."""


class NotEnabledError(ModelStateError):
    """Ids were passed to a model on which ``enable`` was not called, such as a copy of an enabled model."""


class AdapterMismatchError(ModelStateError):
    """An adapter's weights don't fit the model or each other; batches that don't name it run."""


class AdapterFileError(ModelStateError):
    """A stored adapter's files are missing, damaged, outside of the store's roots, or not what was registered."""


class StoreFullError(ModelStateError):
    """The stored adapters of a batch found no room within the time limit, or never can."""


class NoAdaptersError(ModelStateError):
    """The model has no adapters."""


class MergedAdaptersError(ModelStateError, ValueError):
    """An adapter is merged into the base weights, so that no row could be without it."""


class UnsupportedError(MultibatchError, TypeError):
    """The model, tuner or layer is one that this package can't route samples through and be right."""


class AdapterUnsupportedError(UnsupportedError):
    """An adapter is of a kind that an adapter store doesn't take; PEFT's ``load_adapter`` may."""


class RowMappingError(MultibatchError, ValueError):
    """A layer received a number of rows that is no multiple of the number of samples."""


class BackendUnavailableError(MultibatchError, RuntimeError):
    """The backend that was asked for by name can't run here."""


class DemoModelMissing(MultibatchError, ImportError):
    """The packages that carry the demo's model are not installed."""
