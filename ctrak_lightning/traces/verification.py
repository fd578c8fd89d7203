"""Which files of a store are not those that its manifest records."""

from __future__ import annotations

from pathlib import Path

from ctrak_lightning.traces.atomic import FileRecord, sha256_of
from ctrak_lightning.traces.records import recorded_files
from ctrak_lightning.traces.schema import (
    COMMITMENTS,
    LEDGER,
    LEDGER_LOCK,
    LEDGER_SIGNATURE,
    MANIFEST,
    WRITER_LOCK,
    Manifest,
    edition_name,
)


def altered_files(root: Path, manifest: Manifest) -> list[str]:
    """One line per recorded file that is missing or does not have the recorded content."""
    problems = (_problem(root, name, known) for name, known in sorted(manifest.files.items()))
    return [line for line in problems if line]


def unrecorded_files(root: Path, manifest: Manifest) -> list[str]:
    """One line per file that is in no record, and per link, be it to a folder.

    Raises:
        CorruptStoreError: A journal of an interrupted capture is damaged.
    """
    ledger = {LEDGER, LEDGER_LOCK, LEDGER_SIGNATURE, edition_name(COMMITMENTS, manifest.edition)}
    recorded = {MANIFEST, WRITER_LOCK, *ledger, *recorded_files(root, manifest)}
    present = [
        entry for entry in sorted(root.rglob("*")) if entry.is_symlink() or not entry.is_dir()
    ]
    problems = []
    for entry in present:
        name = entry.relative_to(root).as_posix()
        if entry.is_symlink() and name not in manifest.files:  # of those, altered_files tells
            problems.append(
                f"{name}: is a link, and nothing of a store is read or written through one"
            )
        elif name not in recorded:
            problems.append(f"{name}: not recorded in the manifest")
    return problems


def _problem(root: Path, name: str, known: FileRecord) -> str | None:
    try:
        found = sha256_of(root / name)
    except OSError as error:
        return f"{name}: cannot be read ({error})"
    return (
        None
        if found == known.sha256
        else f"{name}: sha256 is {found}, the manifest records {known.sha256}"
    )
