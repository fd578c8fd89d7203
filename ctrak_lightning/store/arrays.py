"""Rows of features in an HDF5 file, laid out so that they are read at the speed of the disk and
still checked. Whatever is not what was written raises a CorruptStoreError."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ctrak_lightning.errors import CorruptStoreError, StoreError
from ctrak_lightning.store.files import FileRecord, reading, sha256_of

CHUNK_ROWS = 64
_POINTER = np.dtype([("length", "<u4"), ("heap", "<u8"), ("object", "<u4")])
"""How HDF5 stores a text of its own length (format specification, III.C, "Variable-length"): where
it is in a global heap."""


def write_array(group: h5py.Group, name: str, values: Tensor, chunk_rows: int = CHUNK_ROWS) -> None:
    """Write ``values`` [n, ...] in row chunks, each with a Fletcher-32 checksum.

    No compression: projected gradients are noise to gzip (ratio 0.87, at 26 MB/s).
    """
    array = values.detach().cpu().numpy()
    chunks = (min(chunk_rows, array.shape[0]), *array.shape[1:])
    # Times would make the bytes of an interrupted and continued store differ from an uninterrupted
    # one's.
    group.create_dataset(name, data=array, chunks=chunks, fletcher32=True, track_times=False)


@contextmanager
def open_for_writing(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file that is built in memory and written to ``path`` on leaving.

    HDF5 that meets a full disk while it writes cannot close its file any more and takes the whole
    process down (observed with HDF5 2.0: a segmentation fault when the file is released); a plain
    write fails with an OSError.
    """
    with h5py.File(path, "w", driver="core", backing_store=False) as file:
        yield file
        file.flush()
        image = file.id.get_file_image()
    path.write_bytes(image)


@contextmanager
def open_for_reading(path: Path) -> Iterator[h5py.File]:
    """The HDF5 file at ``path``, closed on leaving; what HDF5 raises becomes a
    :class:`CorruptStoreError`."""
    try:
        # From the opened file, which is no link; HDF5 would open its path again, and lock it, which
        # fails on many network and read-only filesystems, where sealed files never change.
        with reading(path) as opened, h5py.File(opened, "r") as file:
            yield file
    except StoreError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise corrupt(path, f"HDF5 reports: {error}") from error


def read_array(
    file: h5py.File, path: Path, name: str, shape: tuple[int, ...], dtype: str
) -> Tensor:
    """Read one dataset, refusing any other shape or dtype before memory is allocated for it."""
    dataset = find_dataset(file, path, name)
    if dataset.shape != shape or dataset.dtype != np.dtype(dtype):
        raise corrupt(path, f"{name} is {dataset.dtype} {dataset.shape}, expected {dtype} {shape}")
    values = np.empty(shape, dtype=dtype)
    dataset.read_direct(values)
    return torch.from_numpy(values)


def read_strings(group: h5py.Group, path: Path, name: str, n: int, rows: Any = ...) -> list[str]:
    """Read n texts, or the ``rows`` of them, refusing any other shape, and texts whose sum is
    longer than the file."""
    dataset = find_dataset(group, path, name)
    info = h5py.check_string_dtype(dataset.dtype)
    if dataset.shape != (n,) or info is None or info.length is not None:
        raise corrupt(path, f"{name} is {dataset.dtype} {dataset.shape}, expected texts ({n},)")
    _check_lengths(dataset, path, name)
    values: list[str] = dataset.asstr()[rows].tolist()
    return values


def _check_lengths(dataset: h5py.Dataset, path: Path, name: str) -> None:
    """Many texts may point to the same long one: a small file that asks for much memory."""
    offset, size = dataset.id.get_offset(), dataset.shape[0] * _POINTER.itemsize
    if dataset.chunks is not None or offset is None or dataset.id.get_storage_size() != size:
        raise corrupt(path, f"{name} is not one run of texts, or was never written")
    with reading(path) as file:
        file.seek(offset)
        pointers = np.frombuffer(file.read(size), _POINTER)
    if int(pointers["length"].sum(dtype=np.int64)) > path.lstat().st_size:
        raise corrupt(path, f"the texts of {name} are longer than the file")


def find_dataset(group: h5py.Group, path: Path, name: str) -> h5py.Dataset:
    """The dataset ``name``, which must have its values in this very file.

    Links and virtual datasets whose source is missing read as zeros without a word, and so do parts
    that were never written, however large: nothing is stored compressed, so no dataset is larger
    than its file.
    """
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise corrupt(path, f"{name} is missing or a link to another file")
    dataset = group[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise corrupt(path, f"{name} is not a dataset with its values in this file")
    if dataset.shape is None or _stored_bytes(dataset) > path.lstat().st_size:
        raise corrupt(path, f"{name} has shape {dataset.shape}, which is more than the file holds")
    return dataset


def _stored_bytes(dataset: h5py.Dataset) -> int:
    # Not dataset.size, which overflows.
    return int(math.prod(dataset.shape) * dataset.id.get_type().get_size())


def check_digest(path: Path, known: FileRecord) -> None:
    """Compare the content of ``path`` with the manifest, for formats that carry no checksum of
    their own."""
    try:
        found = sha256_of(path)
    except OSError as error:
        raise corrupt(path, f"cannot be read ({error})") from error
    if found != known.sha256:
        raise corrupt(path, f"sha256 is {found}, the manifest records {known.sha256}")


def corrupt(path: Path, problem: str) -> CorruptStoreError:
    """The error to raise for a damaged ``path``."""
    return CorruptStoreError(
        f"{path}: {problem}. HINT: the file was damaged or replaced after it was sealed; restore "
        "it from a copy or capture again (TraceStore(...).verify() lists every damaged file)."
    )


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
        """Rows ``start`` to ``stop`` [stop - start, k], in the dtype of the store; in the memory of
        ``into`` if given, one-dimensional and at least as long."""
        k = self.shape[1]
        size = (stop - start) * k
        values = np.empty(size, self.dtype) if into is None else into.numpy()[:size]
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
        caller to :meth:`check`."""
        try:
            with reading(self.path) as file:
                mapped = np.memmap(file, self.dtype, "r", self.offset, self.shape)
            return torch.from_numpy(np.array(mapped[:, start:stop]))
        except (OSError, ValueError) as error:
            raise corrupt(self.path, f"cannot be read ({error})") from error

    def check(self, start: int, sums: np.ndarray) -> None:
        """Compare the :func:`row_sums` of the rows from ``start`` on with the stored ones."""
        if bad := np.flatnonzero(sums != self.sums[start : start + len(sums)]).tolist():
            raise corrupt(
                self.path,
                f"features of row {start + bad[0]} are not those that were written (checksum)",
            )


def find_rows(
    file: h5py.File, path: Path, name: str, shape: tuple[int, int], dtype: str
) -> RowArray:
    """The rows that :func:`write_rows` wrote, of this shape and dtype and no other."""
    dataset = find_dataset(file, path, name)
    if dataset.shape != shape or dataset.dtype != np.dtype(dtype):
        raise corrupt(path, f"{name} is {dataset.dtype} {dataset.shape}, expected {dtype} {shape}")
    offset = dataset.id.get_offset()
    if dataset.chunks is not None or offset is None:
        raise corrupt(path, f"{name} is not one run of bytes, or was never written")
    sums = read_array(file, path, CHECKSUMS, shape[:1], "int64").numpy().view(np.uint64)
    return RowArray(path=path, offset=int(offset), shape=shape, dtype=np.dtype(dtype), sums=sums)
