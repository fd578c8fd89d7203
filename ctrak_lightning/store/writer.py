"""Creates a store of traces, or continues one."""

import contextlib
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ctrak_lightning.errors import StoreError
from ctrak_lightning.store.arrays import check_digest
from ctrak_lightning.store.checkpoint_writer import CheckpointWriter, ClosesOnExit
from ctrak_lightning.store.formats import BYTES_PER_VALUE
from ctrak_lightning.store.lock import WriterLock, hold_folder
from ctrak_lightning.store.records import Records
from ctrak_lightning.store.samples import (
    SampleTable,
    check_unchanged,
    read_samples,
    warn_of_changed_metadata,
    write_samples,
)
from ctrak_lightning.store.schema import CheckpointRecord, StoreHeader, is_integer
from ctrak_lightning.store.sections import write_exposures
from ctrak_lightning.utilities.processes import ALONE, Processes

_SHARD_ROWS = 1024
_SHARDS = 64
_SHARD_BYTES = 2**25


class TraceWriter(ClosesOnExit):
    """Creates the store at ``path``, or continues the one that is there.

    A store has one writer at a time, which holds it until :meth:`close`, until it is no longer
    used, or until its process ends, however it ends; as a context manager it closes on leaving.
    Opening a store removes what a killed run left unfinished. A file is first written beside its
    place, then renamed, then recorded in the manifest, so a crash costs the shard in progress and
    no more.

    Args:
        path: Folder of the store; created if it does not exist.
        header: What all traces of the store have in common.
        run_id: Name of a new store's run, a random one by default; an existing store keeps its own.
        shard_rows: Samples per shard; by default 1,024, in large stores up to a 64th of the samples
            or 32 MiB. Continue with the same number to get the bytes of an uninterrupted run.
        queue_shards: Shards that may wait to be written, before a capture waits for the disk.
        processes: Those that capture, each a share of the samples, into one folder that all of
            them see. All make their writers, and call its methods, at the same time.
        lock: of :func:`~ctrak_lightning.store.lock.hold_folder`, where it is held already; the
            writer releases it. By default it is taken here.

    Raises:
        StoreLockedError: Another writer has the store; the message names its host and process.
        StoreMismatchError: The store that is there has another header; names each field that
            differs.
        DatasetChangedError: It describes another dataset.
        StoreError: The folder cannot be written, or holds files that are not a store's.
        CorruptStoreError: The store that is there is damaged.

    Example:
        >>> import tempfile, torch
        >>> from ctrak_lightning.store import SampleTable, StoreHeader, TraceStore, TraceWriter
        >>> folder = tempfile.TemporaryDirectory()
        >>> facts = {"method": {}, "projection": {}, "model": {}, "dataset": {"size": 2}}
        >>> header = StoreHeader(**facts, dim=3, dtype="float32")
        >>> writer = TraceWriter(folder.name, header)
        >>> owners = {"owner": ["ann", "bo"]}
        >>> writer.write_samples(SampleTable(["cat.png", "dog.png"], ["", ""], owners))
        >>> with writer.begin_checkpoint(300, epoch=2) as checkpoint:
        ...     checkpoint.append(torch.arange(2), torch.ones(2, 3), torch.zeros(2))
        ...     checkpoint.seal()
        >>> TraceStore(folder.name).checkpoints[0].features().shape
        torch.Size([2, 3])
        >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | Path,
        header: StoreHeader,
        *,
        run_id: str | None = None,
        shard_rows: int | None = None,
        queue_shards: int = 2,
        processes: Processes = ALONE,
        lock: WriterLock | None = None,
    ) -> None:
        for name, value in (("shard_rows", shard_rows), ("queue_shards", queue_shards)):
            if value is not None and (not is_integer(value) or value < 1):
                raise StoreError(f"TraceWriter({name}={value!r}): expected an int of at least 1.")
        if run_id is not None and (not isinstance(run_id, str) or not run_id):
            raise StoreError(
                f"TraceWriter(run_id={run_id!r}): expected a str that is not empty, or None."
            )
        self.path = Path(path)
        self._shard_rows, self._queue_shards = shard_rows, queue_shards
        self._processes = processes
        self._table: SampleTable | None = None
        self._current: CheckpointWriter | None = None
        self._lock = hold_folder(self.path, processes) if lock is None else lock
        try:
            self._records = Records(self.path, self._lock, header, run_id, processes)
        except BaseException:
            self._lock.release()
            raise

    @property
    def header(self) -> StoreHeader:
        """What all traces of the store have in common."""
        return self._records.manifest.header

    @property
    def run_id(self) -> str:
        """Name of the run that created the store."""
        return self._records.manifest.run_id

    @property
    def sealed_steps(self) -> list[int]:
        """Steps of the sealed checkpoints, ascending."""
        return [record.step for record in self._records.manifest.checkpoints if record.sealed]

    @property
    def sealed_weights(self) -> dict[int, str]:
        """Sha256 (hex) of the weights of each sealed checkpoint that has some, by step."""
        manifest = self._records.manifest
        return {
            record.step: manifest.files[record.weights].sha256
            for record in manifest.checkpoints
            if record.sealed and record.weights in manifest.files
        }

    def write_samples(self, table: SampleTable) -> None:
        """Store the sample table, or compare it with the stored one; needed before the first
        checkpoint.

        Metadata and thumbnails may differ from the stored ones, which are kept.

        Raises:
            DatasetChangedError: Ids, their order or content differ from the stored ones; names the
                samples.

        Warns:
            ChangedMetadataWarning: The metadata differs; names the columns. In the first process.
        """
        with self._processes.sharing_errors():
            if self._processes.is_first:
                self._write_samples(table)
        self._records.share()
        self._table = self._table or table

    def begin_checkpoint(
        self,
        step: int,
        *,
        epoch: int,
        learning_rate: float | None = None,
        weights: Mapping[str, Tensor] | None = None,
        exposures: Tensor | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> CheckpointWriter:
        """Open the checkpoint of ``step``, or continue it where an interrupted capture left it.

        A checkpoint that is still open is closed first. One that was begun with other weights or
        exposures is begun anew: traces of two models do not mix.

        Args:
            step: Optimizer steps taken.
            epoch: Epoch of the capture.
            learning_rate: Learning rate at the capture, or None.
            weights: The traced parameters by name, stored beside the traces; None stores none.
            exposures: How often each sample has entered an optimizer step, int64 [N]; None where
                that is not known. The trace of a sample with 0 is stored as zeros, whatever is
                appended: the model has learnt nothing from it.
            buffers: What else training changes in the model, by name; none are stored where there
                are none.

        Raises:
            ValueError: The exposures are of another number of samples.
            StoreError: It is sealed, was begun with another epoch or learning rate, or there are no
                samples; or a shard of the checkpoint that is still open cannot be written.
        """
        given = CheckpointRecord(
            step=_count("step", step),
            epoch=_count("epoch", epoch),
            learning_rate=_rate(learning_rate),
            processes=self._processes.count,
        )
        if self._records.manifest.samples not in self._records.manifest.files:
            raise StoreError(
                "TraceWriter.begin_checkpoint(): the store has no samples. HINT: call "
                "write_samples() first."
            )
        if exposures is not None and len(exposures) != len(self._stored_table()):
            raise ValueError(
                f"TraceWriter.begin_checkpoint(exposures of {len(exposures)} samples): expected "
                f"{len(self._stored_table())}."
            )
        with self._processes.sharing_errors():
            if self._current is not None:
                self._current.close()
        with self._processes.sharing_errors():
            if self._processes.is_first:
                self._prepare(
                    given, {given.weights: weights, given.buffers: buffers or None}, exposures
                )
        self._records.share()
        begun = self._records.manifest.find(given.step)
        assert begun is not None  # by the first process
        with self._processes.sharing_errors():
            ids = self._stored_table().sample_ids
            self._current = CheckpointWriter(
                self.path,
                self._records.begin(begun),
                self.header,
                ids,
                shard_rows=self._shard_rows or default_shard_rows(self.header, len(ids)),
                queue_shards=self._queue_shards,
                records=self._records,
                processes=self._processes,
                untrained=None if exposures is None else exposures == 0,
            )
        return self._current

    def discard_after(self, step: int) -> list[int]:
        """Remove the checkpoints later than ``step``, sealed or not; for training that resumes from
        there.

        Returns:
            The steps removed, ascending.
        """
        steps = [record.step for record in self._records.manifest.checkpoints if record.step > step]
        with self._processes.sharing_errors():
            if self._current is not None and self._current.step in steps:
                with contextlib.suppress(StoreError):  # of shards that are to go
                    self._current.close()
            elif self._current is not None:
                self._current.flush()
        with self._processes.sharing_errors():
            if steps and self._processes.is_first:
                # First the manifest: a crash in between leaves unrecorded files, never records
                # without files.
                self._records.save(self._records.manifest.without_steps(steps))
                self._records.remove_unrecorded()
        self._records.share()
        return steps

    def close(self) -> None:
        """Close the checkpoint that is open, and let others write to the store; idempotent.

        Raises:
            StoreError: As :meth:`CheckpointWriter.close`; the store is let go all the same.
        """
        current, self._current = self._current, None
        try:
            if current is not None:
                current.close()
        finally:
            self._lock.release()

    def _write_samples(self, table: SampleTable) -> None:
        name = self._records.manifest.samples
        if name in self._records.manifest.files:
            check_unchanged(self._stored_table(), table, self.path)
            warn_of_changed_metadata(self._stored_table(), table, self.path)
            return
        known = self._records.write(name, lambda path: write_samples(path, table))
        self._records.save(self._records.manifest.with_files({name: known}))

    def _prepare(
        self,
        given: CheckpointRecord,
        state: Mapping[str, Mapping[str, Tensor] | None],
        exposures: Tensor | None,
    ) -> None:
        """Record the checkpoint, and write the model's state by file, and exposures: without
        shards, unless as many processes with the same gave them."""
        record = self._records.manifest.find(given.step)
        if record is not None:
            _check_continues(record, given)
        files = {}
        for name, tensors in state.items():
            if tensors is not None:
                # Cloned, because safetensors refuses tensors that share memory, as tied weights do.
                plain = {
                    key: tensor.detach().cpu().contiguous().clone()
                    for key, tensor in tensors.items()
                }
                files[name] = self._records.write(name, partial(save_file, plain))
        if exposures is not None:
            files[given.exposures] = self._records.write(
                given.exposures, lambda path: write_exposures(path, exposures)
            )
        if record is not None:
            known = self._records.manifest.files
            same = all(known.get(name) == files.get(name) for name in (*state, given.exposures))
            if same and record.processes == given.processes:
                return
        self._records.restart(given, files)

    def _stored_table(self) -> SampleTable:
        if self._table is None:
            name = self._records.manifest.samples
            check_digest(self.path / name, self._records.manifest.files[name])
            self._table = read_samples(self.path / name)
        return self._table


def _check_continues(record: CheckpointRecord, given: CheckpointRecord) -> None:
    if record.sealed:
        raise StoreError(
            f"TraceWriter.begin_checkpoint(step={record.step}): this checkpoint is sealed already. "
            f"HINT: skip it, or discard_after({record.step - 1}) to capture it again."
        )
    if (record.epoch, record.learning_rate) != (given.epoch, given.learning_rate):
        raise StoreError(
            f"TraceWriter.begin_checkpoint(step={record.step}): it was begun at epoch "
            f"{record.epoch} with learning rate {record.learning_rate}, now epoch {given.epoch} "
            f"and {given.learning_rate} are given. HINT: the model is not the same; "
            f"discard_after({record.step - 1}) removes what was captured."
        )


def default_shard_rows(header: StoreHeader, samples: int) -> int:
    # Opening a shard takes 2 ms, in which a disk reads 2 MB: half of the time where a shard has 4
    # MB, little at 32.
    fits = _SHARD_BYTES // (header.dim * BYTES_PER_VALUE[header.dtype])
    return max(_SHARD_ROWS, min(samples // _SHARDS, fits))


def _count(name: str, value: int) -> int:
    if not is_integer(value) or value < 0:
        raise StoreError(
            f"TraceWriter.begin_checkpoint({name}={value!r}): expected an int of at least 0."
        )
    return value


def _rate(value: float | None) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise StoreError(
            f"TraceWriter.begin_checkpoint(learning_rate={value!r}): expected a finite number, or "
            "None."
        )
    return float(value)
