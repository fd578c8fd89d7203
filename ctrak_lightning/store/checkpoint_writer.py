"""Writes the traces of one checkpoint."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ctrak_lightning.errors import CorruptStoreError, GradientError, StoreError, listed
from ctrak_lightning.store.background import InBackground
from ctrak_lightning.store.files import make_folder
from ctrak_lightning.store.formats import stored_unit
from ctrak_lightning.store.kernel import Kernel, gram_of_rows, kernel_of_columns, write_kernel
from ctrak_lightning.store.records import Records
from ctrak_lightning.store.schema import CheckpointRecord, StoreHeader
from ctrak_lightning.store.sections import Function, Visits, write_function, write_visits
from ctrak_lightning.store.shards import Rows, read_index, write_shard
from ctrak_lightning.store.stored_rows import StoredRows
from ctrak_lightning.utilities.processes import Processes


class ClosesOnExit:
    """A context manager that closes on leaving. Where an error ends it, that one is raised, and not
    one of what it leaves undone."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.nullcontext() if kind is None else contextlib.suppress(StoreError):
            self.close()


class CheckpointWriter(ClosesOnExit):
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
        nobody = torch.zeros(len(sample_ids), dtype=torch.bool)
        self._untrained = nobody if untrained is None else untrained
        self._root, self._record, self._header = root, record, header
        self._sample_ids, self._shard_rows = sample_ids, shard_rows
        self._records, self._processes = records, processes
        self._buffer: list[Rows] = []
        self._jobs = InBackground(queue_shards)
        self._open = True
        self._seen = nobody.clone()
        for name in record.shards:
            index = read_index(root / name, record.rows)
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

    def append(
        self, indices: Tensor, features: Tensor, loss: Tensor, *, zeros: bool = False
    ) -> None:
        """Add the traces of n samples; a batch that is refused leaves nothing behind.

        Args:
            indices: Positions in the sample table, int64 [n].
            features: Projected gradients, float32 [n, k].
            loss: Loss of each sample, float32 [n].
            zeros: whether the row of a sample that was trained on may be all zero; it scores 0.

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
        empty = (features == 0).all(dim=1) & ~untrained
        self._refuse_rows(indices, empty & (not zeros), "features that are all zero")
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
        self._store(self._record.visits, lambda path: write_visits(path, visits))

    def write_function(self, function: Function) -> None:
        """Store what the network answers to a fixed input with the checkpoint's weights; the
        process of rank 0 alone calls it.

        Raises:
            StoreError: This checkpoint is sealed or closed, or the file cannot be written.
        """
        self._require_open("write_function")
        self.flush()
        self._store(self._record.function, lambda path: write_function(path, function))

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
            StoreError: A shard cannot be written, and no earlier call has raised it. The checkpoint
                is closed all the same.
        """
        self._open = False
        self._buffer = []
        self._jobs.end()

    def _store(self, name: str, fill: Callable[[Path], object]) -> None:
        self._records.commit(self._record, {name: self._records.write(name, fill)})

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
                f"CheckpointWriter.append(indices): {outside[:5].tolist()} lie outside the "
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
        # Rows of zeros, mostly those of samples that were not trained on, have the norm 1, for no
        # stored norm is 0.
        norm = wide.norm(dim=1).float()
        norm = torch.where((features == 0).all(dim=1), torch.ones_like(norm), norm)
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
        return listed(self._sample_ids[i] for i in indices.tolist())
