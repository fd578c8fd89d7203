"""What a checkpoint holds beside its rows: visits, exposures, the network's function. What is read
from a damaged file raises a CorruptStoreError."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.store.arrays import (
    corrupt,
    find_dataset,
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
    """The denoiser's timestep each time, float32 [V]."""
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

    def without(self, left_out: Tensor) -> Visits:
        """The same for samples that are ``left_out``, bool [N], as if they had not been seen."""
        rows = torch.repeat_interleave(~left_out, self.counts)
        counts = self.counts.masked_fill(left_out, 0)
        return Visits(counts=counts, timesteps=self.timesteps[rows], steps=self.steps[rows])


def write_visits(path: Path, visits: Visits) -> None:
    """Write ``visits`` to a new HDF5 file; equal visits give equal bytes."""
    with open_for_writing(path) as file:
        write_array(file, "counts", visits.counts, _CHUNK)
        write_array(file, "timesteps", visits.timesteps, _CHUNK)
        write_array(file, "steps", visits.steps, _CHUNK)


def read_visits(path: Path, n: int) -> Visits:
    """Read the visits of n samples."""
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


def write_exposures(path: Path, counts: Tensor) -> None:
    """Write counts, int64 [N], to a new HDF5 file; equal counts give equal bytes."""
    with open_for_writing(path) as file:
        write_array(file, "counts", counts, _CHUNK)


def read_exposures(path: Path, n: int) -> Tensor:
    """Read the counts of n samples, int64 [n]."""
    with open_for_reading(path) as file:
        counts = read_array(file, path, "counts", (n,), "int64")
    if bool((counts < 0).any()):
        raise corrupt(path, "counts has values below 0")
    return counts


_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    """A network's outputs for fixed noise, and what its task makes of fixed specs: nothing of a
    training sample.

    There are S outputs: at some timesteps under the null condition and then, where that has numbers
    to replace, at the same ones under noise in their place.
    """

    timesteps: Tensor
    """The network's timesteps, float64 [S]."""
    outputs: Tensor
    """Float32 [S, M], each flattened."""
    dtype: str
    """The coarsest floating-point format among the network's parameters."""
    on_cpu: bool
    """Whether they were computed on a CPU."""
    conditions: Tensor | None = None
    """Projections of the T tensors of the conditions of some specs, float32 [T, K]; None where
    there are none."""
    specs: int = 0
    """How many specs those were chosen from."""

    def differences(self, other: Function) -> Tensor:
        """``||mine - theirs|| / ||mine||`` of each output, float64 [S]; infinite where the two
        cannot be compared. Outputs that I lack are not."""
        count = len(self.timesteps)
        if not torch.equal(self.timesteps, other.timesteps[:count]):
            return torch.full_like(self.timesteps, torch.inf)
        return _relative(self.outputs, other.outputs[:count])

    def condition_difference(self, other: Function) -> float:
        """The same of the conditions, the largest; 0 where the two are not of the same specs."""
        if self.conditions is None or other.conditions is None or self.specs != other.specs:
            return 0.0
        return float(_relative(self.conditions, other.conditions).max())


def _relative(mine: Tensor, theirs: Tensor) -> Tensor:
    """``||mine - theirs|| / ||mine||`` by row, float64; infinite for other shapes and for what is
    no number."""
    if mine.shape != theirs.shape:
        return torch.full((len(mine),), torch.inf, dtype=torch.float64)
    mine, theirs = mine.double(), theirs.double()
    error = (mine - theirs).norm(dim=1) / mine.norm(dim=1).clamp(
        min=torch.finfo(torch.float64).tiny
    )
    found: Tensor = error.nan_to_num(nan=torch.inf)
    return found


def write_function(path: Path, function: Function) -> None:
    """Write ``function`` to a new HDF5 file; equal ones give equal bytes."""
    with open_for_writing(path) as file:
        write_array(file, "timesteps", function.timesteps)
        write_array(file, "outputs", function.outputs, chunk_rows=1)
        write_array(file, "dtype", torch.tensor([_DTYPES.index(function.dtype)]))
        write_array(file, "on_cpu", torch.tensor([int(function.on_cpu)]))
        if function.conditions is not None:
            write_array(file, "conditions", function.conditions)
            write_array(file, "specs", torch.tensor([function.specs]))


def read_function(path: Path) -> Function:
    """Read what :func:`write_function` wrote."""
    with open_for_reading(path) as file:
        outputs = _table(file, path, "outputs")
        known = "conditions" in file
        kind = int(read_array(file, path, "dtype", (1,), "int64")[0])
        if not 0 <= kind < len(_DTYPES):
            raise corrupt(path, f"dtype is {kind}, expected 0 to {len(_DTYPES) - 1}")
        return Function(
            timesteps=read_array(file, path, "timesteps", (len(outputs),), "float64"),
            outputs=outputs,
            dtype=_DTYPES[kind],
            on_cpu=bool(read_array(file, path, "on_cpu", (1,), "int64")[0]),
            conditions=_table(file, path, "conditions") if known else None,
            specs=int(read_array(file, path, "specs", (1,), "int64")[0]) if known else 0,
        )


def _table(file: Any, path: Path, name: str) -> Tensor:
    shape = find_dataset(file, path, name).shape
    # Values are stored as they are: a file holds no more numbers than fit into it.
    if len(shape) != 2 or 0 in shape or shape[0] * shape[1] * 4 > path.stat().st_size:
        raise corrupt(
            path, f"{name} has the shape {shape}, which is no table or more than the file holds"
        )
    return read_array(file, path, name, (shape[0], shape[1]), "float32")
