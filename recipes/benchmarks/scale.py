"""Scoring a store that is larger than memory: throughput beside a plain read of the same files, memory and top-k.

python -m recipes.benchmarks.scale --rows 1000000 --dim 4096    # writes results/scale.json and results/scale.md

The traces are synthetic: 64 directions of decaying size and noise.
"""

import argparse
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.attribution.scoring import Dots, has_integer_products
from ctrak_lightning.attribution.search import Best, top_scores
from ctrak_lightning.methods.damping import Fixed
from ctrak_lightning.store import Checkpoint, SampleTable, StoreHeader, TraceStore, TraceWriter

RESULTS = Path(__file__).parent / "results"
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


def _table(document: dict[str, Any]) -> str:
    lines = [
        "# Scoring a large store",
        "",
        f"`{document['command']}` on {document['machine']}, torch {document['torch']}, {document['threads']} thread(s), int8 "
        f"products {'as integers' if document['integer_products'] else 'in float32'}. Medians of {ROUNDS} rounds of read, pass and "
        f"top-{TOP} in turn; the page cache was {'dropped before each' if document['cache_dropped'] else 'warm'}. GB are 10^9 bytes.",
        "",
        "| rows x features | queries | plain read, GB/s | scoring pass, GB/s | share of read | CPU, s/GB: read, pass | top, s | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in document["cases"]:
        for row in case["measured"]:
            lines.append(
                f"| {case['rows']:,} x {case['dim']:,} | {row['queries']} | {row['read_gb_s']:.2f} | {row['pass_gb_s']:.2f} | "
                f"{row['share_of_read']:.0%} | {row['read_cpu_s_per_gb']:.2f}, {row['pass_cpu_s_per_gb']:.2f} | "
                f"{row['top_s']:.1f} | {row['peak_mib']:.0f} ({row['peak_mib_before']:.0f} after import) |"
            )
    lines += ["", "Writing: " + "; ".join(_writing(case) for case in document["cases"]) + "."]
    lines += [
        "",
        "A scoring pass multiplies every row with the directions and keeps the best; top also reads the kernel and solves for the "
        "directions.",
        "",
        "A pass reads in one thread and multiplies in another. Where other programs share the machine, what it can reach is told by its "
        "processor time a GB rather than by its share of the read.",
        "",
    ]
    return "\n".join(lines)


def _writing(case: dict[str, Any]) -> str:
    built = case["built"]
    return (
        f"{case['rows']:,} x {case['dim']:,} in {built['write_s']:.0f} s, sealed in {built['seal_s']:.0f} s, "
        f"peak {built['peak_mib']:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--folder", type=Path, default=None, help="where the store goes and is deleted again")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--build", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--queries", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args()
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
            size = ("--rows", str(rows), "--dim", str(dim))
            built = _in_fresh_process("--build", str(folder / "store"), *size)
            measured = [
                _in_fresh_process("--measure", str(folder / "store"), "--queries", str(q)) for q in QUERIES
            ]
            cases.append({"rows": rows, "dim": dim, "built": built, "measured": measured})
        finally:
            shutil.rmtree(folder)
    document = {
        "command": f"python -m recipes.benchmarks.scale --rows {given.rows} --dim {given.dim}",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "integer_products": has_integer_products(),
        "cache_dropped": all(row["cache_dropped"] for case in cases for row in case["measured"]),
        "cases": cases,
    }
    given.results.mkdir(parents=True, exist_ok=True)
    (given.results / "scale.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (given.results / "scale.md").write_text(_table(document), encoding="utf-8")
    print(_table(document))


if __name__ == "__main__":
    main()
