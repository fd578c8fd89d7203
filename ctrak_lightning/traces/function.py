"""What a network answers to a fixed input, beside the weights with which it did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ctrak_lightning.traces.arrays import (
    corrupt,
    find_dataset,
    open_for_reading,
    open_for_writing,
    read_array,
    write_array,
)

_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    """A network's outputs at S timesteps, for fixed noise under the null condition: nothing of a training sample."""

    timesteps: Tensor
    """What the network was told, float64 [S]."""
    outputs: Tensor
    """Float32 [S, M], each flattened."""
    dtype: str
    """The coarsest floating-point format among the network's parameters."""
    on_cpu: bool
    """Whether they were computed on a CPU."""

    def differences(self, other: Function) -> Tensor:
        """``||mine - theirs|| / ||mine||`` at each timestep, float64 [S]; infinite where the two cannot be compared."""
        if self.outputs.shape != other.outputs.shape or not torch.equal(self.timesteps, other.timesteps):
            return torch.full_like(self.timesteps, torch.inf)
        mine, theirs = self.outputs.double(), other.outputs.double()
        error = (mine - theirs).norm(dim=1) / mine.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        found: Tensor = error.nan_to_num(nan=torch.inf)
        return found


def write_function(path: Path, function: Function) -> None:
    """Write ``function`` to a new HDF5 file; equal ones give equal bytes."""
    with open_for_writing(path) as file:
        write_array(file, "timesteps", function.timesteps)
        write_array(file, "outputs", function.outputs, chunk_rows=1)
        write_array(file, "dtype", torch.tensor([_DTYPES.index(function.dtype)]))
        write_array(file, "on_cpu", torch.tensor([int(function.on_cpu)]))


def read_function(path: Path) -> Function:
    """Read what :func:`write_function` wrote.

    Raises:
        CorruptStoreError: The file is damaged.
    """
    with open_for_reading(path) as file:
        shape = find_dataset(file, path, "outputs").shape
        # Values are stored as they are: a file holds no more numbers than fit into it.
        if len(shape) != 2 or shape[0] * shape[1] * 4 > path.stat().st_size:
            raise corrupt(
                path, f"outputs has the shape {shape}, which is not [S, M] or more than the file holds"
            )
        kind = int(read_array(file, path, "dtype", (1,), "int64")[0])
        if not 0 <= kind < len(_DTYPES):
            raise corrupt(path, f"dtype is {kind}, expected 0 to {len(_DTYPES) - 1}")
        return Function(
            timesteps=read_array(file, path, "timesteps", (shape[0],), "float64"),
            outputs=read_array(file, path, "outputs", (shape[0], shape[1]), "float32"),
            dtype=_DTYPES[kind],
            on_cpu=bool(read_array(file, path, "on_cpu", (1,), "int64")[0]),
        )
