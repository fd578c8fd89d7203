"""Forgets that SIGKILL themselves at every sixth step; each runs in a fork, so torch is imported
once. Writes a JSON report."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from ctrak_lightning import TraceStore
from ctrak_lightning.provenance import forget, verify
from ctrak_lightning.provenance.forgetting import finish

from ..store.store_builder import read_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "store"))

from crash_worker import in_fork

from .builder import recorded
from .test_forget import GONE, Partial


def check(path: Path, original: Path) -> None:
    """The store opens as the old one or the new one, and is made whole."""
    is_new = GONE[0] not in TraceStore(path).samples.sample_ids
    finish(path)
    assert verify(path) == []
    if not is_new:
        old = read_bytes(original)
        assert {name: data for name, data in read_bytes(path).items() if name in old} == old
    (path.parent / f"{path.name}.state").write_text("new" if is_new else "old")


def main(folder: Path) -> None:
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    original, bad, states = folder / "original", [], []
    in_fork(recorded, original, Partial(steps=(300,), visits=True))
    for tick in range(1, 1000, 6):
        path = shutil.copytree(original, folder / str(tick))
        status = in_fork(forget, path, GONE, kill_tick=tick)
        if status == 0:
            break
        checked = in_fork(check, path, original)
        if (status, checked) != (-signal.SIGKILL, 0):
            bad.append([tick, status, checked])
        else:
            states.append((folder / f"{tick}.state").read_text())
    json.dump({"bad": bad, "old": states.count("old"), "new": states.count("new")}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
