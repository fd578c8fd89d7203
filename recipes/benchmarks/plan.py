"""What a large run costs, from the constants that `speed` and `scale` measured: time, files, memory, and where it stops.

python -m recipes.benchmarks.plan                            # writes results/plan.json and results/plan.md
python -m recipes.benchmarks.plan --images 3e6 --processes 32 --dim 4096 --checkpoints 6

What was measured is printed first; everything else is arithmetic on it. The size of the sample table is measured here.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ctrak_lightning.store import SampleTable, StoreHeader
from ctrak_lightning.store.samples import read_samples, write_samples
from ctrak_lightning.store.writer import default_shard_rows
from recipes.benchmarks.speed import HALF, memory_kib

RESULTS = Path(__file__).parent / "results"
IMAGES = (1_000_000, 100_000_000, 5_000_000_000)
PROCESSES = (1, 8, 64)
METHODS = ("concept_trak", "concept_trak_norm")
ROW_EXTRA = 28  # bytes beside a row's int8 features: scale, norm, loss, position, checksum
MANIFEST_ENTRY = 215  # bytes that a shard takes in the manifest: its name twice, sha256, size
TABLE_ROWS = 200_000
HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What was measured.

    Args:
        steps_per_state: time of one state of one image in a capture, in training steps of that image, by layers traced.
        seal_s_per_product: seconds of sealing per sample and squared feature, on 2 cores.
        read_gb_s: rows that a search goes through, GB/s a process, for up to 16 questions at once.
        table_bytes: of the sample table on disk, a sample.
        table_memory: of the sample table in memory, a sample.
    """

    steps_per_state: dict[str, float]
    seal_s_per_product: float
    read_gb_s: float
    table_bytes: float
    table_memory: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that is asked about."""

    images: int
    processes: int
    dim: int
    checkpoints: int
    states: int

    def cost(self, measured: Constants) -> dict[str, float]:
        """Hours, gigabytes (10^9 bytes) and counts."""
        row = self.dim + ROW_EXTRA
        rows_gb = self.images * self.checkpoints * row / 1e9
        header = StoreHeader(method={}, projection={}, model={}, dataset={}, dim=self.dim, dtype="int8")
        shards = self.checkpoints * -(-self.images // default_shard_rows(header, self.images))
        seal_s = measured.seal_s_per_product * self.images * self.dim**2 * self.checkpoints
        return {
            "rows_gb": rows_gb,
            "table_gb": self.images * measured.table_bytes / 1e9,
            "table_memory_gb": self.images * measured.table_memory / 1e9,
            "seal_h": seal_s / self.processes / HOUR,
            "search_h": rows_gb / measured.read_gb_s / self.processes / HOUR,
            "shards": shards,
            "manifest_mb": shards * MANIFEST_ENTRY / 1e6,
            # Written anew with every shard, so half of its last size on average.
            "manifest_written_gb": shards**2 * MANIFEST_ENTRY / 2 / 1e9,
        }


def constants(results: Path) -> Constants:
    """From the results of `speed` and `scale`, and the sample table measured now."""
    speed = json.loads((results / "speed.json").read_text("utf-8"))
    scale = json.loads((results / "scale.json").read_text("utf-8"))
    steps = {
        f"{model['name']}, {name.split(',')[0]}; {method}": row["training step"]
        for method in METHODS
        for model in speed["models"].values()
        for name, row in model["rows"].items()
        if name.endswith(f"; {method}, {HALF}")
    }
    [case] = [case for case in scale["cases"] if case["rows"] > case["dim"]]
    on_disk, in_memory = sample_table_bytes(TABLE_ROWS)
    return Constants(
        steps_per_state=steps,
        seal_s_per_product=case["built"]["seal_s"] / case["rows"] / case["dim"] ** 2,
        read_gb_s=min(one["pass_gb_s"] for one in case["measured"] if one["queries"] <= 16),
        table_bytes=on_disk,
        table_memory=in_memory,
    )


def sample_table_bytes(rows: int) -> tuple[float, float]:
    """Bytes of a sample on disk, and in the memory of a process that reads the table: ids, digests, owner and caption, no
    thumbnails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.h5"
        table = SampleTable(
            [f"part-{i // 10000:05d}/image-{i:012d}.jpg" for i in range(rows)],
            [f"{i:064x}" for i in range(rows)],
            {
                "owner": [f"owner {i % 5000}" for i in range(rows)],
                "caption": [f"a picture of thing {i} in the style of {i % 997}" for i in range(rows)],
            },
        )
        write_samples(path, table)
        command = [sys.executable, "-m", "recipes.benchmarks.plan", "--read-table", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return path.stat().st_size / rows, float(done.stdout.split()[0]) / rows


def print_table_memory(path: Path) -> None:
    before = memory_kib("VmRSS")
    table = read_samples(path)
    # The table is named after the second look, so that it is still held then.
    print(1024 * (memory_kib("VmRSS") - before), len(table))


def page(measured: Constants, plans: Sequence[tuple[Plan, dict[str, float]]], facts: dict[str, Any]) -> str:
    first = plans[0][0]
    lines = [
        f"`{facts['command']}`; {facts['machine']}; constants measured there, on two cores of a virtual machine.",
        "",
        "### Measured",
        "",
        "| constant | value |",
        "|---|---|",
        *(
            f"| one state of one image, in training steps of that image ({name}) | {value:.2f} |"
            for name, value in measured.steps_per_state.items()
        ),
        f"| sealing (Gram matrix), seconds per 10^6 images at {first.dim:,} features | "
        f"{measured.seal_s_per_product * 1e6 * first.dim**2:,.0f} |",
        f"| search, GB/s a process, up to 16 questions at once | {measured.read_gb_s:.2f} |",
        f"| sample table (ids, digests, owner, caption), bytes a sample on disk | {measured.table_bytes:,.0f} |",
        f"| the same in memory, of a process that reads it | {measured.table_memory:,.0f} |",
        "",
        "### Tracing",
        "",
        "Does not depend on the number of images, nor on the machine, if all is expressed in passes over the training set:",
        "",
        f"| traced | {first.states} states, {first.checkpoints} checkpoints: costs as much as training for |",
        "|---|---|",
        *(
            f"| {name} | {value * first.states * first.checkpoints:.0f} epochs |"
            for name, value in measured.steps_per_state.items()
        ),
        "",
        f"### Storing and searching: int8 rows of {first.dim:,}, {first.checkpoints} checkpoints",
        "",
        "| images | processes | rows | sample table | the table in each process's memory | sealing, all checkpoints | a search | "
        "files | manifest | written of it in all, by one process |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for plan, cost in plans:
        lines.append(
            f"| {plan.images:,} | {plan.processes} | {_bytes(cost['rows_gb'])} | {_bytes(cost['table_gb'])} | "
            f"{_bytes(cost['table_memory_gb'])} | {_time(cost['seal_h'])} | {_time(cost['search_h'])} | "
            f"{cost['shards']:,.0f} | {_bytes(cost['manifest_mb'] / 1e3)} | "
            f"{_bytes(cost['manifest_written_gb'])} |"
        )
    return "\n".join(lines) + "\n"


def _bytes(gb: float) -> str:
    for unit, size in (("TB", 1e3), ("GB", 1.0), ("MB", 1e-3)):
        if gb >= size:
            return f"{gb / size:,.1f} {unit}"
    return f"{gb * 1e6:,.0f} KB"


def _time(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.0f} days"
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:,.1f} min" if hours >= 1 / 60 else f"{HOUR * hours:,.1f} s"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", nargs="+", type=float, default=list(IMAGES))
    parser.add_argument("--processes", nargs="+", type=int, default=list(PROCESSES))
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument("--states", type=int, default=5, help="timesteps per image and checkpoint")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--read-table", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.read_table:
        print_table_memory(args.read_table)
        return
    measured = constants(args.results)
    plans = [
        Plan(
            images=int(images),
            processes=processes,
            dim=args.dim,
            checkpoints=args.checkpoints,
            states=args.states,
        )
        for images in args.images
        for processes in args.processes
    ]
    costs = [(plan, plan.cost(measured)) for plan in plans]
    facts = {
        "command": f"python -m recipes.benchmarks.plan --images {' '.join(f'{images:.0f}' for images in args.images)} "
        f"--processes {' '.join(map(str, args.processes))} --dim {args.dim} --checkpoints {args.checkpoints} "
        f"--states {args.states}",
        "machine": platform.machine(),
        "measured": asdict(measured),
        "plans": [asdict(plan) | cost for plan, cost in costs],
    }
    text = page(measured, costs, facts)
    (args.results / "plan.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (args.results / "plan.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
