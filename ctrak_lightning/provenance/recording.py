"""What enters a ledger: runs, samples, checkpoints, questions; and a store read with its ledger."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ctrak_lightning.errors import CorruptStoreError, StoreError
from ctrak_lightning.provenance.commitments import commit, edition_salt, is_commitments, salted
from ctrak_lightning.provenance.environment import json_value
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
    :func:`sync`."""
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


class LedgerWarning(UserWarning):
    """Something could not be recorded in a store's ledger, or an old ledger says more of what was
    forgotten than it should.

    Why: answers are right without it, but the record has a gap, or a hint in it.

    What to do: make the folder writable, or ask without recording: ``Attributor(...,
    record=False)``. Keep an old ledger from others.
    """


class QueryLog:
    """Notes questions and the digests of their answers; nothing, where the store has no ledger."""

    def __init__(self, root: Path, edition: int, asker: str | None) -> None:
        self._ledger, self._edition, self._asker = Ledger(root), edition, asker
        self._has_warned = False

    def note(
        self,
        concepts: Sequence[dict[str, Any]],
        seeds: Sequence[int],
        answers: Iterable[tuple[Sequence[str], Sequence[float]]],
        *,
        dampings: Sequence[float | None],
        methods: Sequence[dict[str, Any]],
        steps: Sequence[int],
        samples: Literal["all", "top"],
    ) -> None:
        """One entry for each question.

        Args:
            concepts: what was asked.
            seeds: of the generated images.
            answers: sample ids and scores of each; not looked at without a ledger.
            dampings: as used for each.
            methods: by which each was asked.
            steps: of the checkpoints.
            samples: whether an answer has all of them, in the order of the sample table, or the
                best, in that of the ranking.

        Warns:
            LedgerWarning: they cannot be recorded (once; the folder is read-only, say).
        """
        if not self._ledger.exists:
            return
        shared = {"steps": list(steps), "samples": samples, "asker": self._asker}
        asked = list(zip(concepts, seeds, methods, dampings, answers, strict=True))
        try:
            salt = edition_salt(self._ledger.root, self._edition)
            each = [
                shared
                | {
                    "method": method,
                    "concept": _salted_images(json_value(concept), salt),
                    "seed": seed,
                    "damping": damping,
                    "count": len(answer[0]),
                    "result_sha256": salted(result_digest(*answer), salt),
                }
                for concept, seed, method, damping, answer in asked
            ]
            self._ledger.append_all([("query", facts) for facts in each])
        except StoreError as error:
            self._warn(error)

    def _warn(self, error: StoreError) -> None:
        if not self._has_warned:
            warnings.warn(
                f"Questions are not recorded: {error} The answers are not affected. HINT: "
                "Attributor(..., record=False) asks without recording.",
                LedgerWarning,
                stacklevel=5,
            )
        self._has_warned = True


def _salted_images(concept: dict[str, Any], salt: bytes) -> dict[str, Any]:
    """A question may be about a sample's own picture, which the ledger must not remember once the
    sample is forgotten."""
    given = {
        name: concept[name] for name in ("image", "mask") if isinstance(concept.get(name), dict)
    }
    return concept | {
        name: value | {"sha256": salted(value["sha256"], salt)} for name, value in given.items()
    }


def result_digest(sample_ids: Sequence[str], scores: Sequence[float]) -> str:
    """sha256 (hex) of an answer: the ids, each ended by NUL, then the scores as little-endian
    float32."""
    found = hashlib.sha256("".join(f"{sample_id}\0" for sample_id in sample_ids).encode())
    found.update(np.asarray(scores, dtype="<f4").tobytes())
    return found.hexdigest()
