"""Rows of features in an HDF5 file, laid out so that they are read at the speed of the disk and
still checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from ctrak_lightning.traces.arrays import corrupt, find_dataset, read_array, write_array
from ctrak_lightning.traces.files import reading

CHECKSUMS = "checksum"


def write_rows(group: h5py.Group, name: str, values: Tensor) -> None:
    """Write ``values`` [n, k] as one run of bytes, and the checksum of each row.

    Neither chunks nor Fletcher-32: through them h5py 3.16 reads int8 rows of 4,096 from memory at
    2.1 GB/s (chunks alone: 4.8), the plain run of bytes at 10; the checksum of :func:`row_sums`
    costs 1/60 ns a byte.
    """
    array = values.detach().cpu().contiguous().numpy()
    group.create_dataset(name, data=array, track_times=False)
    sums = torch.from_numpy(row_sums(array).view(np.int64))
    write_array(group, CHECKSUMS, sums, chunk_rows=len(sums))


def row_sums(rows: np.ndarray) -> np.ndarray:
    """Sum of each row's 64-bit words (its last bytes one by one), modulo 2**64, as uint64 [n].

    It finds every flipped bit and rows that were never written (a stored row is not zero). Two
    errors that cancel pass it; ``TraceStore.verify`` compares sha256.
    """
    raw = rows.view(np.uint8).reshape(len(rows), -1)
    words = raw.shape[1] // 8 * 8
    sums: np.ndarray = raw[:, words:].sum(1, dtype=np.uint64)
    if words:
        sums += raw[:, :words].view(np.uint64).sum(1)
    return sums


@dataclass(frozen=True, kw_only=True)
class RowArray:
    """Where the rows stand in their file; no handle is kept open."""

    path: Path
    offset: int
    shape: tuple[int, int]
    dtype: np.dtype[np.generic]
    sums: np.ndarray

    def read(self, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` [stop - start, k], in the dtype of the store.

        Args:
            into: where to put them, one-dimensional and at least as long; a new tensor by default.

        Raises:
            CorruptStoreError: The rows cannot be read, or are not those that were written.
        """
        k = self.shape[1]
        values = (
            np.empty((stop - start) * k, self.dtype)
            if into is None
            else into.numpy()[: (stop - start) * k]
        )
        start_byte = self.offset + start * k * self.dtype.itemsize
        try:
            with reading(self.path) as file:
                file.seek(start_byte)
                rest = values.view(np.uint8).data
                while len(rest):
                    got = file.readinto(rest)
                    if not got:
                        raise corrupt(
                            self.path, f"ends {len(rest)} bytes before the rows that it should hold"
                        )
                    rest = rest[got:]
        except OSError as error:
            raise corrupt(self.path, f"cannot be read ({error})") from error
        rows = values.reshape(-1, k)
        self.check(start, row_sums(rows))
        return torch.from_numpy(rows)

    def read_columns(self, start: int, stop: int) -> Tensor:
        """Columns ``start`` to ``stop`` of all rows, [n, stop - start]; their sums are for the
        caller to :meth:`check`.

        Raises:
            CorruptStoreError: They cannot be read.
        """
        try:
            with reading(self.path) as file:
                mapped = np.memmap(file, self.dtype, "r", self.offset, self.shape)
            return torch.from_numpy(np.array(mapped[:, start:stop]))
        except (OSError, ValueError) as error:
            raise corrupt(self.path, f"cannot be read ({error})") from error

    def check(self, start: int, sums: np.ndarray) -> None:
        """Compare the :func:`row_sums` of the rows from ``start`` on with those that were stored.

        Raises:
            CorruptStoreError: They differ.
        """
        if bad := np.flatnonzero(sums != self.sums[start : start + len(sums)]).tolist():
            raise corrupt(
                self.path,
                f"features of row {start + bad[0]} are not those that were written (checksum)",
            )


def find_rows(
    file: h5py.File, path: Path, name: str, shape: tuple[int, int], dtype: str
) -> RowArray:
    """The rows that :func:`write_rows` wrote, of this shape and dtype and no other.

    Raises:
        CorruptStoreError: They are something else.
    """
    dataset = find_dataset(file, path, name)
    if dataset.shape != shape or dataset.dtype != np.dtype(dtype):
        raise corrupt(path, f"{name} is {dataset.dtype} {dataset.shape}, expected {dtype} {shape}")
    offset = dataset.id.get_offset()
    if dataset.chunks is not None or offset is None:
        raise corrupt(path, f"{name} is not one run of bytes, or was never written")
    sums = read_array(file, path, CHECKSUMS, shape[:1], "int64").numpy().view(np.uint64)
    return RowArray(path=path, offset=int(offset), shape=shape, dtype=np.dtype(dtype), sums=sums)
