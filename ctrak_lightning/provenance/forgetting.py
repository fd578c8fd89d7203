"""Consent withdrawn: takes samples out of a store, as if they had never been traced."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ctrak_lightning.errors import CorruptStoreError, StoreError
from ctrak_lightning.provenance.commitments import Commitments, edition_salt, salted
from ctrak_lightning.provenance.environment import json_value
from ctrak_lightning.provenance.history import replay
from ctrak_lightning.provenance.ledger import Ledger
from ctrak_lightning.provenance.recording import complete, remove_old_commitments, require_agreement
from ctrak_lightning.provenance.run_facts import put_commitments, stored_commitments, stored_table
from ctrak_lightning.store.integrity import altered_files, rewrite_without
from ctrak_lightning.store.lock import hold_for
from ctrak_lightning.store.manifest import read_manifest, write_manifest
from ctrak_lightning.store.records import remove_unrecorded
from ctrak_lightning.store.samples import SampleTable
from ctrak_lightning.store.schema import Manifest

_SHOWN = 5
_NEAR = 3
_VALUES = 10


def positions_of(table: SampleTable, sample_ids: Sequence[str], root: Path) -> list[int]:
    """Where the samples of these ids stand in the table of the store at ``root``, ascending.

    Raises:
        StoreError: no ids, one that the table does not have (names near ones), or all that it has.
    """
    wanted = [sample_ids] if isinstance(sample_ids, str) else list(dict.fromkeys(sample_ids))
    if not wanted:
        raise StoreError("forget(sample_ids=[]): expected at least one sample.")
    where = {sample_id: i for i, sample_id in enumerate(table.sample_ids)}
    if unknown := [sample_id for sample_id in wanted if sample_id not in where]:
        raise StoreError(
            f"{root} has no sample "
            f"{', '.join(_short(name) for name in unknown[:_SHOWN])}{f' and {len(unknown) - _SHOWN} more' if len(unknown) > _SHOWN else ''}; "
            f"nothing was forgotten. {_near(unknown[0], table.sample_ids)}HINT: ids are those of "
            "the data set, as Attribution.top() names them; a sample that was forgotten before is "
            "unknown too."
        )
    if len(wanted) == len(table):
        raise StoreError(
            f"{root}: these are all of its {len(table)} samples, and a store of none says nothing. "
            "HINT: delete the folder."
        )
    return sorted(where[sample_id] for sample_id in wanted)


def ids_where(table: SampleTable, conditions: Sequence[str]) -> list[str]:
    """The ids of the samples that meet all of ``conditions``, each ``column=value``, in the order
    of the table.

    Raises:
        StoreError: a condition is of no column, or no sample meets it, or not all of them; says
            which columns and values there are.

    Example:
        >>> table = SampleTable(["a", "b"], ["", ""], {"owner": ["anna", "bo"]})
        >>> ids_where(table, ["owner=bo"])
        ['b']
    """
    each = {condition: _meeting(table, condition) for condition in conditions}
    found = set(range(len(table))).intersection(*each.values())
    if not found:
        counts = ", ".join(
            f"{len(places)} have {_short(condition)}" for condition, places in each.items()
        )
        raise StoreError(
            f"--where: no sample meets all of the conditions ({counts}); nothing was forgotten. "
            "HINT: all must hold; forget in two steps what meets one or the other."
        )
    return [table.sample_ids[i] for i in sorted(found)]


def read_ids(path: str | Path) -> list[str]:
    """The ids in a file of text, one a line, as they stand there; empty lines are left out.

    Raises:
        StoreError: it cannot be read as UTF-8, or has none.
    """
    try:
        # Not splitlines(): an id may hold what Unicode takes for the end of a line.
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(
            f"--ids-from {path}: cannot be read ({error}). HINT: a file of UTF-8 text, one id a "
            "line."
        ) from error
    found = [line for line in (line.removesuffix("\r") for line in lines) if line]
    if not found:
        raise StoreError(
            f"--ids-from {path}: has no id; nothing was forgotten. HINT: one id a line."
        )
    return found


def _meeting(table: SampleTable, condition: str) -> set[int]:
    named = [column for column in table.metadata if condition.startswith(f"{column}=")]
    if not named:
        known = ", ".join(map(repr, sorted(table.metadata))) or "none"
        raise StoreError(
            f"--where {_short(condition)}: no such metadata column; nothing was forgotten. The "
            f"store has: {known}. HINT: --where owner=anna, of the column and the value as they "
            "were traced."
        )
    column = max(named, key=len)  # a column's name may have a "=" in it
    value = condition[len(column) + 1 :]
    places = {i for i, given in enumerate(table.metadata[column]) if given == value}
    if not places:
        raise StoreError(
            f"--where {_short(condition)}: no sample has that value; nothing was forgotten. "
            f"{_near(value, set(table.metadata[column]))}The values of {column!r}: "
            f"{_listed(table.metadata[column])}."
        )
    return places


def _listed(values: Sequence[str]) -> str:
    counts = Counter(values).most_common()
    shown = ", ".join(f"{_short(value)} ({count})" for value, count in counts[:_VALUES])
    return shown if len(counts) <= _VALUES else f"{shown} and {len(counts) - _VALUES} more"


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name[:200], list(known), n=_NEAR, cutoff=0.6)
    return f"Near: {', '.join(_short(one) for one in near)}. " if near else ""


def _short(name: object) -> str:
    shown = repr(name)
    return shown if len(shown) <= 120 else f"{shown[:117]}..."


class LedgerWarning(UserWarning):
    """Something could not be recorded in a store's ledger, or an old ledger says more of what was
    forgotten than it should.

    Why: answers are right without it, but the record has a gap, or a hint in it.

    What to do: make the folder writable, or ask without recording: ``Attributor(...,
    record=False)``. Keep an old ledger from others.
    """


class QueryLog:
    """Notes questions and the digests of their answers; nothing, where the store has no ledger.

    Args:
        root: folder of the store.
        edition: of its files, as they are read.
        asker: who asks, or None.
    """

    def __init__(self, root: Path, edition: int, asker: str | None) -> None:
        self._ledger = Ledger(root)
        self._edition = edition
        self._asker = asker
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgotten:
    """What :func:`forget` did."""

    sample_ids: list[str]
    """The samples that are gone."""
    remaining: int
    """How many samples the store has now."""
    tombstones: list[str]
    """What the ledger keeps in their stead: hashes from which nothing can be told. Empty where the
    store has no ledger."""
    unsealed: list[int]
    """Steps of checkpoints that were not sealed and were removed whole."""


def forget(path: str | Path, sample_ids: Sequence[str]) -> Forgotten:
    """Takes samples out of a store: their rows in every shard of every checkpoint, their part in
    the kernels, their visits, thumbnails and metadata. What is left is what a store has that never
    saw them.

    A new edition of every file is written beside the old one, then the manifest is replaced, then
    the ledger gets its tombstone, then the old files are deleted. A crash before the manifest is
    replaced leaves the old store, one after it the new one; the next :func:`forget` (also with no
    samples, see :func:`finish`), or the next run, completes what is left to do. Needs as much free
    space as the traces take. Checkpoints that are not sealed are removed whole.

    It does not make the *model* forget: weights that were trained on a sample are what they are.
    Copies of the store, and answers given earlier, are the user's to find.

    Args:
        path: folder of the store; nobody else writes to it meanwhile.
        sample_ids: ids of the samples, each known to the store.

    Raises:
        StoreLockedError: a run writes to the store, or another command changes it; nothing was
            changed.
        StoreError: an id is unknown (names near ones), all samples would go, or a file cannot be
            written; nothing was changed.
        CorruptStoreError: the store is not what its manifest and its ledger say; nothing was
            changed.

    Warns:
        LedgerWarning: an earlier version, which salted less, made the entries of what is forgotten:
            a row can be guessed from them.
    """
    root = Path(path)
    read_manifest(root)
    with hold_for(root, "forgets samples") as lock:
        manifest = _finish(root)
        table = stored_table(root, manifest)
        gone = positions_of(table, sample_ids, root)
        commitments = _checked(root, manifest)
        try:
            after = rewrite_without(root, manifest, table, gone)
            if commitments is not None:
                put_commitments(root, after.edition, commitments.without(gone))
            if read_manifest(root) != manifest:
                raise StoreError(
                    f"{root}: another process has written to the store meanwhile; nothing was "
                    "forgotten. HINT: end the training first."
                )
            _check_files(root, after)
            lock.require()
            write_manifest(root, after)
        except StoreError:
            if read_manifest(root) == manifest:
                with contextlib.suppress(StoreError):
                    remove_unrecorded(root, manifest)
            raise
        _finish(root)
    if commitments is not None and not commitments.salt:
        _warn_of_unsalted(root)
    known = set() if commitments is None else set(commitments.without(gone).hexadecimal())
    return Forgotten(
        sample_ids=[table.sample_ids[i] for i in gone],
        remaining=len(table) - len(gone),
        tombstones=[]
        if commitments is None
        else [h for h in commitments.hexadecimal() if h not in known],
        unsealed=[record.step for record in manifest.checkpoints if not record.sealed],
    )


def finish(path: str | Path) -> None:
    """Completes a :func:`forget` that was interrupted, and removes what it left; nothing, where
    none was.

    Raises:
        StoreError, CorruptStoreError: as :func:`forget`.
    """
    root = Path(path)
    read_manifest(root)
    with hold_for(root, "completes a forgetting"):
        _finish(root)


def _finish(root: Path) -> Manifest:
    """First the tombstone, which is told from the old edition's files; then these go."""
    manifest = read_manifest(root)
    if Ledger(root).exists:
        complete(root, manifest)
    remove_unrecorded(root, manifest)
    remove_old_commitments(root, manifest)
    return manifest


def _checked(root: Path, manifest: Manifest) -> Commitments | None:
    """The commitments, if there is a ledger. A store that was tampered with is not written anew:
    nobody could tell later."""
    if altered := altered_files(root, manifest):
        raise CorruptStoreError(
            f"{root} is damaged: {'; '.join(altered[:3])}. Nothing was forgotten. HINT: restore it "
            "from a copy first; `ctrak verify` names all that differs."
        )
    ledger = Ledger(root)
    if not ledger.exists:
        return None
    history = replay(ledger.entries())
    require_agreement(root, manifest, history)
    if history.dataset is None:
        raise StoreError(
            f"{root}: its ledger has no entry of the samples yet. HINT: let the run with "
            "ProvenanceRecorder begin training first."
        )
    return stored_commitments(root, history.dataset)


def _warn_of_unsalted(root: Path) -> None:
    warnings.warn(
        f"{root}: an earlier version of ctrak-lightning made the ledger's entries of what is "
        "forgotten now, and put digests of files into them without a salt. Whoever guesses such "
        "a row in full, and has the other rows, can see from them that it was there. HINT: where "
        "that matters, keep the ledger from others; what is recorded from now on is salted.",
        LedgerWarning,
        stacklevel=3,
    )


def _check_files(root: Path, after: Manifest) -> None:
    """A capture that is running removes files that it does not know."""
    missing = [name for name in after.files if not (root / name).is_file()]
    if missing:
        raise StoreError(
            f"{root / missing[0]} was removed by another process while it was being written; "
            "nothing was forgotten. HINT: end the training first."
        )
