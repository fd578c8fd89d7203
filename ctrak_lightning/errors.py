"""The library's typed errors. Each says what was given, what was expected and what to do."""


class TaskError(TypeError):
    """An object that should be a :class:`~ctrak_lightning.DiffusionTask` lacks members."""


class BatchError(ValueError):
    """A batch lacks a field or holds one of the wrong kind."""


class ConceptError(ValueError):
    """A concept names an attribute or value that the task does not know."""


class InversionError(ValueError):
    """An image cannot be traced back to the states of its generation."""


class GradientError(ValueError):
    """Per-sample gradients are zero or not finite, or a parameter cannot be traced."""


class TrialError(ValueError):
    """Data, task, network and method do not fit together, as tracing two samples before training
    has shown."""


class ReportError(ValueError):
    """A report cannot be made of these results, or not be written to this path."""


class StoreError(ValueError):
    """A trace store cannot be used as it is."""


class StoreMismatchError(StoreError):
    """A trace store was made with another method, projection, model or dataset."""


class UnknownMethodError(StoreMismatchError):
    """A trace store's method has a class that is not known here, so that it cannot be made
    again."""


class DatasetChangedError(StoreMismatchError):
    """The samples differ from those that the store describes."""


class TrainingChangedError(StoreMismatchError):
    """What trains is no longer what the traces of the run began with."""


class StoreLockedError(StoreError):
    """Another process, or another writer of this one, has a trace store open to change it."""


class CorruptStoreError(StoreError):
    """A file of a trace store is missing, truncated or altered."""


class ProcessLostError(RuntimeError):
    """Another process of the run has died, or does not answer."""
