"""A store and its ledger, read together: what the exports are made of."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from ctrak_lightning.provenance.history import History, replay
from ctrak_lightning.provenance.ledger import Ledger
from ctrak_lightning.provenance.recording import require_agreement
from ctrak_lightning.traces import IncompleteStoreWarning, TraceStore
from ctrak_lightning.traces.manifest import read_manifest


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
