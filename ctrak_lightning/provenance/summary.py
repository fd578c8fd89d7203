"""A ledger in a few lines, for reports and model cards."""

from __future__ import annotations

from typing import Any

from ctrak_lightning.provenance.history import History, replay
from ctrak_lightning.provenance.ledger import Ledger
from ctrak_lightning.provenance.signature import read_signature
from ctrak_lightning.traces import TraceStore


def block(store: TraceStore) -> dict[str, str]:
    """What a store's ledger says of where its traces come from, as labels and texts in the order in
    which to show them.

    Nothing is recomputed: :func:`~ctrak_lightning.provenance.verify` does that.

    Raises:
        CorruptStoreError: the ledger is damaged.
    """
    ledger = Ledger(store.path)
    if not ledger.exists:
        return {"Run": store.run_id, "Ledger": "none: attach ProvenanceRecorder to keep one"}
    entries = ledger.entries()
    history = replay(entries)
    found = {"Run": history.run_id or store.run_id} | _run(history)
    if history.dataset is not None:
        found["Samples"] = (
            f"{history.dataset['size']} in the store, {len(history.tombstones)} forgotten"
        )
        found["Dataset digest"] = str(history.dataset["commitments"]["root"])
    found["Checkpoints"] = (
        ", ".join(f"step {step}" for step in sorted(history.checkpoints)) or "none"
    )
    found["Questions recorded"] = str(len(history.queries))
    found["Ledger"] = f"{len(entries)} entries"
    found["Ledger head"] = entries[-1].sha256 if entries else "none"
    found["Signature"] = _signature(ledger, len(entries))
    return found


def _run(history: History) -> dict[str, str]:
    if not history.runs:
        return {}
    first, last = history.runs[0].facts, history.runs[-1].facts
    base, code, parent = first["base_model"], last["code"], first["parent"]
    found = {"Begun": history.runs[0].time}
    if len(history.runs) > 1:
        found["Resumed"] = f"{len(history.runs) - 1} times, last at {history.runs[-1].time}"
    found["Base model"] = _model(base)
    found["Base model, frozen weights"] = str(base["frozen"])
    found["Base model, trained weights at the start"] = str(base["trained"])
    if parent is not None:
        found["Parent run"] = (
            f"{parent['run_id']}, weights {parent['weights']} to its last checkpoint's"
        )
    found["Code"] = ", ".join(
        f"{name} {version}" for name, version in sorted(code["packages"].items())
    )
    found["Commit"] = _commit(code["git"])
    return found


def _model(base: dict[str, Any]) -> str:
    name = str(base["name"] or "not named")
    return f"{name}, revision {base['revision']}" if base["revision"] else name


def _commit(git: dict[str, Any] | None) -> str:
    if git is None:
        return "none: the run was not started in a git repository"
    state = {True: ", with changes that are not committed", False: "", None: ", state unknown"}
    return f"{git['commit']}{state[git['dirty']]}"


def _signature(ledger: Ledger, entries: int) -> str:
    document = read_signature(ledger.root)
    if document is None:
        return "none"
    if "problem" in document:
        return f"damaged: {document['problem']}"
    later = entries - document["entries"]
    since = f", {later} later ones not" if later > 0 else ""
    return (
        f"the first {document['entries']} entries{since}, by {document['public_key']} (not "
        "checked here)"
    )
