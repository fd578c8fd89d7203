"""A small, seeded capture that the tests write, interrupt, damage and read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.store import SampleTable, StoreHeader, TraceWriter
from ctrak_lightning.store.schema import WRITER_LOCK


def make_header(**changes: Any) -> StoreHeader:
    fields: dict[str, Any] = {
        "method": {"name": "concept_trak", "timesteps": [10, 500]},
        "projection": {"dim": 2048, "seed": 0},
        "model": {"architecture": "a1"},
        "dataset": {"size": 10},
        "dim": 6,
        "dtype": "float32",
    }
    return StoreHeader(**fields | changes)


def make_table(n: int = 10, **changes: Any) -> SampleTable:
    fields: dict[str, Any] = {
        "sample_ids": [f"image/{i:03d}.png" for i in range(n)],
        "content_sha256": [f"{i:064x}" for i in range(n)],
        "metadata": {"artist": ["noto", "ann"] * (n // 2), "licence/url": [""] * n},
        "thumbnails": torch.arange(n * 12, dtype=torch.uint8).reshape(n, 2, 2, 3),
    }
    return SampleTable(**fields | changes)


def make_traces(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features [n, k] whose rows differ in scale by many orders, and losses [n]."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-3, 6, n)[torch.randperm(n, generator=generator)]
    return torch.randn(n, k, generator=generator) * scale[:, None], torch.rand(
        n, generator=generator
    )


@dataclass
class Capture:
    """Writes the same traces each time; what differs is who interrupts it, and the batch size."""

    n: int = 10
    k: int = 6
    steps: tuple[int, ...] = (300, 600)
    shard_rows: int = 4
    changes: dict[str, Any] = field(default_factory=dict)

    def header(self) -> StoreHeader:
        return make_header(**{"dim": self.k, "dataset": {"size": self.n}} | self.changes)

    def traces(self, step: int) -> tuple[Tensor, Tensor]:
        return make_traces(self.n, self.k, seed=step)

    def order(self, step: int) -> Tensor:
        return torch.randperm(self.n, generator=torch.Generator().manual_seed(step + 1))

    def weights(self, step: int) -> dict[str, Tensor]:
        return {"b": torch.full((3,), float(step)), "a": torch.arange(4).bfloat16()}

    def open(self, path: Path) -> TraceWriter:
        return TraceWriter(path, self.header(), run_id="run", shard_rows=self.shard_rows)

    def run(self, path: Path, batch: int = 3) -> Path:
        """Create the store at ``path``, or continue it until it is complete."""
        with self.open(path) as writer:
            writer.write_samples(make_table(self.n))
            for step in self.steps:
                if step not in writer.sealed_steps:
                    self.run_checkpoint(writer, step, batch)
        return path

    def run_checkpoint(
        self, writer: TraceWriter, step: int, batch: int = 3, stop: int | None = None
    ) -> None:
        """Capture one checkpoint in batches; with ``stop``, leave after so many rows and do not
        seal."""
        features, loss = self.traces(step)
        options = {"epoch": step // 100, "learning_rate": 0.1, "weights": self.weights(step)}
        with writer.begin_checkpoint(step, **options) as checkpoint:
            for rows in self.order(step)[:stop][checkpoint.rows_done :].split(batch):
                checkpoint.append(rows, features[rows], loss[rows])
            if stop is None:
                checkpoint.seal()


def read_bytes(path: Path) -> dict[str, bytes]:
    """Every file below ``path``, by relative name, but the one that says who has the store open
    now."""
    files = (file for file in path.rglob("*") if file.is_file() and file.name != WRITER_LOCK)
    return {str(file.relative_to(path)): file.read_bytes() for file in files}
