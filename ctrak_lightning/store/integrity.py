"""A store held against its hashes, and its files written anew."""

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ctrak_lightning.store.files import FileRecord, sha256_of, write_atomically
from ctrak_lightning.store.kernel import Kernel, gram_of_rows, kernel_of_columns, write_kernel
from ctrak_lightning.store.records import recorded_files
from ctrak_lightning.store.samples import SampleTable, write_samples
from ctrak_lightning.store.schema import (
    COMMITMENTS,
    LEDGER,
    LEDGER_LOCK,
    LEDGER_SIGNATURE,
    MANIFEST,
    WRITER_LOCK,
    CheckpointRecord,
    Manifest,
    StoreHeader,
    edition_name,
)
from ctrak_lightning.store.sections import (
    Visits,
    read_exposures,
    read_visits,
    write_exposures,
    write_visits,
)
from ctrak_lightning.store.shards import write_shard
from ctrak_lightning.store.stored_rows import StoredRows


def altered_files(root: Path, manifest: Manifest) -> list[str]:
    """One line per recorded file that is missing or does not have the recorded content."""
    problems = []
    for name, known in sorted(manifest.files.items()):
        try:
            found = sha256_of(root / name)
        except OSError as error:
            problems.append(f"{name}: cannot be read ({error})")
            continue
        if found != known.sha256:
            problems.append(f"{name}: sha256 is {found}, the manifest records {known.sha256}")
    return problems


def unrecorded_files(root: Path, manifest: Manifest) -> list[str]:
    """One line per file that is in no record, and per link, be it to a folder."""
    ledger = {LEDGER, LEDGER_LOCK, LEDGER_SIGNATURE, edition_name(COMMITMENTS, manifest.edition)}
    recorded = {MANIFEST, WRITER_LOCK, *ledger, *recorded_files(root, manifest)}
    present = [
        entry for entry in sorted(root.rglob("*")) if entry.is_symlink() or not entry.is_dir()
    ]
    problems = []
    for entry in present:
        name = entry.relative_to(root).as_posix()
        if entry.is_symlink() and name not in manifest.files:  # those are in altered_files
            problems.append(
                f"{name}: is a link, and nothing of a store is read or written through one"
            )
        elif name not in recorded:
            problems.append(f"{name}: not recorded in the manifest")
    return problems


_EDITION = re.compile(r"-e[0-9]+(?=\.h5$)")


def rewrite_without(
    root: Path, manifest: Manifest, table: SampleTable, gone: Collection[int]
) -> Manifest:
    """Write the next edition of a store's files, under names of their own, without the samples at
    positions ``gone`` of its ``table``, of which at least one stays.

    Nothing that is there is touched, and the manifest that is returned is not written: until it is,
    the files are in no record. Checkpoints that are not sealed are left out. The rows that stay are
    copied as they are stored. Kernels are made anew from them rather than down-dated: the stored
    eigenvectors are float32, whose rounding a down-date would keep and add to, and fewer samples
    than features are decomposed on the other side.

    Raises:
        StoreError: a file cannot be written.
        CorruptStoreError: a shard is damaged.
    """
    edition = manifest.edition + 1
    stays = torch.ones(len(table), dtype=torch.bool)
    stays[list(gone)] = False
    remaining = table.take(stays.nonzero().flatten().tolist())
    before = manifest.header.dataset
    facts = {name: value for name, value in remaining.facts().items() if name in before}
    header = replace(manifest.header, dataset=before | facts)
    after = Manifest(header=header, run_id=manifest.run_id, edition=edition)
    known = write_atomically(root / after.samples, lambda path: write_samples(path, remaining))
    after = after.with_files({after.samples: known})
    for record in manifest.checkpoints:
        if record.sealed:
            written, files = _rewrite_checkpoint(root, manifest, record, stays, edition)
            after = after.with_checkpoint(written).with_files(files)
    return after


def kernel_of(stored: StoredRows, n: int, k: int) -> Kernel:
    """The kernel of n stored traces of k features, from their shards."""
    if k > n:
        return kernel_of_columns(stored.columns(), n, k)
    return gram_of_rows((rows.features() for rows in stored.blocks()), k).kernel()


def _rewrite_checkpoint(
    root: Path, manifest: Manifest, record: CheckpointRecord, stays: Tensor, edition: int
) -> tuple[CheckpointRecord, dict[str, FileRecord]]:
    n = int(stays.sum())
    files = _rewrite_shards(root, manifest.header, record, stays, edition)
    written = replace(record, rows=n, shards=tuple(files), edition=edition)

    def put(name: str, fill: Callable[[Path], object]) -> None:
        files[name] = write_atomically(root / name, fill)

    stored = StoredRows(root, record.folder, written.shards, manifest.header, n, rows=n)
    put(written.kernel, partial(write_kernel, kernel=kernel_of(stored, n, manifest.header.dim)))
    if record.visits in manifest.files:
        visits = _visits_of(read_visits(root / record.visits, len(stays)), stays)
        put(written.visits, partial(write_visits, visits=visits))
    if record.exposures in manifest.files:
        exposures = read_exposures(root / record.exposures, len(stays))[stays]
        put(written.exposures, partial(write_exposures, counts=exposures))
    # A companion that has the same name in every edition has nothing of the samples in it: weights,
    # buffers, outputs.
    kept = record.companions & written.companions & manifest.files.keys()
    return written, files | {name: manifest.files[name] for name in sorted(kept)}


def _rewrite_shards(
    root: Path, header: StoreHeader, record: CheckpointRecord, stays: Tensor, edition: int
) -> dict[str, FileRecord]:
    """The shards that have rows left, by their new names."""
    moved = stays.long().cumsum(0) - 1
    stored = StoredRows(root, record.folder, record.shards, header, len(stays), rows=len(stays))
    written = {}
    for name, shard in zip(record.shards, stored.shards(), strict=True):
        rows = shard.read(0, len(shard))
        rows = rows.take(stays[rows.index].nonzero().flatten())
        if len(rows):
            rows = replace(rows, index=moved[rows.index])
            path = edition_name(_EDITION.sub("", name), edition)
            written[path] = write_atomically(root / path, partial(write_shard, rows=rows))
    return written


def _visits_of(visits: Visits, stays: Tensor) -> Visits:
    rows = torch.repeat_interleave(stays, visits.counts)
    return Visits(
        counts=visits.counts[stays], timesteps=visits.timesteps[rows], steps=visits.steps[rows]
    )
