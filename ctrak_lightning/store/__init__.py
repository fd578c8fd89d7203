"""The HDF5 store of attribution traces."""

from ctrak_lightning.store.checkpoint_writer import CheckpointWriter
from ctrak_lightning.store.kernel import Kernel
from ctrak_lightning.store.samples import ChangedMetadataWarning, SampleTable
from ctrak_lightning.store.schema import StoreHeader
from ctrak_lightning.store.sections import Visits
from ctrak_lightning.store.store import Checkpoint, IncompleteStoreWarning, TraceStore
from ctrak_lightning.store.writer import TraceWriter

__all__ = [
    "ChangedMetadataWarning",
    "Checkpoint",
    "CheckpointWriter",
    "IncompleteStoreWarning",
    "Kernel",
    "SampleTable",
    "StoreHeader",
    "TraceStore",
    "TraceWriter",
    "Visits",
]
