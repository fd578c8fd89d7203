"""A store and its ledger, read together: what the exports are made of."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrak_lightning.errors import CorruptStoreError, StoreError
from ctrak_lightning.provenance.commitments import commit, edition_salt, is_commitments
from ctrak_lightning.provenance.history import History, replay
from ctrak_lightning.provenance.ledger import Entry, Kind, Ledger
from ctrak_lightning.provenance.run_facts import (
    checkpoint_facts,
    dataset_facts,
    disagreements,
    forget_facts,
    is_pending,
    missing_steps,
    put_commitments,
    stored_digest,
    stored_table,
    unrecorded_steps,
)
from ctrak_lightning.store import IncompleteStoreWarning, TraceStore
from ctrak_lightning.store.lock import ledger_lock
from ctrak_lightning.store.manifest import read_manifest
from ctrak_lightning.store.schema import COMMITMENTS, Manifest, edition_name


def record_run(root: str | Path, facts: dict[str, Any], *, resumed: bool) -> list[Entry]:
    """The entry of a run that begins or is resumed, and whatever else the ledger lacks; see
    :func:`sync`.

    Args:
        root: folder of the store.
        facts: see ``docs/ledger.md``; ``run_id`` and ``header`` are the store's.
        resumed: whether the run goes on with an earlier one's weights.
    """
    kind: Kind = "run_resumed" if resumed else "run_begun"
    with ledger_lock(Path(root)):
        return _sync(Path(root), [(kind, facts)])


def sync(root: str | Path) -> list[Entry]:
    """Records what the store has and its ledger, if it has one, does not: the dataset, a forgetting
    that was interrupted before its tombstone, and checkpoints that were sealed, or removed because
    training resumed from before them.

    Returns:
        The entries that were added.

    Raises:
        CorruptStoreError: the store is not what the ledger says of it; nothing is recorded.
        StoreError: there is no store, or its ledger cannot be written.
    """
    with ledger_lock(Path(root)):
        return _sync(Path(root), [])


def complete(root: Path, manifest: Manifest) -> list[Entry]:
    """As :func:`sync`, for those who hold the lock, and for a forgetting only."""
    ledger = Ledger(root)
    history = replay(ledger.entries())
    if not is_pending(manifest, history):
        return []
    return ledger.write([("forget", forget_facts(root, manifest, history))])


def remove_old_commitments(root: Path, manifest: Manifest) -> None:
    """Once the ledger has its tombstone: the earlier editions' files hold the salts of samples that
    were forgotten.

    Raises:
        StoreError: they cannot be deleted.
    """
    kept = edition_name(COMMITMENTS, manifest.edition)
    try:
        for entry in sorted(root.iterdir()):
            if entry.name != kept and is_commitments(entry.name):
                entry.unlink()
    except OSError as error:
        raise StoreError(
            f"{root}: what was forgotten is in files that cannot be deleted ({error}). HINT: check "
            "the permissions and run `ctrak forget` again, without naming samples."
        ) from error


def require_agreement(root: Path, manifest: Manifest, history: History) -> None:
    """Raises a CorruptStoreError where the store is not what the ledger says of it: recording on
    would hide that."""
    salt = None if history.dataset is None else edition_salt(root, history.edition)
    if found := disagreements(manifest, history, salt):
        raise CorruptStoreError(
            f"{root} is not what its ledger says: {'; '.join(found[:3])}. HINT: `ctrak verify` "
            "names all that differs. A run without ProvenanceRecorder that captured a checkpoint "
            "again does this too; discard the checkpoint then."
        )


def _sync(root: Path, news: list[tuple[Kind, dict[str, Any]]]) -> list[Entry]:
    manifest = read_manifest(root)
    ledger = Ledger(root)
    if not ledger.exists and not news:
        return []
    history = replay(ledger.entries()) if ledger.exists else History()
    require_agreement(root, manifest, history)
    added: list[tuple[Kind, dict[str, Any]]] = []
    if is_pending(manifest, history):
        facts = forget_facts(root, manifest, history)
        added.append(("forget", facts))
        history.dataset = facts["dataset"]
        history.checkpoints = {known["step"]: known for known in facts["checkpoints"]}
    added += news
    if history.dataset is None and manifest.samples in manifest.files:
        table = stored_table(root, manifest)
        commitments = commit(table)
        known = put_commitments(root, manifest.edition, commitments)
        added.append(("dataset", dataset_facts(manifest, table, known, commitments.salt)))
    if missing := missing_steps(manifest, history):
        added.append(("discarded", {"steps": missing}))
    for record in unrecorded_steps(manifest, history):
        weights, salt = stored_digest(root, manifest, record), edition_salt(root, manifest.edition)
        added.append(("checkpoint", checkpoint_facts(manifest, record, weights, salt)))
    entries = ledger.write(added) if added else []
    remove_old_commitments(root, manifest)
    return entries


@dataclass(frozen=True)
class RecordedStore:
    """A store whose manifest says what its ledger says."""

    store: TraceStore
    history: History
    head: str
    """Hash of the ledger's last entry."""

    @classmethod
    def open(cls, path: str | Path) -> RecordedStore:
        """The store at ``path``.

        Raises:
            StoreError: it has no ledger.
            CorruptStoreError: the ledger is damaged, or the store is not what it says.
        """
        entries = Ledger(path).entries()
        history = replay(entries)
        require_agreement(Path(path), read_manifest(Path(path)), history)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IncompleteStoreWarning)  # exports are of what is sealed
            store = TraceStore(path)
        return cls(store, history, entries[-1].sha256)
