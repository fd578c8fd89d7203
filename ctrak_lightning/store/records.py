"""What is recorded of a store: in its manifest, and, while several processes capture a checkpoint,
in their journals."""

import os
import re
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ctrak_lightning.errors import DatasetChangedError, StoreError, StoreMismatchError
from ctrak_lightning.store.files import (
    TEMPORARY_SUFFIX,
    FileRecord,
    is_checkpoint_folder,
    is_there,
    make_folder,
    write_atomically,
)
from ctrak_lightning.store.lock import WriterLock
from ctrak_lightning.store.manifest import (
    check_sizes,
    is_sample_table,
    manifest_text,
    parse_manifest,
    read_manifest,
    read_text,
    write_manifest,
)
from ctrak_lightning.store.schema import (
    COMMITMENTS,
    MANIFEST,
    CheckpointRecord,
    Manifest,
    StoreHeader,
    edition_name,
)
from ctrak_lightning.utilities.processes import Processes

_JOURNAL_PATTERN = re.compile(r"rank[0-9]{1,9}\.json")


class Records:
    """The record of the store at ``root``, which the processes of a capture share.

    The process of rank 0 writes the manifest. What another has written of the checkpoint in
    progress stands in a journal of its own, which is a manifest of that checkpoint alone, until the
    checkpoint is sealed. All processes call the constructor, :meth:`share`, :meth:`join` and
    :meth:`seal`, at the same time.

    Raises:
        StoreMismatchError, DatasetChangedError, StoreError, CorruptStoreError: as of
        :class:`TraceWriter`.
    """

    def __init__(
        self,
        root: Path,
        lock: WriterLock,
        header: StoreHeader,
        run_id: str | None,
        processes: Processes,
    ) -> None:
        self.root = root
        self._lock = lock
        self._processes = processes
        self._text: str | None = None
        self._seen: tuple[int, ...] | None = None
        self._journal: Manifest | None = None
        opened: Manifest | None = None
        with processes.sharing_errors():
            if processes.is_first:
                opened = self._open(header, run_id)
        self.manifest: Manifest = processes.from_first(opened)  # type: ignore[assignment]
        """The same in all processes since they last met."""
        with processes.sharing_errors():
            _check_header(self.manifest, header, root)
            if processes.is_first:
                # Written even where nothing changes: an unwritable folder shows now, not hours into
                # training.
                self.save(self.manifest)
                self.remove_unrecorded()

    def save(self, manifest: Manifest) -> None:
        """Replace the manifest; for the process of rank 0.

        Raises:
            StoreError: It is not the one that was read or written last: another process has changed
                the store, or removed it; or this writer was closed.
        """
        self._lock.require()
        self._require_unchanged()
        write_manifest(self.root, manifest)
        self._text, self._seen = manifest_text(manifest), None
        self.manifest = manifest

    def write(self, name: str, fill: Callable[[Path], object]) -> FileRecord:
        """Write the file ``name`` of the store, as :func:`write_atomically`; :meth:`commit` and
        :meth:`seal` record it.

        Names are fixed, so whoever lost the store would replace the files of the run that has it
        now. All is checked before anything is written, and again before the file gets its name, as
        filling it may take minutes.

        Raises:
            StoreLockedError: the lock of this run was removed or replaced.
            StoreError: as of :meth:`save`, the file is part of what is sealed, or it cannot be
                written.
        """
        self._require_writable(name)
        path = self.root / name
        # Or the store's own folder would be made durable again with every file.
        if not path.parent.is_dir():
            make_folder(path.parent)

        def fill_and_check(temporary: Path) -> None:
            fill(temporary)
            try:
                self._require_writable(name)
            except StoreError:
                temporary.unlink(missing_ok=True)
                raise

        return write_atomically(path, fill_and_check)

    def _require_writable(self, name: str) -> None:
        self._lock.require()
        manifest = self.manifest if self._processes.is_first else None
        path = self.root / MANIFEST
        if manifest is not None:
            self._require_unchanged()
        elif is_there(self.root / name):
            # Only the first process's manifest is up to date; what this file belongs to is read.
            manifest = parse_manifest(read_text(path), str(path))
        if manifest is not None and _is_sealed(manifest, name):
            raise StoreError(
                f"{self.root / name} is part of what this store has sealed, and is not written "
                "over. Nothing was changed. HINT: trace into a new folder."
            )

    def _require_unchanged(self) -> None:
        """Of the manifest; of the process of rank 0."""
        path = self.root / MANIFEST
        now = _signature(path)
        if now is not None and now == self._seen:
            return
        if (found := _text_of(path)) != self._text:
            raise StoreError(_changed(path, found, self.manifest))
        self._seen = now

    def share(self) -> None:
        """Make the first process's manifest that of all."""
        self.manifest = self._processes.from_first(self.manifest)

    def begin(self, record: CheckpointRecord) -> CheckpointRecord:
        """What this process has captured of the checkpoint ``record``, which the manifest has."""
        self._lock.require()
        if self._processes.is_first:
            return record
        name = _journal(record, self._processes.rank)
        mine = replace(record, rows=0, shards=())
        self._journal = replace(
            self.manifest,
            files={self.manifest.samples: self.manifest.files[self.manifest.samples]},
            checkpoints=(mine,),
        )
        if (self.root / name).exists():
            self._journal = read_manifest(self.root, name)
        return self._journal.checkpoints[0]

    def commit(self, record: CheckpointRecord, files: dict[str, FileRecord]) -> None:
        """Note what this process has written of a checkpoint."""
        if self._processes.is_first:
            self.save(self.manifest.with_checkpoint(record).with_files(files))
        else:
            assert self._journal is not None
            journal = self._journal.with_checkpoint(record).with_files(files)
            self._lock.require()
            write_manifest(self.root, journal, _journal(record, self._processes.rank))
            self._journal = journal

    def restart(self, record: CheckpointRecord, files: dict[str, FileRecord]) -> None:
        """Begin a checkpoint anew, without what was captured of it before; for the process of rank
        0."""
        self.save(self.manifest.without_steps([record.step]))
        for name in _journals(self.root, record):
            (self.root / name).unlink()
        self.commit(record, files)
        self.remove_unrecorded()

    def join(self, record: CheckpointRecord) -> tuple[CheckpointRecord, dict[str, FileRecord]]:
        """The checkpoint and the shards of all processes, by rank, from what each has of it."""
        known = self.manifest if self._journal is None else self._journal
        each = self._processes.gather((record, {name: known.files[name] for name in record.shards}))
        whole = replace(
            record,
            rows=sum(one.rows for one, _ in each),
            shards=tuple(name for one, _ in each for name in one.shards),
        )
        return whole, {name: file for _, files in each for name, file in files.items()}

    def seal(self, record: CheckpointRecord, files: dict[str, FileRecord]) -> None:
        """Record a checkpoint that all processes have joined; afterwards there are no journals of
        it."""
        with self._processes.sharing_errors():
            if self._processes.is_first:
                self.save(self.manifest.with_checkpoint(record).with_files(files))
                self.remove_unrecorded()
        self._journal = None
        self.share()

    def remove_unrecorded(self) -> None:
        """As :func:`remove_unrecorded`; for the process of rank 0."""
        remove_unrecorded(self.root, self.manifest)

    def _open(self, header: StoreHeader, run_id: str | None) -> Manifest:
        path = self.root / MANIFEST
        self._text = _text_of(path)
        if self._text is None:
            return Manifest(header=header, run_id=run_id or uuid.uuid4().hex)
        manifest = parse_manifest(self._text, str(path))
        check_sizes(self.root, manifest)
        return manifest


def remove_unrecorded(root: Path, manifest: Manifest) -> None:
    """Remove temporary files, and those that have the names of a store's but are in no record.

    Raises:
        StoreError: One cannot be removed.
        CorruptStoreError: A journal is damaged.
    """
    recorded = recorded_files(root, manifest)
    try:
        for entry in sorted(root.iterdir()):
            if entry.is_dir() and not entry.is_symlink() and is_checkpoint_folder(entry.name):
                _remove_unrecorded_in(entry, manifest, recorded)
            elif (
                entry.name.endswith(TEMPORARY_SUFFIX)
                or (is_sample_table(entry.name) and entry.name not in recorded)
                # Of a forgetting that came to nothing. An earlier edition's may still be needed to
                # write the tombstone.
                or entry.name == edition_name(COMMITMENTS, manifest.edition + 1)
            ):
                entry.unlink()
    except OSError as error:
        raise StoreError(
            f"{root}: what an interrupted run left cannot be removed ({error}). HINT: check the "
            "permissions."
        ) from error


def _remove_unrecorded_in(folder: Path, manifest: Manifest, recorded: set[str]) -> None:
    for entry in folder.iterdir():
        if not entry.is_dir() and f"{folder.name}/{entry.name}" not in recorded:
            entry.unlink()
    known = any(record.folder == folder.name for record in manifest.checkpoints)
    if not known and not any(folder.iterdir()):
        folder.rmdir()


def recorded_files(root: Path, manifest: Manifest) -> set[str]:
    """The files that the manifest names, and those of the journals of checkpoints that are not
    sealed."""
    found = set(manifest.files)
    for record in manifest.checkpoints:
        if not record.sealed:
            for name in _journals(root, record):
                found |= {name, *read_manifest(root, name).files}
    return found


def _journals(root: Path, record: CheckpointRecord) -> list[str]:
    folder = root / record.folder
    is_own = folder.is_dir() and not folder.is_symlink()
    names = sorted(entry.name for entry in folder.iterdir()) if is_own else []
    return [f"{record.folder}/{name}" for name in names if _JOURNAL_PATTERN.fullmatch(name)]


def _journal(record: CheckpointRecord, rank: int) -> str:
    return f"{record.folder}/rank{rank}.json"


_OF_KINDS = (["projection", "kinds"], ["projection", "parameters_without_hook"])
"""Facts that another kind of layer changes."""


def _check_header(stored: Manifest, given: StoreHeader, path: Path) -> None:
    differences = stored.header.differences(given)
    if not differences:
        return
    fields = "; ".join(
        f"{name}: the store has {mine!r}, this run {theirs!r}" for name, mine, theirs in differences
    )
    dataset = any(name.split(".")[0] == "dataset" for name, _, _ in differences)
    forgotten = (
        " Samples have been forgotten from this store: take the same ones out of the data that is "
        "traced, by name and not by position."
        if dataset and stored.edition
        else ""
    )
    kinds = (
        " Rows of a layer are those of its kind: make the same calls of register_layer as that run "
        "did; layers that have had a kind only since then want a new folder."
        if any(name.split(".")[:2] in _OF_KINDS for name, _, _ in differences)
        else ""
    )
    raise (DatasetChangedError if dataset else StoreMismatchError)(
        f"{path} holds traces made otherwise: {fields}.{forgotten} HINT: use the settings of the "
        f"store, or write to a new folder.{kinds}"
    )


def _is_sealed(manifest: Manifest, name: str) -> bool:
    folder = name.rpartition("/")[0]
    return name in manifest.files and not any(
        record.folder == folder and not record.sealed for record in manifest.checkpoints
    )


def _signature(path: Path) -> tuple[int, ...] | None:
    """Another one where the file was replaced; read before the content, so that it is never newer
    than that."""
    try:
        found = os.lstat(path)
    except OSError:  # whoever reads the file says so
        return None
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


def _text_of(path: Path) -> str | None:
    return read_text(path) if is_there(path) else None


def _changed(path: Path, found: str | None, manifest: Manifest) -> str:
    if found is None:
        return (
            f"{path} was removed while a capture had its store open. HINT: trace into a new folder."
        )
    if parse_manifest(found, str(path)).edition != manifest.edition:
        return (
            f"{path}: samples have been forgotten from this store while a capture had it open. "
            "Nothing was changed. HINT: take the same samples out of the data that is traced and "
            "resume the training, to go on from what the store holds now."
        )
    return (
        f"{path}: another process has changed it while a capture had its store open. Nothing was "
        "changed. HINT: one run writes to a store at a time, on a file system whose locks hold "
        "between its machines; resume this one alone, or in a folder of its own."
    )
