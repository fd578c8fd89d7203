"""In which training steps each sample was seen, and at which timesteps; beside traces that training
itself left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ctrak_lightning.traces.arrays import (
    corrupt,
    open_for_reading,
    open_for_writing,
    read_array,
    write_array,
)

_CHUNK = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Visits:
    """The V times that N samples were seen, sample by sample in the order of the sample table, each
    in the order of time.

    Raises:
        ValueError: the parts do not fit together.
    """

    counts: Tensor
    """How often each sample was seen, int64 [N]."""
    timesteps: Tensor
    """What the denoiser was told each time, float32 [V]."""
    steps: Tensor
    """Optimizer steps that had been taken each time, int64 [V]."""

    def __post_init__(self) -> None:
        total = int(self.counts.sum())
        if bool((self.counts < 0).any()) or not len(self.timesteps) == len(self.steps) == total:
            raise ValueError(
                f"Visits(counts that add up to {total}, {len(self.timesteps)} timesteps, "
                f"{len(self.steps)} steps): expected counts of at least 0, and one timestep and "
                "one step for each visit."
            )

    def of(self, index: int) -> tuple[Tensor, Tensor]:
        """Timesteps [v] and steps [v] of the visits of the sample at ``index`` of the sample
        table."""
        start = int(self.counts[:index].sum())
        part = slice(start, start + int(self.counts[index]))
        return self.timesteps[part], self.steps[part]


def write_visits(path: Path, visits: Visits) -> None:
    """Write ``visits`` to a new HDF5 file; equal visits give equal bytes."""
    with open_for_writing(path) as file:
        write_array(file, "counts", visits.counts, _CHUNK)
        write_array(file, "timesteps", visits.timesteps, _CHUNK)
        write_array(file, "steps", visits.steps, _CHUNK)


def read_visits(path: Path, n: int) -> Visits:
    """Read the visits of n samples.

    Raises:
        CorruptStoreError: The file is damaged.
    """
    with open_for_reading(path) as file:
        counts = read_array(file, path, "counts", (n,), "int64")
        total = int(counts.sum())
        if total < 0 or bool((counts < 0).any()):
            raise corrupt(path, "counts has values below 0")
        return Visits(
            counts=counts,
            timesteps=read_array(file, path, "timesteps", (total,), "float32"),
            steps=read_array(file, path, "steps", (total,), "int64"),
        )


def sorted_visits(samples: Tensor, timesteps: Tensor, steps: Tensor, n: int) -> Visits:
    """Visits [V] in the order of time, sorted by sample."""
    order = torch.argsort(samples, stable=True)
    return Visits(
        counts=torch.bincount(samples, minlength=n), timesteps=timesteps[order], steps=steps[order]
    )
