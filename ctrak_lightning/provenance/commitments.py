"""One salted hash per sample: lets a chain speak of samples without naming them, and forget them without breaking."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ctrak_lightning.errors import StoreError
from ctrak_lightning.provenance.canonical import canonical
from ctrak_lightning.traces.arrays import open_for_reading, open_for_writing, read_array, write_array
from ctrak_lightning.traces.samples import SampleTable

_NAME = re.compile(r"commitments(-e[1-9][0-9]{0,8})?\.h5")
_BYTES = 32
_CHUNK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Commitments:
    """``hashes[i] = sha256(salts[i] + row i of the sample table)``, in the order of the sample table.

    A ledger keeps the hashes' :meth:`root`. With the salt, whoever has the row can show that it is the one that was recorded;
    without it the hash says nothing, not even to somebody who guesses the row. So forgetting a sample is deleting its salt.
    """

    salts: np.ndarray
    """Random bytes, uint8 [n, 32]."""
    hashes: np.ndarray
    """uint8 [n, 32]."""

    def __len__(self) -> int:
        return len(self.salts)

    def root(self) -> str:
        """sha256 (hex) over all hashes, in order."""
        return hashlib.sha256(self.hashes.tobytes()).hexdigest()

    def hexadecimal(self) -> list[str]:
        """The hashes, as text."""
        return [row.tobytes().hex() for row in self.hashes]

    def without(self, positions: Iterable[int]) -> Commitments:
        """Those of the other samples."""
        keep = np.ones(len(self), dtype=bool)
        keep[list(positions)] = False
        return Commitments(salts=self.salts[keep], hashes=self.hashes[keep])

    def differing(self, table: SampleTable) -> list[int]:
        """Positions of the samples of ``table``, which has as many, whose rows are not those that were committed to."""
        expected = _hashes(table, self.salts)
        return np.flatnonzero((expected != self.hashes).any(axis=1)).tolist()


def commit(table: SampleTable) -> Commitments:
    """Commitments to the rows of ``table``, with fresh salts."""
    salts = np.frombuffer(secrets.token_bytes(_BYTES * len(table)), dtype=np.uint8).reshape(-1, _BYTES)
    return Commitments(salts=salts, hashes=_hashes(table, salts))


def write_commitments(path: Path, commitments: Commitments) -> None:
    """Write ``commitments`` to a new HDF5 file."""
    with open_for_writing(path) as file:
        for name in ("salts", "hashes"):
            values = torch.from_numpy(getattr(commitments, name).copy())
            write_array(file, name, values, chunk_rows=_CHUNK_ROWS)


def read_commitments(path: Path, n: int) -> Commitments:
    """Read the commitments to n samples.

    Raises:
        CorruptStoreError: the file is damaged, or of another number of samples.
    """
    with open_for_reading(path) as file:
        salts, hashes = (
            read_array(file, path, name, (n, _BYTES), "uint8").numpy() for name in ("salts", "hashes")
        )
    return Commitments(salts=salts, hashes=hashes)


def is_commitments(name: str) -> bool:
    """Whether a file of this name, in the folder of the store, holds the commitments of some edition."""
    return _NAME.fullmatch(name) is not None


def named(table: SampleTable, positions: list[int], most: int = 5) -> str:
    """The ids of some samples, for a message."""
    shown = ", ".join(repr(table.sample_ids[i]) for i in positions[:most])
    return shown if len(positions) <= most else f"{shown} and {len(positions) - most} more"


def _hashes(table: SampleTable, salts: np.ndarray) -> np.ndarray:
    if len(table) != len(salts):
        raise StoreError(f"the sample table has {len(table)} samples and there are {len(salts)} commitments.")
    found = np.empty((len(table), _BYTES), dtype=np.uint8)
    for i in range(len(table)):
        content = hashlib.sha256(salts[i].tobytes() + _row(table, i)).digest()
        found[i] = np.frombuffer(content, dtype=np.uint8)
    return found


def _row(table: SampleTable, i: int) -> bytes:
    image = None if table.thumbnails is None else table.thumbnails[i].contiguous().numpy()
    thumbnail = None if image is None else hashlib.sha256(image.tobytes()).hexdigest()
    shape = None if image is None else list(image.shape)
    row = table.record(i) | {"thumbnail": thumbnail, "thumbnail_shape": shape}
    del row["index"]  # forgetting others moves a sample
    return canonical(row)
