"""The facts of a run as they stand in its ledger, and whether a store still agrees with them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ctrak_lightning.errors import CorruptStoreError, listed
from ctrak_lightning.model.fingerprint import weights_digest
from ctrak_lightning.provenance.commitments import (
    Commitments,
    read_commitments,
    salted,
    write_commitments,
)
from ctrak_lightning.provenance.history import HEADER_FIELDS, History
from ctrak_lightning.store.arrays import check_digest, corrupt
from ctrak_lightning.store.files import FileRecord, sha256_of, write_atomically
from ctrak_lightning.store.samples import SAMPLE_FACTS, SampleTable, read_samples
from ctrak_lightning.store.schema import (
    COMMITMENTS,
    CheckpointRecord,
    Manifest,
    StoreHeader,
    differences,
    edition_name,
)
from ctrak_lightning.store.store import read_weights

_RECORD_FIELDS = ("step", "epoch", "learning_rate", "rows", "processes", "edition", "shards")


def header_facts(header: StoreHeader) -> dict[str, Any]:
    """What a run's entry has of the store's header."""
    return {name: value for name, value in header.to_dict().items() if name in HEADER_FIELDS}


def dataset_facts(
    manifest: Manifest, table: SampleTable, commitments: dict[str, Any], salt: bytes = b""
) -> dict[str, Any]:
    """What is said of the samples: nothing from which one could be recognised, once its salt and
    the edition's ``salt`` are gone."""
    return {
        "edition": manifest.edition,
        "size": len(table),
        "columns": sorted(table.metadata),
        "thumbnails": table.thumbnails is not None,
        "samples": samples_facts(manifest, salt),
        "commitments": commitments,
        "header": other_facts(manifest.header),
    }


def samples_facts(manifest: Manifest, salt: bytes) -> dict[str, Any]:
    """What is said of the file of the sample table; ``salt`` is the edition's."""
    return {"path": manifest.samples, **_salted_file(manifest.files[manifest.samples], salt)}


def other_facts(header: StoreHeader) -> dict[str, Any]:
    """What a store's header says of its data set and the sample table does not."""
    return {name: value for name, value in header.dataset.items() if name not in SAMPLE_FACTS}


def checkpoint_facts(
    manifest: Manifest, record: CheckpointRecord, weights: str | None, salt: bytes = b""
) -> dict[str, Any]:
    """What is said of a sealed checkpoint; ``weights`` is their digest, if they are stored,
    ``salt`` the edition's."""
    owned = sorted({*record.companions, record.kernel, *record.shards} & manifest.files.keys())
    files = {path: _salted_file(manifest.files[path], salt) for path in owned}
    known = {name: getattr(record, name) for name in _RECORD_FIELDS} | {
        "shards": list(record.shards)
    }
    return known | {"weights": weights, "files": files}


def forget_facts(root: Path, manifest: Manifest, history: History) -> dict[str, Any]:
    """What is said of the forgetting that made the manifest's edition of what ``history`` ends
    with."""
    assert history.dataset is not None
    before = stored_commitments(root, history.dataset)
    table = stored_table(root, manifest)
    path = root / edition_name(COMMITMENTS, manifest.edition)
    after = read_commitments(path, len(table))
    stay = set(after.hexadecimal())
    tombstones = [known for known in before.hexadecimal() if known not in stay]
    if len(tombstones) != len(before) - len(after):
        raise CorruptStoreError(
            f"{path} has commitments that the edition before did not have. HINT: restore the store "
            "from a copy."
        )
    if changed := after.differing(table):
        raise CorruptStoreError(
            f"{root / manifest.samples} has {len(changed)} samples that are not those of the "
            f"edition before: {listed(table.sample_ids[i] for i in changed)}. HINT: restore the "
            "store from a copy."
        )
    known = history.checkpoints
    return {
        "edition": manifest.edition,
        "tombstones": tombstones,
        "dataset": dataset_facts(manifest, table, commitment_facts(path, after), after.salt),
        "checkpoints": [
            checkpoint_facts(
                manifest,
                record,
                known[record.step]["weights"]
                if record.step in known
                else stored_digest(root, manifest, record),
                after.salt,
            )
            for record in manifest.checkpoints
            if record.sealed
        ],
    }


def put_commitments(root: Path, edition: int, commitments: Commitments) -> dict[str, Any]:
    """Write the commitments of an edition; returns what is said of the file."""
    name = edition_name(COMMITMENTS, edition)
    known = write_atomically(root / name, lambda path: write_commitments(path, commitments))
    return _commitment_facts(name, known, commitments)


def commitment_facts(path: Path, commitments: Commitments) -> dict[str, Any]:
    """What is said of the file of commitments at ``path``."""
    return _commitment_facts(path.name, FileRecord.of(path), commitments)


def stored_commitments(root: Path, dataset: dict[str, Any]) -> Commitments:
    """The commitments of the dataset that an entry describes."""
    known = dataset["commitments"]
    path = root / edition_name(COMMITMENTS, int(dataset["edition"]))
    try:
        found = sha256_of(path)
    except OSError as error:
        raise corrupt(path, f"cannot be read ({error})") from error
    if found != known["sha256"]:
        raise corrupt(path, f"sha256 is {found}, the ledger records {known['sha256']}")
    return read_commitments(path, int(dataset["size"]))


def stored_table(root: Path, manifest: Manifest) -> SampleTable:
    """The sample table that a manifest records."""
    check_digest(root / manifest.samples, manifest.files[manifest.samples])
    return read_samples(root / manifest.samples)


def stored_digest(root: Path, manifest: Manifest, record: CheckpointRecord) -> str | None:
    """The digest of a checkpoint's weights, or None where they are not stored."""
    if record.weights not in manifest.files:
        return None
    return weights_digest(read_weights(root / record.weights, manifest.files[record.weights]))


def _salted_file(known: FileRecord, salt: bytes) -> dict[str, Any]:
    return {"sha256": salted(known.sha256, salt), "bytes": known.bytes}


def _commitment_facts(name: str, known: FileRecord, commitments: Commitments) -> dict[str, Any]:
    return {"path": name, **asdict(known), "root": commitments.root()}


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
        found += _differing("manifest.json: header", stored, header_facts(manifest.header))
    if history.dataset is None or is_pending(manifest, history):
        return found
    if manifest.edition != history.edition:
        return [
            *found,
            f"manifest.json: edition is {manifest.edition}, the ledger records {history.edition}: "
            "samples were forgotten, or brought back, without an entry",
        ]
    found += _differing(
        "manifest.json: header.dataset", history.dataset["header"], other_facts(manifest.header)
    )
    if salt is None:
        return found
    mine = samples_facts(manifest, salt) if manifest.samples in manifest.files else None
    found += _differing("manifest.json: samples", history.dataset["samples"], mine)
    for record in _sealed(manifest):
        if record.step in history.checkpoints:
            recorded = history.checkpoints[record.step]
            now = checkpoint_facts(manifest, record, recorded["weights"], salt)
            found += _differing(f"manifest.json: checkpoint {record.step}", recorded, now)
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


def _differing(where: str, recorded: Any, now: Any) -> list[str]:
    return [
        f"{name} is {mine!r}, the ledger records {theirs!r}"
        for name, theirs, mine in differences(recorded, now, where)
    ]
