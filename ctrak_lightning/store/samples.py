"""The table of the samples that a store describes."""

from __future__ import annotations

import hashlib
import operator
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shortened
from typing import Any
from urllib.parse import unquote

import h5py
import torch
from torch import Tensor

from ctrak_lightning.errors import DatasetChangedError, StoreError, listed
from ctrak_lightning.store.arrays import (
    corrupt,
    find_dataset,
    open_for_reading,
    open_for_writing,
    read_strings,
    write_array,
)

SAMPLE_FACTS = ("size", "sample_ids", "content")
"""What a store's header says of its sample table (:meth:`SampleTable.facts`)."""


@dataclass(frozen=True, eq=False)
class SampleTable:
    """The samples of a store; every other array refers to them by position.

    Args:
        sample_ids: One id per sample, each once: any text without NUL. Ids never become file names.
        content_sha256: Digest of each sample's content: shows that an image was replaced under its
            old id.
        metadata: Columns of text, such as owner, licence or caption, each with one value per
            sample.
        thumbnails: Small images for reports, uint8 [n, h, w, 3], or None.

    Raises:
        StoreError: No samples, an id twice, columns of different lengths, or text that cannot be
            stored.
    """

    sample_ids: list[str]
    content_sha256: list[str]
    metadata: dict[str, list[str]] = field(default_factory=dict)
    thumbnails: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.sample_ids:
            raise StoreError("SampleTable(sample_ids=[]): a store needs at least one sample.")
        columns = {"sample_ids": self.sample_ids, "content_sha256": self.content_sha256}
        columns |= {f"metadata[{name!r}]": column for name, column in self.metadata.items()}
        for name, column in columns.items():
            self._check_column(name, column)
        if repeated := [name for name, count in Counter(self.sample_ids).items() if count > 1]:
            raise StoreError(
                f"SampleTable: {len(repeated)} sample ids occur more than once: "
                f"{listed(repeated)}. HINT: give every sample an id of its own, such as its "
                "dataset index."
            )
        for name in self.metadata:
            if not isinstance(name, str) or not name:
                raise StoreError(
                    f"SampleTable: a metadata column is named {name!r}, expected a str that is not "
                    "empty."
                )
            _check_text(name, "the name of a metadata column")
        self._check_thumbnails()

    def __len__(self) -> int:
        return len(self.sample_ids)

    def fingerprint(self) -> str:
        """sha256 hex digest over the sample ids, in order."""
        # No id contains NUL, so ["ab", "c"] and ["a", "bc"] differ.
        return hashlib.sha256(
            "".join(f"{sample_id}\0" for sample_id in self.sample_ids).encode()
        ).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What a store's header says of its samples: how many, and the sha256 (hex) of their ids
        and of their content."""
        content = hashlib.sha256("".join(self.content_sha256).encode()).hexdigest()
        return dict(zip(SAMPLE_FACTS, (len(self), self.fingerprint(), content), strict=True))

    def take(self, positions: Sequence[int]) -> SampleTable:
        """The table of the samples at ``positions``, in that order."""
        return SampleTable(
            [self.sample_ids[i] for i in positions],
            [self.content_sha256[i] for i in positions],
            {name: [column[i] for i in positions] for name, column in self.metadata.items()},
            None if self.thumbnails is None else self.thumbnails[list(positions)],
        )

    def record(self, i: int) -> dict[str, Any]:
        """Sample ``i`` as ``{"index", "sample_id", "content_sha256", "metadata": {column:
        value}}``.

        Raises:
            IndexError: There is no sample ``i``.
        """
        i = operator.index(i)
        if not 0 <= i < len(self):
            raise IndexError(
                f"SampleTable.record({i}): the table has samples 0 to {len(self) - 1}."
            )
        return {
            "index": i,
            "sample_id": self.sample_ids[i],
            "content_sha256": self.content_sha256[i],
            "metadata": {name: column[i] for name, column in self.metadata.items()},
        }

    def metadata_of(self, i: int) -> dict[str, str]:
        """The metadata of the sample at position ``i``, by column."""
        return {column: values[i] for column, values in self.metadata.items()}

    def _check_column(self, name: str, column: Sequence[str]) -> None:
        if isinstance(column, str):
            raise StoreError(
                f"SampleTable: {name} is the str {column!r}, expected a list of str, one per "
                "sample."
            )
        if len(column) != len(self):
            raise StoreError(
                f"SampleTable: {name} has {len(column)} values for {len(self)} samples; give one "
                "per sample."
            )
        for position, value in enumerate(column):
            if not isinstance(value, str):
                raise StoreError(
                    f"SampleTable: {name}[{position}] is {value!r}, expected a str. HINT: convert "
                    "with str()."
                )
            _check_text(value, f"{name}[{position}]")

    def _check_thumbnails(self) -> None:
        images = self.thumbnails
        if images is None:
            return
        shape = tuple(images.shape)
        if (
            images.dtype != torch.uint8
            or len(shape) != 4
            or shape[0] != len(self)
            or shape[3] != 3
            or 0 in shape
        ):
            raise StoreError(
                f"SampleTable(thumbnails={images.dtype} {shape}): expected uint8 [{len(self)}, h, "
                "w, 3], one image per sample."
            )


def check_unchanged(stored: SampleTable, given: SampleTable, path: Path) -> None:
    """Compare ids, order and content of two tables; metadata and thumbnails may differ.

    Raises:
        DatasetChangedError: They differ; names up to five samples of each kind of change.
    """
    before = dict(zip(stored.sample_ids, stored.content_sha256, strict=True))
    now = dict(zip(given.sample_ids, given.content_sha256, strict=True))
    changes = {
        "added": [name for name in now if name not in before],
        "removed": [name for name in before if name not in now],
        "changed content": [name for name in now if name in before and now[name] != before[name]],
    }
    found = [f"{len(names)} {kind}: {listed(names)}" for kind, names in changes.items() if names]
    if not found and stored.sample_ids != given.sample_ids:
        found = ["the same samples in another order"]
    if found:
        raise DatasetChangedError(
            f"the samples differ from those that {path} describes ({'; '.join(found)}). "
            "HINT: restore the dataset as it was, or write the traces to a new folder."
        )


class ChangedMetadataWarning(UserWarning):
    """The metadata of the samples is not what the store recorded, and the store keeps that.

    Why: a record that changes its owners on resuming would be none.

    What to do: trace into a new folder, if the new metadata is the right one.
    """


def warn_of_changed_metadata(stored: SampleTable, given: SampleTable, path: Path) -> None:
    """Compare the metadata of two tables of the same samples in the same order.

    Warns:
        ChangedMetadataWarning: Columns were added, are gone or have other values; names them, with
            one sample of each.
    """
    changes = _changes(stored, given)
    if not changes:
        return
    more = f"; and {len(changes) - 5} more columns" if len(changes) > 5 else ""
    warnings.warn(
        f"{path}: the metadata of the samples is not what this store recorded "
        f"({'; '.join(changes[:5])}{more}). The store keeps what it recorded, and answers, "
        "shares and `ctrak forget` go by that. HINT: to have the metadata as it is now, trace "
        "into a new folder.",
        ChangedMetadataWarning,
        stacklevel=4,  # the caller of TraceWriter.write_samples
    )


def _changes(stored: SampleTable, given: SampleTable) -> list[str]:
    found = []
    for name in sorted(stored.metadata.keys() | given.metadata.keys()):
        if name not in stored.metadata:
            found.append(f"column {name!r} is new")
        elif name not in given.metadata:
            found.append(f"column {name!r} is not given any more")
        elif other := [
            i for i, value in enumerate(stored.metadata[name]) if value != given.metadata[name][i]
        ]:
            i = other[0]
            found.append(
                f"column {name!r} differs for {len(other)} of {len(stored)} samples, such as "
                f"{stored.sample_ids[i]!r}: recorded {shortened(stored.metadata[name][i])}, now "
                f"{shortened(given.metadata[name][i])}"
            )
    return found


def write_samples(path: Path, table: SampleTable) -> None:
    """Write ``table`` to a new HDF5 file; equal tables give equal bytes."""
    with open_for_writing(path) as file:
        _write_strings(file, "sample_id", table.sample_ids)
        _write_strings(file, "content_sha256", table.content_sha256)
        group = file.create_group("metadata")
        for name in sorted(table.metadata):
            _write_strings(group, _escape(name), table.metadata[name])
        if table.thumbnails is not None:
            write_array(file, "thumbnails", table.thumbnails, chunk_rows=1)


def read_samples(path: Path, positions: Sequence[int] | None = None) -> SampleTable:
    """Read a sample table, or the samples at some ascending ``positions``; metadata columns come
    sorted by name.

    Raises:
        CorruptStoreError: The file is damaged.
    """
    rows = ... if positions is None else list(positions)
    with open_for_reading(path) as file:
        n = _count(file, path)
        ids = read_strings(file, path, "sample_id", n, rows)
        group = _metadata(file, path)
        columns = {unquote(name): read_strings(group, path, name, n, rows) for name in group}
        content = read_strings(file, path, "content_sha256", n, rows)
        thumbnails = _read_thumbnails(file, path, n, rows) if "thumbnails" in file else None
    try:
        return SampleTable(ids, content, columns, thumbnails)
    except StoreError as error:
        raise corrupt(path, str(error)) from error


def column_names(path: Path) -> list[str]:
    """Names of the metadata columns of the table at ``path``, sorted, without reading them."""
    with open_for_reading(path) as file:
        return sorted(unquote(name) for name in _metadata(file, path))


def count_samples(path: Path) -> int:
    """Number of samples in the table at ``path``, without reading it."""
    with open_for_reading(path) as file:
        return _count(file, path)


def _count(file: h5py.File, path: Path) -> int:
    shape = find_dataset(file, path, "sample_id").shape
    if len(shape) != 1:
        raise corrupt(path, f"sample_id has shape {shape}, expected one dimension")
    return int(shape[0])


def _metadata(file: h5py.File, path: Path) -> h5py.Group:
    group = (
        file["metadata"] if isinstance(file.get("metadata", getlink=True), h5py.HardLink) else None
    )
    if not isinstance(group, h5py.Group):
        raise corrupt(path, "metadata is not a group in this file")
    return group


def _write_strings(group: h5py.Group, name: str, values: list[str]) -> None:
    group.create_dataset(name, data=values, dtype=h5py.string_dtype("utf-8"), track_times=False)


def _read_thumbnails(file: h5py.File, path: Path, n: int, rows: Any) -> Tensor:
    images = find_dataset(file, path, "thumbnails")
    if len(images.shape) != 4 or images.shape[0] != n or images.dtype != "uint8":
        raise corrupt(
            path, f"thumbnails is {images.dtype} {images.shape}, expected uint8 [{n}, h, w, 3]"
        )
    return torch.from_numpy(images[rows])


def _escape(name: str) -> str:
    """HDF5 takes "/" for a path separator and "." for the group itself; ``unquote`` undoes this."""
    escaped = name.replace("%", "%25").replace("/", "%2F")
    return "%2E" if escaped == "." else escaped


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StoreError(
            f"SampleTable: {where} is {text!r}, which is not valid Unicode ({error.reason})."
        ) from error
    if "\0" in text:
        raise StoreError(
            f"SampleTable: {where} is {text!r}; HDF5 strings end at NUL, so remove that character."
        )
