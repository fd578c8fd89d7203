"""Arrays in HDF5 files: deterministic bytes when written, checked shapes when read, no handle kept
open."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ctrak_lightning.errors import CorruptStoreError, StoreError
from ctrak_lightning.traces.atomic import FileRecord, sha256_of
from ctrak_lightning.traces.files import reading

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
    """Read n texts, or the ``rows`` of them, refusing any other shape, and texts that are longer
    than the file together."""
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
        raise corrupt(path, f"the texts of {name} are longer together than the file")


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
