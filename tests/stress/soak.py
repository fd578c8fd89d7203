"""Fine-tunes with traces and a question each, one after the other in one process, for hours: memory
and handles must stay flat.

python -m tests.stress.soak --minutes 120

The figures after the first tenth (when every library has its caches) are held against those of the
last tenth.
"""

import argparse
import gc
import logging
import shutil
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ctrak_lightning import Attributor, Concept, Sampler
from tests.stress.figures import RESULTS, keep
from tests.stress.subject import fine_tune
from tests.toy import COLOURS, SHAPES

CONCEPT = Concept(
    COLOURS[0], present={"colour": COLOURS[0], "shape": SHAPES[0]}, absent={"shape": SHAPES[0]}
)


def cycle(folder: Path) -> None:
    """A fine-tune with three captures and a ledger, and a question about it."""
    module = fine_tune(folder)
    Attributor(folder / "traces", module, sampler=Sampler(steps=4)).attribute(CONCEPT).top(3)
    shutil.rmtree(folder)


def soak(root: Path, seconds: float) -> dict[str, Any]:
    """Figures of cycles for so long."""
    process = psutil.Process()
    rows: list[tuple[float, int, int, int]] = []
    began = time.monotonic()
    while (elapsed := time.monotonic() - began) < seconds or len(rows) < 20:
        cycle(root / "run")
        gc.collect()
        rows.append((elapsed, process.memory_info().rss, process.num_fds(), process.num_threads()))
    tenth = max(1, len(rows) // 10)
    early, late = np.array(rows[tenth : 2 * tenth]), np.array(rows[-tenth:])
    megabytes = np.array([row[1] for row in rows[tenth:]]) / 1e6
    slope = np.polyfit(np.arange(len(megabytes)), megabytes, 1)[0]
    return {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "cycles": len(rows),
        "captures": 3 * len(rows),
        "rss_mb_after_first_tenth": round(float(early[:, 1].mean()) / 1e6, 1),
        "rss_mb_last_tenth": round(float(late[:, 1].mean()) / 1e6, 1),
        "rss_kb_per_cycle": round(1000 * float(slope), 2),
        "file_handles": [int(early[:, 2].max()), int(late[:, 2].max())],
        "threads": [int(early[:, 3].max()), int(late[:, 3].max())],
        "rss_mb_over_time": [round(row[1] / 1e6, 1) for row in rows[:: max(1, len(rows) // 24)]],
    }


def places(root: Path, cycles: int) -> dict[str, Any]:
    """The lines of code whose live Python objects grow with the cycles, by tracemalloc."""
    for _ in range(20):  # whatever is imported and cached once
        cycle(root / "run")
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.take_snapshot()
    for _ in range(cycles):
        cycle(root / "run")
    gc.collect()
    grown = tracemalloc.take_snapshot().compare_to(before, "lineno")
    tracemalloc.stop()
    rows = [
        row for row in grown if row.count_diff >= cycles // 2
    ]  # what comes with every other cycle at least
    return {
        "cycles": cycles,
        "bytes_per_cycle": {
            "/".join(Path(row.traceback[0].filename).parts[-3:])
            + f":{row.traceback[0].lineno}": round(row.size_diff / cycles)
            for row in rows
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument(
        "--places", type=int, default=0, metavar="CYCLES", help="where memory grows, instead"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        if args.places:
            keep("soak_places", places(Path(folder), args.places), args.results)
            return
        keep("soak", soak(Path(folder), 60 * args.minutes), args.results)


if __name__ == "__main__":
    main()
