"""Whether a store's manifest says what its ledger says."""

from __future__ import annotations

from typing import Any

from ctrak_lightning.provenance.facts import (
    checkpoint_facts,
    header_facts,
    other_facts,
    samples_facts,
)
from ctrak_lightning.provenance.history import History
from ctrak_lightning.traces.schema import CheckpointRecord, Manifest, differences


def disagreements(manifest: Manifest, history: History, salt: bytes | None) -> list[str]:
    """One line for everything that both describe, differently; what only one has is not looked at.

    Args:
        manifest: of the store.
        history: what its ledger says.
        salt: of the edition that the ledger ends with, None where it cannot be read: files are not
            compared then.
    """
    found = []
    if history.run_id is not None and manifest.run_id != history.run_id:
        found.append(
            f"manifest.json: run_id is {manifest.run_id!r}, the ledger is of run "
            f"{history.run_id!r}: one of them is another store's"
        )
    if history.runs:
        stored = history.runs[-1].facts["header"]
        found += _told("manifest.json: header", stored, header_facts(manifest.header))
    if history.dataset is None or is_pending(manifest, history):
        return found
    if manifest.edition != history.edition:
        return [
            *found,
            f"manifest.json: edition is {manifest.edition}, the ledger records {history.edition}: "
            "samples were forgotten, or brought back, without an entry",
        ]
    found += _told(
        "manifest.json: header.dataset", history.dataset["header"], other_facts(manifest.header)
    )
    if salt is None:
        return found
    mine = samples_facts(manifest, salt) if manifest.samples in manifest.files else None
    found += _told("manifest.json: samples", history.dataset["samples"], mine)
    for record in _sealed(manifest):
        if record.step in history.checkpoints:
            recorded = history.checkpoints[record.step]
            now = checkpoint_facts(manifest, record, recorded["weights"], salt)
            found += _told(f"manifest.json: checkpoint {record.step}", recorded, now)
    return found


def is_pending(manifest: Manifest, history: History) -> bool:
    """Whether samples have just been forgotten and the ledger does not say so yet: a crash came in
    between."""
    return history.dataset is not None and manifest.edition == history.edition + 1


def unrecorded_steps(manifest: Manifest, history: History) -> list[CheckpointRecord]:
    """Sealed checkpoints of which the ledger has nothing."""
    return [record for record in _sealed(manifest) if record.step not in history.checkpoints]


def missing_steps(manifest: Manifest, history: History) -> list[int]:
    """Steps whose checkpoints the ledger has and the manifest does not."""
    sealed = {record.step for record in _sealed(manifest)}
    return sorted(step for step in history.checkpoints if step not in sealed)


def _sealed(manifest: Manifest) -> list[CheckpointRecord]:
    return [record for record in manifest.checkpoints if record.sealed]


def _told(where: str, recorded: Any, now: Any) -> list[str]:
    return [
        f"{name} is {mine!r}, the ledger records {theirs!r}"
        for name, theirs, mine in differences(recorded, now, where)
    ]
