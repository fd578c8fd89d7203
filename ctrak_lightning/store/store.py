"""Reads a store of traces."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ctrak_lightning.errors import CorruptStoreError, StoreError
from ctrak_lightning.store.arrays import check_digest, corrupt
from ctrak_lightning.store.files import FileRecord
from ctrak_lightning.store.integrity import altered_files, unrecorded_files
from ctrak_lightning.store.kernel import Kernel, read_kernel
from ctrak_lightning.store.manifest import read_manifest
from ctrak_lightning.store.samples import SampleTable, count_samples, read_samples
from ctrak_lightning.store.schema import MANIFEST, CheckpointRecord, Manifest, StoreHeader
from ctrak_lightning.store.sections import (
    Function,
    Visits,
    read_exposures,
    read_function,
    read_visits,
)
from ctrak_lightning.store.shards import Rows
from ctrak_lightning.store.stored_rows import StoredRows
from ctrak_lightning.utilities.processes import ALONE, Processes


class IncompleteStoreWarning(UserWarning):
    """A store has checkpoints whose capture was interrupted; they are left out.

    Why: half a checkpoint would rank the samples that it lacks last.

    What to do: run the training again with the same callback and folder, which completes them; or
    ask without them.
    """


class TraceStore:
    """The traces in a folder that a :class:`TraceWriter` wrote, to read; files are opened within
    calls only.

    Opening compares every recorded file's size with the manifest; :meth:`verify` compares every
    byte.

    Raises:
        StoreError: There is no store, it is another version's, or no checkpoint is sealed.
        CorruptStoreError: The manifest is invalid, or a recorded file is missing or truncated.

    Warns:
        IncompleteStoreWarning: Some checkpoints are not sealed; they are left out.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._manifest = read_manifest(self.path)
        sealed = [record for record in self._manifest.checkpoints if record.sealed]
        unsealed = [record.step for record in self._manifest.checkpoints if not record.sealed]
        if not sealed:
            raise StoreError(
                f"{self.path} has no sealed checkpoint (begun: {unsealed or 'none'}): the run has "
                "not come to its first one, or was ended before it, or it could not be traced, "
                "which the run's log says. HINT: go on with the run, with the same callback and "
                "folder; what was begun is continued."
            )
        self._size = count_samples(self.path / self._manifest.samples)
        for record in sealed:
            if record.rows != self._size:
                raise CorruptStoreError(
                    f"{self.path / MANIFEST}: checkpoint {record.step} is sealed with "
                    f"{record.rows} rows, {self._manifest.samples} has {self._size} samples. HINT: "
                    "restore the store from a copy or capture again into a new folder."
                )
        self.checkpoints = [
            Checkpoint(self.path, record, self._manifest, self._size) for record in sealed
        ]
        """The sealed checkpoints, by step."""
        if unsealed:
            warnings.warn(
                f"{self.path}: the checkpoints of steps {unsealed} are not sealed and are left "
                "out. HINT: run the training again with the same callback and folder to complete "
                "them.",
                IncompleteStoreWarning,
                stacklevel=2,
            )

    @property
    def header(self) -> StoreHeader:
        """What all traces of the store have in common."""
        return self._manifest.header

    @property
    def run_id(self) -> str:
        """Name of the run that created the store."""
        return self._manifest.run_id

    @property
    def edition(self) -> int:
        """How often samples have been forgotten from the store."""
        return self._manifest.edition

    @cached_property
    def samples(self) -> SampleTable:
        """The sample table, read at first use; a CorruptStoreError where its file is not the one
        that was sealed."""
        return read_samples(self._sample_file())

    def samples_of(self, positions: Tensor) -> SampleTable:
        """The samples at positions [n] only, each once, ascending; for stores whose sample table is
        larger than memory. Raises as :attr:`samples`."""
        return read_samples(self._sample_file(), torch.unique(positions).tolist())

    def __len__(self) -> int:
        return self._size

    def verify(self) -> list[str]:
        """Compare every byte with the manifest. What the ledger says is for
        :func:`ctrak_lightning.provenance.verify`.

        Returns:
            One line per file that is missing, altered or not recorded; empty when all is well.
        """
        altered = altered_files(self.path, self._manifest)
        return altered + unrecorded_files(self.path, self._manifest)

    def _sample_file(self) -> Path:
        """The file of the sample table, which is the one that was sealed."""
        path = self.path / self._manifest.samples
        check_digest(path, self._manifest.files[self._manifest.samples])
        return path


class Checkpoint:
    """The traces of one sealed checkpoint; one of ``TraceStore.checkpoints``.

    Whatever reads a file raises a CorruptStoreError where that is damaged, or is not the one that
    was sealed, or where the shards do not hold every sample once.
    """

    def __init__(self, root: Path, record: CheckpointRecord, manifest: Manifest, size: int) -> None:
        self.step = record.step
        """Optimizer steps taken when the traces were captured."""
        self.epoch = record.epoch
        """Epoch of the capture."""
        self.learning_rate = record.learning_rate
        """Learning rate at the capture, or None."""
        self.rows = record.rows
        """Number of samples, N."""
        self._root, self._record, self._manifest, self._size = root, record, manifest, size
        self._exposures: Tensor | None = None
        self._stored = StoredRows(
            root, record.folder, record.shards, manifest.header, size, rows=size
        )

    def shards(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The traces in the order of capture, a shard at a time: index int64 [n] and features
        float32 [n, k]."""
        for shard in self._stored.shards():
            rows = shard.read(0, len(shard))
            yield rows.index, rows.features()

    def blocks(self, processes: Processes = ALONE) -> Iterator[Rows]:
        """The stored rows, a few MiB at a time whatever the size of the store; see
        :meth:`StoredRows.blocks`. Of several ``processes`` each gets the rows of its share of the
        shards."""
        return self._stored.share(processes).blocks()

    def rows_of(self, samples: Tensor) -> Rows:
        """The stored rows of some samples, positions in the sample table [n], in that order."""
        return self._stored.at(samples)

    def features(self) -> Tensor:
        """Features of all samples, float32 [N, k], in the order of the sample table."""
        # The manifest's row count was compared with the files' sizes: this allocates no more than
        # they hold.
        features = torch.empty(self._size, self._manifest.header.dim)
        for rows in self.blocks():
            features[rows.index] = rows.features()
        return features

    def losses(self) -> Tensor:
        """Loss of each sample at the capture, float32 [N], in the order of the sample table."""
        return self._column("loss")

    def norms(self) -> Tensor:
        """Norm of each sample's features, float32 [N], in the order of the sample table; 0 if it
        had not been trained on."""
        norms, exposed = self._column("norm"), self.exposed()
        return norms if exposed is None else norms * exposed

    @property
    def has_weights(self) -> bool:
        """Whether the traced parameters were stored."""
        return self._record.weights in self._manifest.files

    def weights(self) -> dict[str, Tensor]:
        """The traced parameters by name, in their own dtypes.

        Raises:
            StoreError: They were not stored.
        """
        known = self._manifest.files.get(self._record.weights)
        if known is None:
            raise StoreError(
                f"checkpoint {self.step} was sealed without weights. HINT: load the training "
                "checkpoint of this step instead."
            )
        return read_weights(self._root / self._record.weights, known)

    def buffers(self) -> dict[str, Tensor]:
        """What else of the model training had changed, by name, such as running means; empty where
        nothing was stored."""
        known = self._manifest.files.get(self._record.buffers)
        return {} if known is None else read_weights(self._root / self._record.buffers, known)

    def function(self) -> Function | None:
        """What the network answered to a fixed input, or None where that was not recorded."""
        path = self._companion(self._record.function)
        return None if path is None else read_function(path)

    def kernel(self) -> Kernel:
        """The eigendecomposition of the Gram matrix of :meth:`features`."""
        kernel = read_kernel(
            self._root / self._record.kernel, self._size, self._manifest.header.dim
        )
        exposed = self.exposed()
        return kernel if exposed is None else replace(kernel, exposed=int(exposed.sum()))

    def exposures(self) -> Tensor | None:
        """How often each sample had entered an optimizer step, int64 [N], in the order of the
        sample table; None where that is not known. The traces of samples with 0 are zeros."""
        if self._exposures is None:
            path = self._companion(self._record.exposures)
            self._exposures = None if path is None else read_exposures(path, self._size)
        return self._exposures

    def exposed(self) -> Tensor | None:
        """Which samples had entered an optimizer step, bool [N]; None where all had, or that is not
        known."""
        exposures = self.exposures()
        return None if exposures is None or bool(exposures.all()) else exposures > 0

    def visits(self) -> Visits | None:
        """In which training steps each sample was seen, where those steps left the traces; else
        None."""
        path = self._companion(self._record.visits)
        return None if path is None else read_visits(path, self._size)

    def _companion(self, name: str) -> Path | None:
        """The file, which is the one that was sealed; None where there is none of this name."""
        known = self._manifest.files.get(name)
        if known is None:
            return None
        check_digest(self._root / name, known)
        return self._root / name

    def _column(self, column: str) -> Tensor:
        values = torch.empty(self._size)
        for shard in self._stored.shards():
            values[shard.columns["index"]] = shard.columns[column]
        return values


def read_weights(path: Path, known: FileRecord) -> dict[str, Tensor]:
    """The weights at ``path``, which is the file that was recorded.

    Raises:
        CorruptStoreError: It is another one.
    """
    # From the file's own descriptor, so that what safetensors maps by its path is no link and has
    # this content.
    check_digest(path, known)
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise corrupt(path, f"safetensors reports: {error}") from error
