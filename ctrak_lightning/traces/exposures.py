"""How often each sample had entered an optimizer step when a checkpoint was captured."""

from pathlib import Path

from torch import Tensor

from ctrak_lightning.traces.arrays import (
    corrupt,
    open_for_reading,
    open_for_writing,
    read_array,
    write_array,
)

_CHUNK = 4096


def write_exposures(path: Path, counts: Tensor) -> None:
    """Write counts, int64 [N], to a new HDF5 file; equal counts give equal bytes."""
    with open_for_writing(path) as file:
        write_array(file, "counts", counts, _CHUNK)


def read_exposures(path: Path, n: int) -> Tensor:
    """Read the counts of n samples, int64 [n].

    Raises:
        CorruptStoreError: The file is damaged.
    """
    with open_for_reading(path) as file:
        counts = read_array(file, path, "counts", (n,), "int64")
    if bool((counts < 0).any()):
        raise corrupt(path, "counts has values below 0")
    return counts
