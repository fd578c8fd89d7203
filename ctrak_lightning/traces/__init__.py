"""The HDF5 store of attribution traces."""

from ctrak_lightning.traces.checkpoint_writer import CheckpointWriter
from ctrak_lightning.traces.kernel import Kernel
from ctrak_lightning.traces.metadata_changes import ChangedMetadataWarning
from ctrak_lightning.traces.samples import SampleTable
from ctrak_lightning.traces.schema import StoreHeader
from ctrak_lightning.traces.store import Checkpoint, IncompleteStoreWarning, TraceStore
from ctrak_lightning.traces.visits import Visits
from ctrak_lightning.traces.writer import TraceWriter

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
