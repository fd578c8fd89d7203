"""Scoring a store that is larger than memory: throughput beside a plain read of the same files,
memory and top-k.

python -m recipes.benchmarks.scale --rows 1000000 --dim 4096

The traces are synthetic: 64 directions of decaying size and noise.
"""

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.attribution.scoring import Dots, has_integer_products
from ctrak_lightning.attribution.search import Best, top_scores
from ctrak_lightning.methods.damping import Fixed
from ctrak_lightning.store import Checkpoint, SampleTable, StoreHeader, TraceStore, TraceWriter

from .tables import command_of, grid, machine, parser_of, publish

QUERIES = (1, 16, 64)
TOP = 100
ROUNDS = 3
_RANK = 64
_BLOCK_VALUES = 2**23
_READ_BYTES = 2**22


def traces(n: int, k: int, seed: int) -> Tensor:
    """Synthetic traces [n, k]; those of other seeds lie along the same directions."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(_RANK, k, generator=torch.Generator().manual_seed(0)) / math.sqrt(_RANK)
    sizes = torch.logspace(0.5, -0.5, _RANK)
    along = torch.randn(n, _RANK, generator=generator) * sizes
    noise: Tensor = 0.3 * torch.randn(n, k, generator=generator)
    return noise + along @ shared


def build(path: Path, rows: int, dim: int) -> dict[str, Any]:
    """Write and seal a store of int8 rows; seconds and peak memory."""
    facts: dict[str, Any] = {"method": {}, "projection": {}, "model": {}, "dataset": {"size": rows}}
    started = time.perf_counter()
    writer = TraceWriter(path, StoreHeader(**facts, dim=dim, dtype="int8"))
    writer.write_samples(SampleTable([f"{i:07d}" for i in range(rows)], [""] * rows, {}))
    with writer.begin_checkpoint(1, epoch=0) as checkpoint:
        for number, index in enumerate(torch.arange(rows).split(max(1, _BLOCK_VALUES // dim))):
            checkpoint.append(index, traces(len(index), dim, number + 1), torch.zeros(len(index)))
        written = time.perf_counter()
        checkpoint.seal()
    sealed = time.perf_counter()
    return {"write_s": written - started, "seal_s": sealed - written, "peak_mib": _peak_mib()}


def measure(path: Path, queries: int) -> dict[str, Any]:
    """Scoring by ``queries`` at once in this process, in turn with plain reads of the shards."""
    before = _peak_mib()
    store = TraceStore(path)
    (checkpoint,) = store.checkpoints
    asked = traces(queries, store.header.dim, 10**6)[None]
    shards = sorted(path.glob("checkpoint-*/rank*.h5"))
    size = sum(shard.stat().st_size for shard in shards)
    directions = checkpoint.kernel().solve(asked[0], (1.0,))[0] if _primal(store) else asked[0]
    tasks: dict[str, Callable[[], Any]] = {
        "read": lambda: _read(shards),
        "pass": lambda: _pass(directions, checkpoint),
        "top": lambda: top_scores(asked, [checkpoint], TOP, Fixed(1.0)),
    }
    spent: dict[str, list[float]] = {name: [] for name in tasks}
    worked: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(ROUNDS):
        for name, task in tasks.items():
            dropped = _drop_cache(shards)
            started, ran = time.perf_counter(), time.process_time()
            task()
            spent[name].append(time.perf_counter() - started)
            worked[name].append(time.process_time() - ran)
    seconds = {name: statistics.median(each) for name, each in spent.items()}
    return {
        "queries": queries,
        "bytes": size,
        "cache_dropped": dropped,
        "read_gb_s": size / seconds["read"] / 1e9,
        "pass_gb_s": size / seconds["pass"] / 1e9,
        "share_of_read": seconds["read"] / seconds["pass"],
        "read_cpu_s_per_gb": statistics.median(worked["read"]) / size * 1e9,
        "pass_cpu_s_per_gb": statistics.median(worked["pass"]) / size * 1e9,
        "top_s": seconds["top"],
        "peak_mib": _peak_mib(),
        "peak_mib_before": before,
    }


def _primal(store: TraceStore) -> bool:
    return store.header.dim <= len(store)


def _pass(directions: Tensor, checkpoint: Checkpoint) -> None:
    dots, best = Dots(directions), Best(TOP)
    for rows in checkpoint.blocks():
        best.add(dots(rows), rows.index)


def _read(paths: list[Path]) -> None:
    buffer = bytearray(_READ_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _drop_cache(paths: list[Path]) -> bool:
    """Ask for the files to be read from the disk the next time; whether the system knows how to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _in_fresh_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "recipes.benchmarks.scale", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def page(head: str, cases: Sequence[dict[str, Any]]) -> str:
    """The figures of every store and every number of questions."""
    rows, writing = [], []
    for case in cases:
        title = f"{case['rows']:,} x {case['dim']:,}"
        for row in case["measured"]:
            used = f"{row['read_cpu_s_per_gb']:.2f}, {row['pass_cpu_s_per_gb']:.2f}"
            peak = f"{row['peak_mib']:.0f} ({row['peak_mib_before']:.0f} after import)"
            speeds = [f"{row[key]:.3f}" for key in ("read_gb_s", "pass_gb_s")]
            share, top = f"{row['share_of_read']:.0%}", f"{row['top_s']:.1f}"
            rows.append([title, row["queries"], *speeds, share, used, top, peak])
        built = case["built"]
        writing.append([title, *(f"{built[key]:.1f}" for key in ("write_s", "seal_s", "peak_mib"))])
    heads = ("queries", "plain read, GB/s", "scoring pass, GB/s", "share of read")
    more = ("CPU, s/GB: read, pass", "top, s", "peak MiB")
    lines = [
        head,
        "",
        *grid(["rows x features", *heads, *more], rows),
        "",
        *grid(("rows x features", "written in, s", "sealed in, s", "peak MiB"), writing),
        "",
        "A scoring pass multiplies every row with the directions and keeps the best; top also "
        "reads the kernel and solves for the directions.",
        "",
        "A pass reads in one thread and multiplies in another. Where other programs share the "
        "machine, what it can reach is told by its processor time a GB rather than by its share "
        "of the read.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.scale", __doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="where the store goes and is deleted again")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--queries", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.build is not None:
        print(json.dumps(build(given.build, given.rows, given.dim)))
        return
    if given.measure is not None:
        print(json.dumps(measure(given.measure, given.queries)))
        return
    cases = []
    for rows, dim in ((given.rows, given.dim), (given.dim // 2, 16 * given.dim)):
        folder = Path(tempfile.mkdtemp(dir=given.folder))
        try:
            store, size = str(folder / "store"), ("--rows", str(rows), "--dim", str(dim))
            built = _in_fresh_process("--build", store, *size)
            measured = [
                _in_fresh_process("--measure", store, "--queries", str(count)) for count in QUERIES
            ]
            cases.append({"rows": rows, "dim": dim, "built": built, "measured": measured})
        finally:
            shutil.rmtree(folder)
    dropped = all(row["cache_dropped"] for case in cases for row in case["measured"])
    publish(given.results / "scale.md", page(head_of(command_of(parser, given), dropped), cases))


def head_of(command: str, dropped: bool) -> str:
    where = f"{machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} thread(s)"
    products = "as integers" if has_integer_products() else "in float32"
    cache = "dropped before each" if dropped else "warm"
    return (
        f"`{command}` on {where}, int8 products {products}. Medians of {ROUNDS} rounds of read, "
        f"pass and top-{TOP} in turn; the page cache was {cache}. GB are 10^9 bytes."
    )


if __name__ == "__main__":
    main()
