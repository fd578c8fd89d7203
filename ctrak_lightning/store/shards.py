"""One shard: consecutive traces of a checkpoint, as unit-norm rows and their norms. A damaged one,
or one of other shapes or with impossible values, raises a CorruptStoreError.

A new layout is made here: the store writes by :func:`write_shard` and reads by :func:`open_shard`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import torch
from torch import Tensor

from ctrak_lightning.store.arrays import (
    RowArray,
    corrupt,
    find_dataset,
    find_rows,
    open_for_reading,
    open_for_writing,
    read_array,
    write_array,
    write_rows,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Traces of n samples."""

    index: Tensor
    """Position of each sample in the sample table, int64 [n]."""
    unit: Tensor
    """Features divided by their norm and by ``scale``, [n, k], in the dtype of the store."""
    scale: Tensor
    """What a stored row is multiplied by to have unit norm, float32 [n]; 1 unless the store is
    int8."""
    norm: Tensor
    """Norm of the features, float32 [n]; 1 over a row of zeros, which a sample has that was not
    trained on yet."""
    loss: Tensor
    """Loss, float32 [n]."""

    def __len__(self) -> int:
        return self.index.shape[0]

    def features(self) -> Tensor:
        """The features as they were captured, up to the rounding of the store, float32 [n, k]."""
        return self.unit.float() * self.magnitude()[:, None]

    def magnitude(self) -> Tensor:
        """What the stored rows are multiplied by to have the scale of the features, float32 [n]."""
        return self.scale * self.norm

    def take(self, rows: Tensor) -> Rows:
        """The rows at positions ``rows`` [m], in that order."""
        return Rows(**{name: getattr(self, name)[rows] for name in _FIELDS})

    def split(self, n: int) -> tuple[Rows, Rows]:
        """The first ``n`` rows, and the others."""
        first = Rows(**{name: getattr(self, name)[:n] for name in _FIELDS})
        # Cloned, so that a few rows left over do not keep the whole batch in memory.
        return first, Rows(**{name: getattr(self, name)[n:].clone() for name in _FIELDS})

    @staticmethod
    def concatenate(parts: list[Rows]) -> Rows:
        """All rows of ``parts``, in order."""
        return Rows(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in _FIELDS}
        )


_FIELDS = ("index", "unit", "scale", "norm", "loss")


def write_shard(path: Path, rows: Rows) -> None:
    """Write ``rows`` to a new HDF5 file; equal rows give equal bytes."""
    with open_for_writing(path) as file:
        write_rows(file, "features", rows.unit)
        for name in ("scale", "norm", "loss", "index"):
            write_array(file, name, getattr(rows, name), chunk_rows=len(rows))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard whose columns were read and checked, and whose features have not been."""

    columns: dict[str, Tensor]
    """``index``, ``scale``, ``norm`` and ``loss``, each [n]."""
    array: RowArray

    def __len__(self) -> int:
        return self.array.shape[0]

    def read(self, start: int, stop: int, into: Tensor | None = None) -> Rows:
        """Rows ``start`` to ``stop``, their features in the memory of ``into`` if given; see
        :meth:`RowArray.read`."""
        columns = {name: values[start:stop] for name, values in self.columns.items()}
        return Rows(unit=self.array.read(start, stop, into), **columns)

    def pick(self, rows: Tensor) -> Rows:
        """The rows at ascending positions ``rows`` [m]; those that follow each other are read at
        once."""
        breaks = (rows.diff() != 1).nonzero().flatten() + 1
        runs = torch.tensor_split(rows, breaks)
        return Rows.concatenate([self.read(int(run[0]), int(run[-1]) + 1) for run in runs])

    def magnitude(self) -> Tensor:
        """As :meth:`Rows.magnitude`, of all rows."""
        return self.columns["scale"] * self.columns["norm"]


def open_shard(path: Path, *, dim: int, dtype: str, samples: int) -> Shard:
    """The shard at ``path``: rows of ``dim`` features, of a table of ``samples`` samples."""
    with open_for_reading(path) as file:
        n = _row_count(file, path, samples)
        columns = {
            name: read_array(file, path, name, (n,), "int64" if name == "index" else "float32")
            for name in ("index", "scale", "norm", "loss")
        }
        array = find_rows(file, path, "features", (n, dim), dtype)
    if int(columns["index"].min()) < 0 or int(columns["index"].max()) >= samples:
        raise corrupt(path, f"index has values outside the {samples} samples of the store")
    for name in ("norm", "scale"):
        # HDF5 reads a chunk that was never written as zeros, and the writer refuses zero rows.
        if not bool((columns[name].isfinite() & (columns[name] > 0)).all()):
            raise corrupt(path, f"{name} has values that are not positive and finite")
    return Shard(columns=columns, array=array)


def read_index(path: Path, max_rows: int) -> Tensor:
    """The positions of a shard's samples in the sample table, int64 [n], without its features."""
    with open_for_reading(path) as file:
        return read_array(file, path, "index", (_row_count(file, path, max_rows),), "int64")


def _row_count(file: h5py.File, path: Path, max_rows: int) -> int:
    shape = find_dataset(file, path, "index").shape
    if len(shape) != 1 or not 1 <= shape[0] <= max_rows:
        raise corrupt(path, f"index has shape {shape}, expected 1 to {max_rows} rows")
    return int(shape[0])
