"""The traces of one checkpoint as they lie in its shards: block by block, column by column, or by
sample."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ctrak_lightning.store.arrays import corrupt, row_sums
from ctrak_lightning.store.schema import StoreHeader
from ctrak_lightning.store.shards import Rows, Shard, open_shard, read_index
from ctrak_lightning.utilities.processes import Processes

BLOCK_BYTES = 2**22
_AHEAD = 4
"""Blocks that exist at a time: on a busy machine either thread waits longer for its turn than a
block takes."""
_COLUMNS_BYTES = 2**26

T = TypeVar("T")


class StoredRows:
    """Reads the shards of a checkpoint; no handle is kept open and no more than a few blocks are
    held. A damaged shard, or shards that do not hold every sample once, raise a CorruptStoreError,
    the latter after the last of them.

    Args:
        root: folder of the store.
        folder: of the checkpoint, for errors.
        shards: paths of its shards relative to ``root``, in the order of capture.
        header: of the store.
        samples: size N of the sample table.
        rows: how many of the samples the shards hold; None if that is not known.
    """

    def __init__(
        self,
        root: Path,
        folder: str,
        shards: Sequence[str],
        header: StoreHeader,
        samples: int,
        *,
        rows: int | None,
    ) -> None:
        self._root, self._folder, self._names = root, folder, shards
        self._header, self._samples, self._rows = header, samples, rows

    def shards(self) -> Iterator[Shard]:
        """The shards in the order of capture, opened one at a time, with their features not read
        yet."""
        seen = torch.zeros(self._samples, dtype=torch.bool)
        for name in self._names:
            shard = self._open(name)
            self._note(seen, shard.columns["index"], self._root / name)
            yield shard
        self._require_all(seen)

    def blocks(self) -> Iterator[Rows]:
        """All rows, a few MiB at a time; the next blocks are read in a thread while the present one
        is used.

        The features of a block are overwritten once the one after it is asked for: clone what is to
        stay."""
        dtype = getattr(torch, self._header.dtype)
        rows = max(1, BLOCK_BYTES // (self._header.dim * dtype.itemsize))
        buffers = [torch.empty(rows * self._header.dim, dtype=dtype) for _ in range(_AHEAD)]

        def read() -> Iterator[Rows]:
            count = 0
            for shard in self.shards():
                for start in range(0, len(shard), rows):
                    yield shard.read(start, min(start + rows, len(shard)), buffers[count % _AHEAD])
                    count += 1

        return _ahead(read())

    def columns(self) -> Iterator[Tensor]:
        """The features, some columns of all samples at a time: float32 [N, c], in the order of the
        sample table.

        Every byte is read once."""
        k = self._header.dim
        # Whole words, so that the checksums of parts of a row add up to that of the row.
        width = max(8, _COLUMNS_BYTES // (4 * self._samples) // 8 * 8)
        shards = list(self.shards())
        sums = [np.zeros(len(shard), dtype=np.uint64) for shard in shards]
        for start in range(0, k, width):
            part = torch.empty(self._samples, min(width, k - start))
            for shard, so_far in zip(shards, sums, strict=True):
                unit = shard.array.read_columns(start, start + part.shape[1])
                so_far += row_sums(unit.numpy())
                part[shard.columns["index"]] = unit.float() * shard.magnitude()[:, None]
            yield part
        for shard, so_far in zip(shards, sums, strict=True):
            shard.array.check(0, so_far)

    def at(self, samples: Tensor) -> Rows:
        """The rows of ``samples``, positions in the sample table [n], in that order."""
        wanted, inverse = torch.unique(samples, return_inverse=True)
        shard_of, row_of = self._places
        parts = []
        # Only the shards that hold a wanted sample are opened.
        for number in torch.unique(shard_of[wanted]).tolist():
            rows = row_of[wanted[shard_of[wanted] == number]].long()
            parts.append(self._open(self._names[number]).pick(rows.sort().values))
        found = Rows.concatenate(parts)
        order = torch.argsort(found.index)
        if not torch.equal(found.index[order], wanted):
            raise corrupt(self._root / self._folder, "the shards do not hold every sample once")
        return found.take(order[inverse])

    def share(self, processes: Processes) -> StoredRows:
        """Those of every ``count``-th shard: what this process reads where all of them together
        read the whole checkpoint.

        That the shares hold every sample once is for the caller to see to.
        """
        if processes.count == 1:
            return self
        names = processes.share(self._names)
        return StoredRows(self._root, self._folder, names, self._header, self._samples, rows=None)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """In which shard, and in which of its rows, each sample is: int32 [N] both."""
        shard_of = torch.full((self._samples,), -1, dtype=torch.int32)
        row_of = torch.zeros(self._samples, dtype=torch.int32)
        seen = torch.zeros(self._samples, dtype=torch.bool)
        for number, name in enumerate(self._names):
            index = read_index(self._root / name, self._samples)
            self._note(seen, index, self._root / name)
            shard_of[index] = number
            row_of[index] = torch.arange(len(index), dtype=torch.int32)
        self._require_all(seen)
        return shard_of, row_of

    def _open(self, name: str) -> Shard:
        header = self._header
        return open_shard(
            self._root / name, dim=header.dim, dtype=header.dtype, samples=self._samples
        )

    def _note(self, seen: Tensor, index: Tensor, path: Path) -> None:
        inside = bool(((index >= 0) & (index < self._samples)).all())
        if not inside or bool(seen[index].any()) or len(torch.unique(index)) < len(index):
            raise corrupt(
                path,
                f"index names a sample twice, or one outside the {self._samples} samples of the "
                "store",
            )
        seen[index] = True

    def _require_all(self, seen: Tensor) -> None:
        if self._rows is not None and int(seen.sum()) != self._rows:
            raise corrupt(
                self._root / self._folder,
                f"{self._rows - int(seen.sum())} samples have no trace in the shards",
            )


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, made in a thread before they are asked for; no more than ``_AHEAD`` exist at
    a time."""
    end = object()

    def make() -> T | object:
        return next(items, end)

    thread = ThreadPoolExecutor(1, thread_name_prefix="ctrak-read")
    try:
        coming = deque(thread.submit(make) for _ in range(_AHEAD))
        while (item := coming.popleft().result()) is not end:
            yield item  # type: ignore[misc]
            coming.append(thread.submit(make))
    finally:
        thread.shutdown(cancel_futures=True)
