"""Runs that go on from one another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ctrak_lightning.errors import StoreError
from ctrak_lightning.fingerprint import weights_digest
from ctrak_lightning.provenance.history import replay
from ctrak_lightning.provenance.ledger import Ledger
from ctrak_lightning.traces.manifest import read_manifest
from ctrak_lightning.traces.store import read_weights


def parent_facts(path: str | Path, child: Path, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the first entry of a run says of the run that it goes on from.

    Args:
        path: the parent's store.
        child: the store of the run itself.
        parameters: all of the child's, by name, before it trains.

    Returns:
        The parent's ``path`` as given and ``relative`` to the child's store, ``run_id``, ``entries``, ``head`` (the hash of its ledger's last entry), the ``step`` of its last
        checkpoint, and ``weights``: ``"equal"`` or ``"different"`` to that checkpoint's, or ``"not comparable"`` where it stored
        none or the child lacks a parameter of that name.

    Raises:
        StoreError: it has no ledger.
    """
    entries = Ledger(path).entries()
    history = replay(entries)
    if not entries or history.run_id is None:
        raise StoreError(f"{path}: its ledger has no run. HINT: name the store of a run that was recorded.")
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
