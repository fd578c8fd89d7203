"""Recomputes everything that a store and its ledger say, and names what differs."""

from collections.abc import Sequence
from pathlib import Path

from ctrak_lightning.errors import StoreError, listed
from ctrak_lightning.model.fingerprint import weights_digest
from ctrak_lightning.provenance.commitments import edition_salt, is_commitments, salted
from ctrak_lightning.provenance.history import History, replay
from ctrak_lightning.provenance.ledger import Chain, Ledger
from ctrak_lightning.provenance.run_facts import (
    disagreements,
    is_pending,
    missing_steps,
    stored_commitments,
    stored_table,
    unrecorded_steps,
)
from ctrak_lightning.provenance.signature import signature_problems
from ctrak_lightning.store.files import is_there, sha256_of
from ctrak_lightning.store.integrity import altered_files, kernel_of, unrecorded_files
from ctrak_lightning.store.kernel import Kernel, read_kernel
from ctrak_lightning.store.manifest import manifest_text, parse_manifest, read_text
from ctrak_lightning.store.schema import (
    COMMITMENTS,
    LEDGER,
    LEDGER_LOCK,
    LEDGER_SIGNATURE,
    MANIFEST,
    READABLE_SCHEMAS,
    SCHEMA_VERSION,
    CheckpointRecord,
    Manifest,
    differences,
    edition_name,
)
from ctrak_lightning.store.sections import read_exposures, read_visits
from ctrak_lightning.store.store import read_weights
from ctrak_lightning.store.stored_rows import StoredRows

_GRAM_TOLERANCE = 1e-5
"""Of the largest eigenvalue: eigenvectors are stored in float32."""


def verify(
    path: str | Path, *, deep: bool = False, public_key: str | Path | None = None
) -> list[str]:
    """Holds every byte of a store against its manifest and its ledger, and the parts of the store
    against each other.

    Reads only. What this proves, and what it cannot, is in ``docs/ledger.md``: without a signature,
    or a head hash that was noted elsewhere, somebody who can write the folder can write a whole new
    ledger, or take away its last entries.

    Args:
        path: folder of the store.
        deep: also compute the kernels anew from the shards, which takes as long as sealing did.
        public_key: PEM file of the Ed25519 key that the ledger must be signed with: all of its
            entries but the questions after the last of the others.

    Returns:
        One line per problem, which names the file; empty when all is well.

    Raises:
        StoreError: there is no store, or ``public_key`` cannot be used.
    """
    root, ledger = Path(path), Ledger(path)
    if not is_there(root / MANIFEST) and not ledger.exists:
        read_text(root / MANIFEST)
    chain, unread = _readable_chain(ledger)
    history, found = _checked_history(root, chain)
    # Versions that wrote an earlier schema salted no edition, and every later one writes the
    # manifest anew.
    manifest, problems = _checked_manifest(
        root, (SCHEMA_VERSION,) if _salt(root, history) else READABLE_SCHEMAS
    )
    problems += unread + found
    if chain is not None or is_there(root / LEDGER_SIGNATURE) or public_key is not None:
        problems += signature_problems(root, [] if chain is None else chain.entries, public_key)
    if manifest is None:
        return problems + _files_of_ledger(root, history)
    altered = altered_files(root, manifest)
    problems += altered
    try:
        problems += unrecorded_files(root, manifest)
    except StoreError as error:
        problems.append(str(error))
    if chain is not None:
        problems += _against_ledger(root, manifest, history)
    if public_key is not None:
        problems += [
            f"{MANIFEST}: checkpoint {record.step} is not sealed: no signature vouches for its rows"
            for record in manifest.checkpoints
            if not record.sealed
        ]
    damaged = {line.split(":")[0] for line in altered}
    if manifest.samples in manifest.files and manifest.samples not in damaged:
        problems += _samples(root, manifest, history)
    for record in manifest.checkpoints:
        if record.sealed and not damaged & {*record.companions, record.kernel, *record.shards}:
            problems += _checkpoint(root, manifest, record, history, deep)
    return problems


def _readable_chain(ledger: Ledger) -> tuple[Chain | None, list[str]]:
    try:
        return (ledger.chain() if ledger.exists else None), []
    except StoreError as error:
        return None, [str(error)]


def _checked_manifest(root: Path, schemas: Sequence[int]) -> tuple[Manifest | None, list[str]]:
    try:
        text = read_text(root / MANIFEST)
        manifest = parse_manifest(text, MANIFEST)
    except StoreError as error:
        return None, [str(error)]
    if text not in (manifest_text(manifest, schema) for schema in schemas):
        return manifest, [f"{MANIFEST}: is not written as the library writes it"]
    return manifest, []


def _checked_history(root: Path, chain: Chain | None) -> tuple[History, list[str]]:
    problems = []
    lock = root / LEDGER_LOCK  # a link is among unrecorded_files
    if is_there(lock) and lock.lstat().st_size and not lock.is_symlink():
        problems.append(f"{LEDGER_LOCK}: is not empty")
    if chain is None:
        left = sorted(entry.name for entry in root.iterdir() if is_commitments(entry.name))
        if left and not is_there(root / LEDGER):
            problems.append(
                f"{LEDGER}: is missing, and {left[0]}, which belongs to it, is there: it was "
                "deleted"
            )
        return History(), problems
    if chain.torn:
        problems.append(
            f"{LEDGER}: ends with {len(chain.torn)} bytes of an entry whose writing was cut off; "
            "the next entry takes their place"
        )
    if chain.damage is not None:
        problems.append(
            f"{LEDGER}: entry {len(chain.entries)} {chain.damage}; what comes after it proves "
            "nothing"
        )
    elif not chain.entries:
        problems.append(f"{LEDGER}: has no entry")
    try:
        return replay(chain.entries), problems
    except StoreError as error:
        return History(), [*problems, f"{LEDGER}: {error}"]


def _files_of_ledger(root: Path, history: History) -> list[str]:
    """What can be said of the files where the manifest cannot be read."""
    problems = []
    salt = _salt(root, history)
    for name, known in sorted(history.files().items()):
        try:
            found = sha256_of(root / name)
            if not is_commitments(name) and salt is not None:
                found = salted(found, salt)
            if known.sha256 != found:
                problems.append(f"{name}: is not the file that the ledger records")
        except OSError as error:
            problems.append(f"{name}: cannot be read ({error})")
    return problems


def _salt(root: Path, history: History) -> bytes | None:
    """That of the edition that the ledger ends with; None where it cannot be read."""
    if history.dataset is None:
        return None
    try:
        return edition_salt(root, history.edition)
    except StoreError:
        return None


def _against_ledger(root: Path, manifest: Manifest, history: History) -> list[str]:
    salt = _salt(root, history)
    problems = disagreements(manifest, history, salt)
    if history.dataset is not None and salt is None:
        name = edition_name(COMMITMENTS, history.edition)
        problems.append(
            f"{name}: its salt cannot be read, without which no file can be held against the ledger"
        )
    if history.dataset is None and manifest.samples in manifest.files:
        problems.append(f"{LEDGER}: has no entry of the samples")
    if is_pending(manifest, history):
        return [
            *problems,
            f"{LEDGER}: samples were forgotten and there is no entry of it: it was interrupted. "
            "HINT: `ctrak forget` without any samples completes it",
        ]
    problems += [
        f"{MANIFEST}: checkpoint {record.step} is not in the ledger: the ledger was cut, or a run "
        "without ProvenanceRecorder made it"
        for record in unrecorded_steps(manifest, history)
    ]
    return problems + [
        f"{MANIFEST}: lacks checkpoint {step}, which is in the ledger"
        for step in missing_steps(manifest, history)
    ]


def _samples(root: Path, manifest: Manifest, history: History) -> list[str]:
    try:
        table = stored_table(root, manifest)
    except StoreError as error:
        return [str(error)]
    kept = manifest.header.dataset
    facts = {name: value for name, value in table.facts().items() if name in kept}
    problems = [
        f"{name} is {mine!r}, {manifest.samples} gives {theirs!r}"
        for name, mine, theirs in differences(
            {name: kept[name] for name in facts}, facts, f"{MANIFEST}: header.dataset"
        )
    ]
    if history.dataset is None or is_pending(manifest, history):
        return problems
    try:
        commitments = stored_commitments(root, history.dataset)
    except StoreError as error:
        return [*problems, str(error)]
    if commitments.root() != history.dataset["commitments"]["root"]:
        name = edition_name(COMMITMENTS, history.edition)
        problems.append(f"{name}: is not what the ledger records")
    if len(commitments) != len(table):
        problems.append(
            f"{manifest.samples}: has {len(table)} samples, the ledger records {len(commitments)}"
        )
    elif changed := commitments.differing(table):
        problems.append(
            f"{manifest.samples}: {len(changed)} samples are not those that the ledger records: "
            f"{listed(table.sample_ids[i] for i in changed)}"
        )
    return problems


def _checkpoint(
    root: Path, manifest: Manifest, record: CheckpointRecord, history: History, deep: bool
) -> list[str]:
    n, k = record.rows, manifest.header.dim
    problems = []
    try:
        stored = StoredRows(root, record.folder, record.shards, manifest.header, n, rows=n)
        for _ in stored.blocks():
            pass
        kernel = read_kernel(root / record.kernel, n, k)
        if deep and _is_another(kernel, kernel_of(stored, n, k)):
            problems.append(f"{record.kernel}: is not the kernel of the traces in the shards")
        if record.visits in manifest.files:
            read_visits(root / record.visits, n)
        if record.exposures in manifest.files:
            read_exposures(root / record.exposures, n)
        if record.weights in manifest.files:
            found = weights_digest(
                read_weights(root / record.weights, manifest.files[record.weights])
            )
            recorded = history.checkpoints.get(record.step, {"weights": found})["weights"]
            if found != recorded:
                problems.append(f"{record.weights}: holds other weights than the ledger records")
    except StoreError as error:
        problems.append(str(error))
    return problems


def _is_another(kernel: Kernel, expected: Kernel) -> bool:
    most = _GRAM_TOLERANCE * float(expected.eigenvalues.abs().max())
    far = float((kernel.gram() - expected.gram()).abs().max())
    means = float((kernel.mean - expected.mean).abs().max())
    return not (far <= most and abs(kernel.trace - expected.trace) <= most and means**2 <= most)
