"""What a ledger's entries add up to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ctrak_lightning.errors import CorruptStoreError
from ctrak_lightning.provenance.ledger import Entry
from ctrak_lightning.store.files import FileRecord

HEADER_FIELDS = ("method", "projection", "model", "dim", "dtype")
"""What a run's entry has of the store's header; the dataset has an entry of its own."""

RUN_FIELDS = (
    "run_id",
    "header",
    "step",
    "epoch",
    "base_model",
    "code",
    "configuration",
    "seeds",
    "hardware",
    "parent",
)
PARENT_FIELDS = ("path", "relative", "run_id", "entries", "head", "step", "weights")


@dataclass(kw_only=True)
class History:
    """The state of a store that its ledger describes."""

    runs: list[Entry] = field(default_factory=list)
    """``run_begun`` and ``run_resumed``, in order."""
    ends: list[Entry] = field(default_factory=list)
    """``run_ended`` and ``run_failed``, in order."""
    dataset: dict[str, Any] | None = None
    """Facts of the dataset as it is now, without the samples that were forgotten."""
    checkpoints: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Facts of the checkpoints as they are now, by step."""
    tombstones: list[str] = field(default_factory=list)
    """The commitments to the samples that were forgotten."""
    queries: list[Entry] = field(default_factory=list)
    forgets: list[Entry] = field(default_factory=list)
    made: dict[int, Entry] = field(default_factory=dict)
    """The entries of the checkpoints that are there, by step."""

    @property
    def run_id(self) -> str | None:
        """Of the store that the ledger is of."""
        return self.runs[0].facts["run_id"] if self.runs else None

    @property
    def edition(self) -> int:
        """Of the store's files."""
        return 0 if self.dataset is None else int(self.dataset["edition"])

    def files(self) -> dict[str, FileRecord]:
        """Every file that the ledger vouches for, by path relative to the store; but for the
        commitments with digests that are :func:`~ctrak_lightning.provenance.commitments.salted`."""
        found = {}
        if self.dataset is not None:
            for name in ("samples", "commitments"):
                found[self.dataset[name]["path"]] = _file(self.dataset[name])
        for facts in self.checkpoints.values():
            found |= {path: _file(known) for path, known in facts["files"].items()}
        return found

    def _take(self, entry: Entry) -> None:
        facts = entry.facts
        if entry.kind in ("run_begun", "run_resumed"):
            if facts["run_id"] != (self.run_id or facts["run_id"]):
                raise ValueError(
                    f"run_id is {facts['run_id']!r}, the first run's is {self.run_id!r}"
                )
            _check_run(facts)
            self.runs.append(entry)
        elif entry.kind in ("run_ended", "run_failed"):
            self.ends.append(entry)
        elif entry.kind == "dataset":
            if self.dataset is not None:
                raise ValueError(
                    "the samples have been described before; only a `forget` changes them"
                )
            self.dataset = _dataset(facts)
        elif entry.kind == "checkpoint":
            if int(facts["step"]) in self.checkpoints:
                raise ValueError(
                    f"checkpoint {facts['step']} was recorded before and not discarded since"
                )
            self.checkpoints |= _checkpoints([facts])
            self.made[int(facts["step"])] = entry
        elif entry.kind == "discarded":
            for step in facts["steps"]:
                del self.checkpoints[step]
                self.made.pop(step, None)
        elif entry.kind == "query":
            self.queries.append(entry)
        elif entry.kind == "forget":
            expected = self.edition + 1
            if (
                self.dataset is None
                or not facts["edition"] == facts["dataset"]["edition"] == expected
            ):
                raise ValueError(f"edition is {facts['edition']!r}, expected {expected}")
            self.dataset = _dataset(facts["dataset"])
            self.forgets.append(entry)
            self.checkpoints = _checkpoints(facts["checkpoints"])
            self.tombstones += facts["tombstones"]


def replay(entries: Sequence[Entry]) -> History:
    """What the entries of a ledger add up to.

    Raises:
        CorruptStoreError: an entry's facts are not those of its kind: no library wrote it.
    """
    history = History()
    for entry in entries:
        try:
            history._take(entry)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CorruptStoreError(
                f"entry {entry.sequence} of the ledger ({entry.kind}) has facts that such an entry "
                f"does not have ({error!r}). HINT: it was not written by this version of "
                "ctrak-lightning; restore the ledger from a copy."
            ) from error
    return history


def _check_run(facts: dict[str, Any]) -> None:
    parent = facts["parent"]
    for name, part, keys in (
        ("the entry", facts, RUN_FIELDS),
        ("header", facts["header"], HEADER_FIELDS),
        ("base_model", facts["base_model"], ("name", "revision", "frozen", "trained")),
        ("code", facts["code"], ("python", "packages", "git")),
        ("parent", parent, PARENT_FIELDS if parent is not None else ()),
        (
            "git",
            facts["code"]["git"],
            ("commit", "dirty") if facts["code"]["git"] is not None else (),
        ),
    ):
        if (part or {}).keys() != set(keys):
            raise KeyError(name)


def _dataset(facts: dict[str, Any]) -> dict[str, Any]:
    for name in ("samples", "commitments"):
        _file(facts[name])
    return facts


def _checkpoints(each: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    for facts in each:
        for known in facts["files"].values():
            _file(known)
    return {int(facts["step"]): facts for facts in each}


def _file(known: dict[str, Any]) -> FileRecord:
    return FileRecord(sha256=str(known["sha256"]), bytes=int(known["bytes"]))
