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
    Manifest,
    edition_name,
)


def altered_files(root: Path, manifest: Manifest) -> list[str]:
    """One line per recorded file that is missing or does not have the recorded content."""
    problems = (_problem(root, name, known) for name, known in sorted(manifest.files.items()))
    return [line for line in problems if line]


def unrecorded_files(root: Path, manifest: Manifest) -> list[str]:
    """One line per file that is in no record.

    Raises:
        CorruptStoreError: A journal of an interrupted capture is damaged.
    """
    ledger = {LEDGER, LEDGER_LOCK, LEDGER_SIGNATURE, edition_name(COMMITMENTS, manifest.edition)}
    recorded = {MANIFEST, *ledger, *recorded_files(root, manifest)}
    present = (entry.relative_to(root).as_posix() for entry in root.rglob("*") if not entry.is_dir())
    return [f"{name}: not recorded in the manifest" for name in sorted(present) if name not in recorded]


def _problem(root: Path, name: str, known: FileRecord) -> str | None:
    try:
        found = sha256_of(root / name)
    except OSError as error:
        return f"{name}: cannot be read ({error})"
    return (
        None if found == known.sha256 else f"{name}: sha256 is {found}, the manifest records {known.sha256}"
    )
