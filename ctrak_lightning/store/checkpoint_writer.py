"""Writes the traces of one checkpoint."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ctrak_lightning.errors import CorruptStoreError, GradientError, StoreError
from ctrak_lightning.store.files import make_folder
from ctrak_lightning.store.kernel import Kernel, gram_of_rows, kernel_of_columns, write_kernel
from ctrak_lightning.store.records import Records
from ctrak_lightning.store.schema import CheckpointRecord, StoreHeader
from ctrak_lightning.store.sections import Function, Visits, write_function, write_visits
from ctrak_lightning.store.shards import Rows, read_column, stored_unit, write_shard
from ctrak_lightning.store.stored_rows import StoredRows
from ctrak_lightning.utilities.processes import Processes

_LOOK_S = 1.0


class InBackground:
    """Runs jobs one after the other in a thread that lives only while there are some.

    A job that fails stays first in the queue and stops it; its error is raised by the next
    :meth:`raise_error` or :meth:`wait`, in the caller's thread, and the job is tried again with the
    next :meth:`submit` or :meth:`wait`.

    Args:
        limit: jobs that may wait, the one being done included; one more waits for room.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._jobs: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._working = False
        self._error: BaseException | None = None
        self._failed = False

    def submit(self, job: Callable[[], None]) -> None:
        """Queue ``job``; waits while the queue is full, and never raises what went wrong with an
        earlier job."""
        with self._changed:
            self._jobs.append(job)
            self._start()
            while len(self._jobs) > self._limit and not self._stopped():
                self._changed.wait(_LOOK_S)

    def raise_error(self) -> None:
        """Raise what a job ended with since the last call.

        Raises:
            StoreError: The job's own, or one that names what it raised.
        """
        with self._changed:
            self._stopped()
            error, self._error = self._error, None
        if isinstance(error, StoreError):
            raise error
        if error is not None:
            raise StoreError(
                f"The thread that writes traces ended with {type(error).__name__}: {error}. HINT: "
                "everything recorded earlier is intact; try again to continue."
            ) from error

    def wait(self) -> None:
        """Wait until all jobs are done and the thread has ended.

        Raises:
            StoreError: As :meth:`raise_error`; the jobs from the one that failed on are still
                queued.
        """
        with self._changed:
            if self._error is None:
                self._start()
            while self._jobs and not self._stopped():
                self._changed.wait(_LOOK_S)
            thread = self._thread
        if thread is not None:
            thread.join()
        self.raise_error()

    def end(self) -> None:
        """:meth:`wait`, unless the last attempt failed; then drop what is left.

        Raises:
            StoreError: As :meth:`raise_error`, of a job that has failed since.
        """
        try:
            if self._failed:
                self.raise_error()
            else:
                self.wait()
        finally:
            with self._changed:
                self._jobs.clear()

    def _start(self) -> None:
        """Start the thread if there is work and none is at it; the lock is held."""
        if not self._jobs or self._error is not None or self._working:
            return
        # Not a daemon: a process that ends while a shard is being written finishes it.
        self._thread = threading.Thread(target=self._run, name="ctrak-write")
        try:
            self._thread.start()
        except RuntimeError as error:
            self._thread, self._error, self._failed = None, error, True
            return
        self._working = True

    def _stopped(self) -> bool:
        """Whether nobody works on the queue any more; a thread that died without a word is noticed
        here. The lock is held."""
        if self._working and self._thread is not None and not self._thread.is_alive():
            self._working = False
            self._error, self._failed = RuntimeError("it died with jobs left to do"), True
        return self._error is not None

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._working = False
                    return
                job = self._jobs[0]
            try:
                job()
            except BaseException as error:
                with self._changed:
                    self._working = False
                    self._error, self._failed = error, True
                    self._changed.notify_all()
                return
            with self._changed:
                self._failed = False
                self._jobs.popleft()
                self._changed.notify_all()


_SHOWN = 5


class CheckpointWriter:
    """Takes the traces of one checkpoint in batches and seals them in shards.

    Made by ``TraceWriter.begin_checkpoint``. A shard is made whenever ``shard_rows`` rows have
    come, whatever the batch size, so a capture that was interrupted and continued with the same
    order of samples gives the same bytes as one that was not. A thread writes the shards, one after
    the other; what it meets is raised by the next call. A call that raises so has taken in nothing,
    and no row is lost: after it, the shard that failed is tried again. As a context manager it
    drops, on leaving, the rows in no shard yet; sealed shards stay for the next run. Of several
    processes each takes the traces of its own samples; :meth:`seal` they call together.
    """

    def __init__(
        self,
        root: Path,
        record: CheckpointRecord,
        header: StoreHeader,
        sample_ids: list[str],
        *,
        shard_rows: int,
        queue_shards: int,
        records: Records,
        processes: Processes,
        untrained: Tensor | None = None,
    ) -> None:
        self._untrained = (
            torch.zeros(len(sample_ids), dtype=torch.bool) if untrained is None else untrained
        )
        self._root = root
        self._record = record
        self._header = header
        self._sample_ids = sample_ids
        self._shard_rows = shard_rows
        self._records = records
        self._processes = processes
        self._buffer: list[Rows] = []
        self._jobs = InBackground(queue_shards)
        self._open = True
        self._seen = torch.zeros(len(sample_ids), dtype=torch.bool)
        for name in record.shards:
            index = read_column(root / name, "index", "int64", max_rows=record.rows)
            if bool(((index < 0) | (index >= len(sample_ids))).any()):
                raise CorruptStoreError(
                    f"{root / name}: index has values outside the {len(sample_ids)} samples."
                )
            self._seen[index] = True
        if int(self._seen.sum()) != record.rows:
            raise CorruptStoreError(
                f"{root / record.folder}: the shards hold {int(self._seen.sum())} samples, the "
                f"manifest records {record.rows}. HINT: "
                f"TraceWriter.discard_after({record.step - 1}) removes this checkpoint, to capture "
                "it again."
            )
        make_folder(root / record.folder)

    @property
    def step(self) -> int:
        """Optimizer steps taken at this checkpoint."""
        return self._record.step

    @property
    def rows_done(self) -> int:
        """Rows in sealed shards: how many, in the order of appending, a continued capture skips.
        Appended rows count once the thread has written them (:meth:`flush`)."""
        return self._record.rows

    def append(self, indices: Tensor, features: Tensor, loss: Tensor) -> None:
        """Add the traces of n samples; a batch that is refused leaves nothing behind.

        Args:
            indices: Positions in the sample table, int64 [n].
            features: Projected gradients, float32 [n, k].
            loss: Loss of each sample, float32 [n].

        Raises:
            ValueError: Wrong shape or dtype, or a position that is outside the table or was
                appended already.
            GradientError: A row is zero or not finite; names the samples.
            StoreError: This checkpoint is sealed or closed, or an earlier shard could not be
                written.
        """
        self._require_open("append")
        self._jobs.raise_error()
        self._check_arrays(indices, features, loss)
        if not len(indices):
            return
        indices, features, loss = indices.cpu(), features.detach().cpu(), loss.detach().cpu()
        self._check_indices(indices)
        untrained = self._untrained[indices]
        features = features.masked_fill(untrained[:, None], 0.0)
        self._refuse_rows(indices, ~features.isfinite().all(dim=1), "features that are not finite")
        self._refuse_rows(indices, ~loss.isfinite(), "a loss that is not finite")
        self._refuse_rows(
            indices, (features == 0).all(dim=1) & ~untrained, "features that are all zero"
        )
        self._buffer.append(self._unit_rows(indices, features, loss))
        self._seen[indices] = True
        while sum(map(len, self._buffer)) >= self._shard_rows:
            self._queue_shard()

    def flush(self) -> None:
        """Wait until the shards that are full have been written and recorded.

        Raises:
            StoreError: One cannot be written.
        """
        self._jobs.wait()

    def write_visits(self, visits: Visits) -> None:
        """Store in which training steps each sample was seen, where those steps left the traces.

        Raises:
            ValueError: They are of another number of samples, or of samples without exposure, whose
                rows would be lost.
            StoreError: This checkpoint is sealed or closed, or the file cannot be written.
        """
        self._require_open("write_visits")
        self.flush()
        if len(visits.counts) != len(self._seen):
            raise ValueError(
                f"CheckpointWriter.write_visits({len(visits.counts)} samples): expected "
                f"{len(self._seen)}."
            )
        odd = (self._untrained & (visits.counts > 0)).nonzero().flatten().tolist()
        if odd:
            raise ValueError(
                f"CheckpointWriter.write_visits(): {len(odd)} samples are visited and have no "
                f"exposure, for example {self._sample_ids[odd[0]]!r}. Expected "
                "begin_checkpoint(exposures=None) where it is not known how often each was "
                "trained on."
            )
        name = self._record.visits
        self._records.commit(
            self._record,
            {name: self._records.write(name, lambda path: write_visits(path, visits))},
        )

    def write_function(self, function: Function) -> None:
        """Store what the network answers to a fixed input with the checkpoint's weights; the
        process of rank 0 alone calls it.

        Raises:
            StoreError: This checkpoint is sealed or closed, or the file cannot be written.
        """
        self._require_open("write_function")
        self.flush()
        name = self._record.function
        known = self._records.write(name, lambda path: write_function(path, function))
        self._records.commit(self._record, {name: known})

    def seal(self) -> None:
        """Write the rows that are left and the kernel, then mark the checkpoint sealed.

        Of several processes all call it; the one of rank 0 writes the kernel.

        Raises:
            StoreError: Samples are missing, this checkpoint is sealed or closed, or a file cannot
                be written.
        """
        with self._processes.sharing_errors():
            self._require_open("seal")
        self._require_all_once()
        with self._processes.sharing_errors():
            if self._buffer:
                self._queue_shard()
            self.flush()
        whole, files = self._records.join(self._record)
        kernel = self._kernel(whole)
        with self._processes.sharing_errors():
            if self._processes.is_first:
                files[whole.kernel] = self._records.write(
                    whole.kernel, lambda path: write_kernel(path, kernel())
                )
        self._records.seal(sealed := replace(whole, sealed=True), files)
        self._record = sealed
        self.close()

    def close(self) -> None:
        """Wait for the shards that are full, drop the rows that no shard holds and refuse further
        calls; idempotent.

        Raises:
            StoreError: A shard that no earlier call told of cannot be written. The checkpoint is
                closed all the same.
        """
        self._open = False
        self._buffer = []
        self._jobs.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # What ends the capture is told, not what it leaves undone.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(StoreError):
            self.close()

    def _require_open(self, call: str) -> None:
        if not self._open:
            state = "sealed" if self._record.sealed else "closed"
            raise StoreError(
                f"CheckpointWriter.{call}(): checkpoint {self.step} is {state}. HINT: "
                "TraceWriter.begin_checkpoint() opens the next one, or continues one that is not "
                "sealed."
            )

    def _check_arrays(self, indices: Tensor, features: Tensor, loss: Tensor) -> None:
        n = features.shape[0] if features.dim() else 0
        for name, given, shape, dtype in (
            ("features", features, (n, self._header.dim), torch.float32),
            ("indices", indices, (n,), torch.int64),
            ("loss", loss, (n,), torch.float32),
        ):
            if tuple(given.shape) != shape or given.dtype != dtype:
                expected = f"[n, {self._header.dim}]" if name == "features" else f"[{n}]"
                raise ValueError(
                    f"CheckpointWriter.append({name}): got {given.dtype} {list(given.shape)}, "
                    f"expected {dtype} {expected}."
                )

    def _check_indices(self, indices: Tensor) -> None:
        outside = indices[(indices < 0) | (indices >= len(self._seen))]
        if len(outside):
            raise ValueError(
                f"CheckpointWriter.append(indices): {outside[:_SHOWN].tolist()} lie outside the "
                f"sample table, which has positions 0 to {len(self._seen) - 1}."
            )
        values, counts = torch.unique(indices, return_counts=True)
        again = values[self._seen[values] | (counts > 1)]
        if len(again):
            raise ValueError(
                f"CheckpointWriter.append(indices): checkpoint {self.step} would get more than one "
                f"trace of {self._names(again)}. HINT: a continued capture skips the first "
                f"rows_done={self.rows_done} samples."
            )

    def _refuse_rows(self, indices: Tensor, refused: Tensor, what: str) -> None:
        if bool(refused.any()):
            raise GradientError(
                f"checkpoint {self.step}: {int(refused.sum())} of {len(refused)} samples have "
                f"{what}: {self._names(indices[refused])}. Nothing of this batch was stored. HINT: "
                "look at these samples, the precision of the forward pass, and whether the "
                "objective depends on the traced parameters."
            )

    def _unit_rows(self, indices: Tensor, features: Tensor, loss: Tensor) -> Rows:
        # float64, because squares of float32 gradients under- and overflow float32.
        wide = features.double()
        # Rows of zeros are those of samples that were not trained on; they have the norm 1, for no
        # stored norm is 0.
        norm = wide.norm(dim=1).float()
        norm = torch.where(self._untrained[indices], torch.ones_like(norm), norm)
        self._refuse_rows(indices, ~norm.isfinite(), "features whose norm is beyond float32")
        unit, scale = stored_unit(wide / norm.double()[:, None], self._header.dtype)
        return Rows(index=indices.clone(), unit=unit, scale=scale, norm=norm, loss=loss.clone())

    def _queue_shard(self) -> None:
        rows, rest = Rows.concatenate(self._buffer).split(self._shard_rows)
        self._buffer = [rest] if len(rest) else []
        self._jobs.submit(lambda: self._write_shard(rows))

    def _write_shard(self, rows: Rows) -> None:
        """In the thread, which alone changes the record while there are shards to write."""
        name = self._record.shard(self._processes.rank)
        known = self._records.write(name, lambda path: write_shard(path, rows))
        record = replace(
            self._record, rows=self._record.rows + len(rows), shards=(*self._record.shards, name)
        )
        self._records.commit(record, {name: known})
        self._record = record

    def _require_all_once(self) -> None:
        counts = self._processes.sum(self._seen.int())
        missing, twice = (counts == 0).nonzero().flatten(), (counts > 1).nonzero().flatten()
        if len(missing):
            raise StoreError(
                f"checkpoint {self.step} cannot be sealed: {len(missing)} of {len(self._seen)} "
                f"samples have no trace: {self._names(missing)}. HINT: append the traces of every "
                "sample first."
            )
        if len(twice):
            raise StoreError(
                f"checkpoint {self.step} cannot be sealed: {len(twice)} samples have traces of "
                f"more than one process: {self._names(twice)}. HINT: give every process samples of "
                "its own."
            )

    def _kernel(self, whole: CheckpointRecord) -> Callable[[], Kernel]:
        """How the first process gets the kernel; the sums over the traces are made here, by all
        processes."""
        n, k = len(self._seen), self._header.dim
        # From the files, not from memory: what was stored is what is described, also after an
        # interruption.
        if k > n:
            stored = StoredRows(self._root, whole.folder, whole.shards, self._header, n, rows=n)
            return lambda: kernel_of_columns(stored.columns(), n, k)
        own = StoredRows(
            self._root, whole.folder, self._record.shards, self._header, n, rows=self._record.rows
        )
        with self._processes.sharing_errors():
            sums = gram_of_rows((rows.features() for rows in own.blocks()), k)
        return sums.over(self._processes).kernel

    def _names(self, indices: Tensor) -> str:
        shown = ", ".join(repr(self._sample_ids[i]) for i in indices[:_SHOWN].tolist())
        return shown if len(indices) <= _SHOWN else f"{shown} and {len(indices) - _SHOWN} more"
