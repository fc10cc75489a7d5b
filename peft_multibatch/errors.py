"""The exceptions of this package.

    MultibatchError
    ├── AdapterIdsError (ValueError)        invalid `adapter_ids`
    │   ├── AdapterIdsTypeError (TypeError)     neither ids nor names, or a misspelt keyword
    │   ├── AdapterIdsLengthError               not one entry per sample
    │   └── UnknownAdapterError                 no adapter has this id or name
    ├── ModelStateError (RuntimeError)      the model can't run a mixed batch in its current state
    │   ├── NotEnabledError                     `enable` was not called on this model
    │   ├── AdapterMismatchError                an adapter's weights don't fit the model; others run
    │   ├── AdapterFileError                    a stored adapter's files can't be read, or changed; others run
    │   ├── StoreFullError                      a batch's stored adapters don't fit into memory; others run
    │   ├── NoAdaptersError                     the model has no adapters
    │   └── MergedAdaptersError (ValueError)    an adapter is merged into the base weights
    ├── UnsupportedError (TypeError)        the model, tuner or layer is not supported
    │   └── AdapterUnsupportedError             not supported by adapter stores; PEFT's load_adapter may work
    ├── RowMappingError (ValueError)        a layer's rows can't be mapped to samples
    ├── BackendUnavailableError (RuntimeError)
    └── DemoModelMissing (ImportError)

Every message says what came, what was expected and what to do.
"""


class MultibatchError(Exception):
    """Base class of all errors of this package."""


class AdapterIdsError(MultibatchError, ValueError):
    """``adapter_ids`` is invalid."""


class AdapterIdsTypeError(AdapterIdsError, TypeError):
    """``adapter_ids`` isn't a sequence of ids or names or an integer tensor, or the keyword is misspelt."""


class AdapterIdsLengthError(AdapterIdsError):
    """``adapter_ids`` doesn't have one entry per sample."""


class UnknownAdapterError(AdapterIdsError):
    """``adapter_ids`` names an adapter that the model doesn't have (any more)."""


class ModelStateError(MultibatchError, RuntimeError):
    """The model can't run a mixed batch in its current state; the message says what to do first."""


class NotEnabledError(ModelStateError):
    """Ids were passed to a model on which ``enable`` was not called, such as a copy of an enabled model."""


class AdapterMismatchError(ModelStateError):
    """An adapter's weights don't fit the model or each other; batches that don't name it run."""


class AdapterFileError(ModelStateError):
    """A stored adapter's files are missing, damaged, outside of the store's roots, or not what was registered."""


class StoreFullError(ModelStateError):
    """The stored adapters of a batch don't fit into the store's memory, or didn't within the timeout."""


class NoAdaptersError(ModelStateError):
    """The model has no adapters."""


class MergedAdaptersError(ModelStateError, ValueError):
    """An adapter is merged into the base weights, so it would affect all rows."""


class UnsupportedError(MultibatchError, TypeError):
    """The model, tuner or layer doesn't support mixed batches."""


class AdapterUnsupportedError(UnsupportedError):
    """An adapter isn't supported by adapter stores; PEFT's ``load_adapter`` may support it."""


class RowMappingError(MultibatchError, ValueError):
    """A layer's rows can't be mapped to samples, for example because their number isn't a multiple of the samples."""


class BackendUnavailableError(MultibatchError, RuntimeError):
    """The requested backend is not available."""


class DemoModelMissing(MultibatchError, ImportError):
    """The packages with the demo's model are not installed."""
