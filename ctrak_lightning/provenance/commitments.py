"""Salted hashes: let a chain speak of samples and of files of samples without naming them, and
forget them without breaking."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from ctrak_lightning.errors import StoreError
from ctrak_lightning.provenance.ledger import canonical
from ctrak_lightning.store.arrays import (
    open_for_reading,
    open_for_writing,
    read_array,
    write_array,
)
from ctrak_lightning.store.samples import SampleTable
from ctrak_lightning.store.schema import COMMITMENTS, edition_name

_NAME = re.compile(r"commitments(-e[1-9][0-9]{0,8})?\.h5")
_BYTES = 32
_CHUNK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Commitments:
    """``hashes[i] = sha256(salts[i] + row i of the sample table)``, in the order of the sample
    table.

    A ledger keeps the hashes' :meth:`root`. With the salt, whoever has the row can show that it is
    the one that was recorded; without it the hash says nothing, not even to somebody who guesses
    the row. So forgetting a sample is deleting its salt.

    The edition has a salt of its own, which goes into whatever else the ledger keeps of its samples
    (:func:`salted`): a file of all rows but one, and a guess of that one, would otherwise give the
    hash of the file as it was.
    """

    salts: np.ndarray
    """Random bytes, uint8 [n, 32]."""
    hashes: np.ndarray
    """uint8 [n, 32]."""
    salt: bytes
    """Of the edition: 32 random bytes; empty where an earlier version made the edition, which
    salted no more than rows."""

    def __len__(self) -> int:
        return len(self.salts)

    def root(self) -> str:
        """sha256 (hex) over all hashes, in order."""
        return hashlib.sha256(self.hashes.tobytes()).hexdigest()

    def hexadecimal(self) -> list[str]:
        """The hashes, as text."""
        return [row.tobytes().hex() for row in self.hashes]

    def without(self, positions: Iterable[int]) -> Commitments:
        """Those of the other samples, as an edition of their own."""
        keep = np.ones(len(self), dtype=bool)
        keep[list(positions)] = False
        return Commitments(
            salts=self.salts[keep], hashes=self.hashes[keep], salt=secrets.token_bytes(_BYTES)
        )

    def differing(self, table: SampleTable) -> list[int]:
        """Positions of the samples of ``table``, which has as many, whose rows are not those that
        were committed to."""
        expected = _hashes(table, self.salts)
        return np.flatnonzero((expected != self.hashes).any(axis=1)).tolist()


def commit(table: SampleTable) -> Commitments:
    """Commitments to the rows of ``table``, with fresh salts."""
    salts = np.frombuffer(secrets.token_bytes(_BYTES * len(table)), dtype=np.uint8).reshape(
        -1, _BYTES
    )
    return Commitments(salts=salts, hashes=_hashes(table, salts), salt=secrets.token_bytes(_BYTES))


def salted(sha256: str, salt: bytes) -> str:
    """What a ledger keeps of the digest (hex) of samples, or of a file with samples: ``sha256(salt
    + digest)``, hex. Without salt, in an edition that an earlier version made, the digest itself.

    Example:
        >>> salted("ab" * 32, b"")[:8], salted("ab" * 32, bytes(32))[:8]
        ('abababab', 'debb3e7a')
    """
    return hashlib.sha256(salt + bytes.fromhex(sha256)).hexdigest() if salt else sha256


def write_commitments(path: Path, commitments: Commitments) -> None:
    """Write ``commitments`` to a new HDF5 file."""
    with open_for_writing(path) as file:
        for name in ("salts", "hashes"):
            values = torch.from_numpy(getattr(commitments, name).copy())
            write_array(file, name, values, chunk_rows=_CHUNK_ROWS)
        if commitments.salt:
            write_array(
                file, "salt", torch.frombuffer(bytearray(commitments.salt), dtype=torch.uint8)
            )


def read_commitments(path: Path, n: int) -> Commitments:
    """Read the commitments to n samples."""
    with open_for_reading(path) as file:
        salts, hashes = (
            read_array(file, path, name, (n, _BYTES), "uint8").numpy()
            for name in ("salts", "hashes")
        )
        salt = _salt(file, path)
    return Commitments(salts=salts, hashes=hashes, salt=salt)


def edition_salt(root: Path, edition: int) -> bytes:
    """The salt of an edition of the store at ``root``."""
    path = root / edition_name(COMMITMENTS, edition)
    with open_for_reading(path) as file:
        return _salt(file, path)


def is_commitments(name: str) -> bool:
    """Whether a file of this name, in the folder of the store, holds the commitments of some
    edition."""
    return _NAME.fullmatch(name) is not None


def _salt(file: h5py.File, path: Path) -> bytes:
    if "salt" not in file:
        return b""
    return read_array(file, path, "salt", (_BYTES,), "uint8").numpy().tobytes()


def _hashes(table: SampleTable, salts: np.ndarray) -> np.ndarray:
    if len(table) != len(salts):
        raise StoreError(
            f"the sample table has {len(table)} samples and there are {len(salts)} commitments."
        )
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
