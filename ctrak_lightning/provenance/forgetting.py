"""Consent withdrawn: takes samples out of a store, as if they had never been traced."""

import contextlib
import difflib
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ctrak_lightning.errors import CorruptStoreError, StoreError, listed, shorten
from ctrak_lightning.provenance.commitments import Commitments
from ctrak_lightning.provenance.history import replay
from ctrak_lightning.provenance.ledger import Ledger
from ctrak_lightning.provenance.recording import (
    LedgerWarning,
    complete,
    remove_old_commitments,
    require_agreement,
)
from ctrak_lightning.provenance.run_facts import put_commitments, stored_commitments, stored_table
from ctrak_lightning.store.integrity import altered_files, rewrite_without
from ctrak_lightning.store.lock import hold_for
from ctrak_lightning.store.manifest import read_manifest, write_manifest
from ctrak_lightning.store.records import remove_unrecorded
from ctrak_lightning.store.samples import SampleTable
from ctrak_lightning.store.schema import Manifest


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
            f"{root} has no sample {listed(unknown, show=_short)}; nothing was forgotten. "
            f"{_near(unknown[0], table.sample_ids)}HINT: ids are those of "
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
        counts = Counter(table.metadata[column]).most_common()
        values = [f"{_short(known)} ({count})" for known, count in counts]
        raise StoreError(
            f"--where {_short(condition)}: no sample has that value; nothing was forgotten. "
            f"{_near(value, set(table.metadata[column]))}The values of {column!r}: "
            f"{listed(values, 10, str)}."
        )
    return places


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name[:200], list(known), n=3, cutoff=0.6)
    return f"Near: {', '.join(_short(one) for one in near)}. " if near else ""


def _short(name: object) -> str:
    return shorten(name, 120)


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgotten:
    """What :func:`forget` did."""

    sample_ids: list[str]
    """The samples that are gone."""
    remaining: int
    """How many samples the store has now."""
    tombstones: list[str]
    """What the ledger keeps in their place: hashes that say nothing of them. Empty where the store
    has no ledger."""
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
    """First the tombstone, which is read from the old edition's files; then these go."""
    manifest = read_manifest(root)
    if Ledger(root).exists:
        complete(root, manifest)
    remove_unrecorded(root, manifest)
    remove_old_commitments(root, manifest)
    return manifest


def _checked(root: Path, manifest: Manifest) -> Commitments | None:
    """The commitments, if there is a ledger. A store that was tampered with is not written anew:
    nobody could see it later."""
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
