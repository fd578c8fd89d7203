"""Runs that go on from one another."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ctrak_lightning.errors import StoreError
from ctrak_lightning.model.fingerprint import weights_digest
from ctrak_lightning.provenance.history import replay
from ctrak_lightning.provenance.ledger import Entry, Ledger
from ctrak_lightning.store.manifest import read_manifest
from ctrak_lightning.store.store import read_weights


def parent_facts(path: str | Path, child: Path, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the first entry of a run says of the run that it goes on from, whose store is at
    ``path``; ``parameters`` are all of the ``child``'s, before it trains.

    Returns:
        The parent's ``path`` as given and ``relative`` to the child's store, ``run_id``,
        ``entries``, ``head`` (the hash of its ledger's last entry), the ``step`` of its last
        checkpoint, and ``weights``: ``"equal"`` or ``"different"`` to that checkpoint's, or
        ``"not comparable"`` where it stored none or the child lacks a parameter of that name.

    Raises:
        StoreError: it has no ledger.
    """
    entries = Ledger(path).entries()
    history = replay(entries)
    if not entries or history.run_id is None:
        raise StoreError(
            f"{path}: its ledger has no run. HINT: name the store of a run that was recorded."
        )
    step = max(history.checkpoints, default=-1)
    recorded = history.checkpoints[step]["weights"] if history.checkpoints else None
    return {
        "path": str(path),
        "relative": Path(os.path.relpath(path, child)).as_posix(),
        "run_id": history.run_id,
        "entries": len(entries),
        "head": entries[-1].sha256,
        "step": step if history.checkpoints else None,
        "weights": "not comparable"
        if recorded is None
        else _compared(Path(path), step, recorded, parameters),
    }


def _compared(parent: Path, step: int, recorded: str, parameters: Mapping[str, Tensor]) -> str:
    manifest = read_manifest(parent)
    record = manifest.find(step)
    if record is None or record.weights not in manifest.files:
        return "not comparable"
    names = read_weights(parent / record.weights, manifest.files[record.weights]).keys()
    if names - parameters.keys():
        return "not comparable"
    same = weights_digest({name: parameters[name] for name in names}) == recorded
    return "equal" if same else "different"


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One run of a lineage."""

    path: Path
    """Its store, as it was found or looked for."""
    run_id: str
    entries: list[Entry]
    """Of its ledger; empty where it was not found."""
    weights: str | None
    """What its own ledger says of the weights that it started with, against its parent's last
    checkpoint: ``"equal"``, ``"different"`` or ``"not comparable"``; None without a parent."""
    problems: list[str]
    """What is missing, or is not what the run that goes on from it has recorded."""


def lineage(path: str | Path) -> list[Link]:
    """The run of a store, its parent's, and so on: as far as the stores can be found, by the path
    that was recorded, as it was given or relative to the child's store.

    Raises:
        StoreError: the store has no ledger.
        CorruptStoreError: its ledger is damaged. (A parent's is among its ``problems``.)
    """
    root = Path(path)
    entries = Ledger(root).entries()
    found = [_link(root, entries)]
    while (parent := _parent_of(found[-1].entries)) is not None:
        link = _followed(found[-1].path, parent)
        looped = any(link.entries and known.run_id == link.run_id for known in found)
        if looped:
            link = replace(link, entries=[], problems=["is a run that comes before: a circle"])
        found.append(link)
    return found


def _followed(child: Path, parent: dict[str, Any]) -> Link:
    places = [Path(parent["path"]), child / parent["relative"]]
    root = next((place for place in places if Ledger(place).exists), None)
    run_id, count = str(parent["run_id"]), int(parent["entries"])
    missing = Link(path=places[0], run_id=run_id, entries=[], weights=None, problems=[])
    if root is None:
        return replace(missing, problems=["its store is not there, or has no ledger"])
    try:
        entries = Ledger(root).entries()
        link = _link(root, entries)
    except StoreError as error:
        return replace(missing, path=root, problems=[str(error)])
    if link.run_id != run_id:
        problem = f"the store that is there is of another run, {link.run_id}"
        return replace(missing, path=root, problems=[problem])
    if len(entries) < count:
        link.problems.append(
            f"its ledger has {len(entries)} entries, {count} were there when its child began"
        )
    elif entries[count - 1].sha256 != parent["head"]:
        link.problems.append(
            f"entry {count - 1} of its ledger is not the one that was its head when its child began"
        )
    return link


def _link(root: Path, entries: list[Entry]) -> Link:
    parent = _parent_of(entries)
    return Link(
        path=root,
        run_id=replay(entries).run_id or "",
        entries=entries,
        weights=None if parent is None else parent["weights"],
        problems=[],
    )


def _parent_of(entries: Sequence[Entry]) -> dict[str, Any] | None:
    runs = replay(entries).runs
    return next((run.facts["parent"] for run in runs if run.facts["parent"] is not None), None)
