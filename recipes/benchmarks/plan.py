"""What a large run costs, from the constants that `speed` and `scale` measured: time, files,
memory, and where it stops.

python -m recipes.benchmarks.plan
python -m recipes.benchmarks.plan --images 3e6 --processes 32 --dim 4096 --checkpoints 6

What was measured is printed first; everything else is arithmetic on it. The size of the sample
table is measured here.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrak_lightning.store import SampleTable, StoreHeader
from ctrak_lightning.store.samples import read_samples, write_samples
from ctrak_lightning.store.writer import default_shard_rows

from .speed import HALF, memory_kib
from .tables import command_of, grid, machine, parser_of, publish

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
        steps_per_state: time of one state of one image in a capture, in training steps of that
            image, by layers traced.
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
        facts: dict[str, Any] = {"method": {}, "projection": {}, "model": {}, "dataset": {}}
        header = StoreHeader(**facts, dim=self.dim, dtype="int8")
        shards = self.checkpoints * -(-self.images // default_shard_rows(header, self.images))
        seal_s = measured.seal_s_per_product * self.images * self.dim**2 * self.checkpoints
        return {
            "rows_gb": rows_gb,
            "table_gb": self.images * measured.table_bytes / 1e9,
            "table_memory_gb": self.images * measured.table_memory / 1e9,
            "seal_h": seal_s / self.processes / HOUR,
            "search_h": rows_gb / measured.read_gb_s / self.processes / HOUR,
            "shards": shards,
            "manifest_gb": shards * MANIFEST_ENTRY / 1e9,
            # Written anew with every shard, so half of its last size on average.
            "manifest_written_gb": shards**2 * MANIFEST_ENTRY / 2 / 1e9,
        }


def constants(results: Path) -> Constants:
    """From the pages of `speed` and `scale`, and the sample table measured now."""
    steps = {}
    for network in (results / "speed.md").read_text("utf-8").split("### ")[1:]:
        for row in rows_of(network):
            layers, _, method = row["work"].partition("; ")
            name = f"{network.split(' (')[0]}, {layers.split(',')[0]}; "
            if method.endswith(HALF):
                steps[name + method.removesuffix(f", {HALF}")] = float(row["/ training step"])
    scale = (results / "scale.md").read_text("utf-8")
    searched, written = (rows_of(part) for part in scale.split("\n\n")[1:3])
    images, dim = (
        int(size.replace(",", "")) for size in written[0]["rows x features"].split(" x ")
    )
    speeds = [row for row in searched if row["rows x features"] == written[0]["rows x features"]]
    on_disk, in_memory = sample_table_bytes(TABLE_ROWS)
    ordered = sorted(steps.items(), key=lambda item: METHODS.index(item[0].split("; ")[1]))
    return Constants(
        steps_per_state=dict(ordered),
        seal_s_per_product=float(written[0]["sealed in, s"]) / images / dim**2,
        read_gb_s=min(
            float(row["scoring pass, GB/s"]) for row in speeds if int(row["queries"]) <= 16
        ),
        table_bytes=on_disk,
        table_memory=in_memory,
    )


def rows_of(text: str) -> list[dict[str, str]]:
    """The rows of a Markdown table."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=False)) for line in lines[1:]]


def sample_table_bytes(rows: int) -> tuple[float, float]:
    """Bytes of a sample on disk, and in the memory of a process that reads the table: ids, digests,
    owner and caption, no thumbnails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.h5"
        columns = {
            "owner": [f"owner {i % 5000}" for i in range(rows)],
            "caption": [f"a picture of thing {i} in the style of {i % 997}" for i in range(rows)],
        }
        ids = [f"part-{i // 10000:05d}/image-{i:012d}.jpg" for i in range(rows)]
        write_samples(path, SampleTable(ids, [f"{i:064x}" for i in range(rows)], columns))
        command = [sys.executable, "-m", "recipes.benchmarks.plan", "--read-table", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return path.stat().st_size / rows, float(done.stdout.split()[0]) / rows


def print_table_memory(path: Path) -> None:
    before = memory_kib("VmRSS")
    table = read_samples(path)
    # The table is named after the second look, so that it is still held then.
    print(1024 * (memory_kib("VmRSS") - before), len(table))


def page(head: str, measured: Constants, plans: Sequence[Plan]) -> str:
    first = plans[0]
    state = "one state of one image, in training steps of that image"
    sealing = f"{measured.seal_s_per_product * 1e6 * first.dim**2:,.0f}"
    on_disk = "sample table (ids, digests, owner, caption), bytes a sample on disk"
    known = [
        *(
            (f"{state} ({name})", f"{value:.2f}")
            for name, value in measured.steps_per_state.items()
        ),
        (f"sealing (Gram matrix), seconds per 10^6 images at {first.dim:,} features", sealing),
        ("search, GB/s a process, up to 16 questions at once", f"{measured.read_gb_s:.2f}"),
        (on_disk, f"{measured.table_bytes:,.0f}"),
        ("the same in memory, of a process that reads it", f"{measured.table_memory:,.0f}"),
    ]
    passes = first.states * first.checkpoints
    traced = [
        (name, f"{value * passes:.0f} epochs") for name, value in measured.steps_per_state.items()
    ]
    stored = []
    for plan in plans:
        cost = plan.cost(measured)
        sizes = [_bytes(cost[key]) for key in ("rows_gb", "table_gb", "table_memory_gb")]
        times = [_time(cost[key]) for key in ("seal_h", "search_h")]
        manifest = [_bytes(cost[key]) for key in ("manifest_gb", "manifest_written_gb")]
        counts = [f"{plan.images:,}", plan.processes]
        stored.append([*counts, *sizes, *times, f"{cost['shards']:,.0f}", *manifest])
    heads = ("images", "processes", "rows", "sample table")
    more = ("the table in each process's memory", "sealing, all checkpoints", "a search", "files")
    last = ("manifest", "written of it in all, by one process")
    costs = f"{first.states} states, {first.checkpoints} checkpoints: costs as much as training for"
    lines = [
        head,
        "",
        "### Measured",
        "",
        *grid(("constant", "value"), known),
        "",
        "### Tracing",
        "",
        "Does not depend on the number of images, nor on the machine, if all is expressed in "
        "passes over the training set:",
        "",
        *grid(("traced", costs), traced),
        "",
        f"### Storing and searching: int8 rows of {first.dim:,}, {first.checkpoints} checkpoints",
        "",
        *grid((*heads, *more, *last), stored),
    ]
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
    parser = parser_of("recipes.benchmarks.plan", __doc__)
    parser.add_argument("--images", nargs="+", type=float, default=list(IMAGES))
    parser.add_argument("--processes", nargs="+", type=int, default=list(PROCESSES))
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument("--states", type=int, default=5, help="timesteps per image and checkpoint")
    parser.add_argument("--read-table", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.read_table:
        print_table_memory(args.read_table)
        return
    run = {"dim": args.dim, "checkpoints": args.checkpoints, "states": args.states}
    plans = [
        Plan(images=int(images), processes=processes, **run)
        for images in args.images
        for processes in args.processes
    ]
    head = (
        f"`{command_of(parser, args)}`; {machine()}; constants measured on two cores of a virtual "
    )
    publish(args.results / "plan.md", page(head + "machine.", constants(args.results), plans))


if __name__ == "__main__":
    main()
