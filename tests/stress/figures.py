"""Result files of the stress scripts: what was found, and the command, machine and versions that
found it."""

import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import h5py
import lightning
import torch

RESULTS = Path(__file__).parent / "results"


def keep(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> None:
    """Writes ``<name>.json`` and prints it."""
    module = sys.modules["__main__"].__spec__
    given = sys.argv[1:]
    if "--results" in given:  # where they go says nothing of how they were made
        at = given.index("--results")
        given = given[:at] + given[at + 2 :]
    command = shlex.join(["python", "-m", module.name if module else sys.argv[0], *given])
    versions = {
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "h5py": h5py.__version__,
    }
    facts = {
        "command": command,
        "machine": f"{platform.machine()}, {platform.system()}, {torch.get_num_threads()} thread(s)",
        "versions": versions | {"python": platform.python_version()},
        "found": figures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=1))
