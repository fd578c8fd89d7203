"""Small recorded stores that the tests change, and what they have in common."""

from pathlib import Path
from typing import Any

from ctrak_lightning.provenance.recording import record_run
from ctrak_lightning.provenance.run_facts import header_facts
from ctrak_lightning.store.manifest import read_manifest

from ..store.store_builder import Capture


def run_facts(path: Path, **changes: Any) -> dict[str, Any]:
    """What a run's entry says, with little in it."""
    manifest = read_manifest(path)
    facts: dict[str, Any] = {
        "run_id": manifest.run_id,
        "header": header_facts(manifest.header),
        "step": 0,
        "epoch": 0,
        "base_model": {
            "name": "base/model",
            "revision": "r1",
            "frozen": "f" * 64,
            "trained": "0" * 64,
        },
        "code": {
            "python": "3.11",
            "packages": {"torch": "2.0"},
            "git": {"commit": "c" * 40, "dirty": True},
        },
        "configuration": {"rank": 4},
        "seeds": {"torch": 1, "environment": {}},
        "hardware": {"machine": "x"},
        "parent": None,
    }
    return facts | changes


def recorded(path: Path, capture: Capture | None = None, **changes: Any) -> Path:
    """A store at ``path`` with a ledger: a run, its dataset and its checkpoints."""
    (capture or Capture()).run(path)
    record_run(path, run_facts(path, **changes), resumed=False)
    return path
