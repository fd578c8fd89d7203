"""The Gram matrix of a checkpoint's traces, on whichever side is smaller."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ctrak_lightning.errors import GradientError
from ctrak_lightning.traces.arrays import corrupt, open_for_reading, open_for_writing, read_array, write_array

_COLUMNS_PER_STEP = 4096


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Gram matrix of the features Phi [n, k], with m = min(n, k)."""

    side: Literal["primal", "dual"]
    """``primal``: Phi^T Phi [k, k]; ``dual``: Phi Phi^T [n, n], in the order of the sample table."""
    n: int
    """Samples."""
    k: int
    """Features per sample."""
    gram: Tensor
    """float32 [m, m], symmetric."""
    eigenvalues: Tensor
    """float64 [m], ascending; of the float64 Gram matrix, so rounding can leave zeros slightly negative."""
    trace: float
    """Trace of the float64 Gram matrix: the sum of the squared norms of all traces."""


def gram(blocks: Iterable[Tensor], n: int, k: int) -> Kernel:
    """Gram matrix of n traces of k features, accumulated in float64.

    Args:
        blocks: Features [n_i, k], n rows in all; for the dual side (k > n) in the order of the sample table.
        n: Number of samples.
        k: Features per sample.

    Returns:
        The primal kernel when k <= n, else the dual one.

    Raises:
        ValueError: The blocks do not have n rows of k features.
        GradientError: The Gram matrix does not fit float32.
    """
    checked = _checked(blocks, n, k)
    matrix = _primal(checked, k) if k <= n else _dual(torch.cat(list(checked)))
    stored = matrix.float()
    if not bool(stored.isfinite().all()):
        raise GradientError(
            f"the Gram matrix has entries up to {float(matrix.abs().max()):.3g}, beyond float32. "
            "HINT: the per-sample gradients are too large; scale the objective down."
        )
    return Kernel(
        side="primal" if k <= n else "dual",
        n=n,
        k=k,
        gram=stored,
        eigenvalues=torch.linalg.eigvalsh(matrix),
        trace=float(matrix.trace()),
    )


def write_kernel(path: Path, kernel: Kernel) -> None:
    """Write ``kernel`` to a new HDF5 file; equal kernels give equal bytes."""
    with open_for_writing(path) as file:
        write_array(file, "gram", kernel.gram)
        write_array(file, "eigenvalues", kernel.eigenvalues, chunk_rows=kernel.eigenvalues.shape[0])
        file.attrs["side"] = kernel.side
        file.attrs["n"] = kernel.n
        file.attrs["k"] = kernel.k
        file.attrs["trace"] = kernel.trace


def read_kernel(path: Path, n: int, k: int) -> Kernel:
    """Read the kernel of n traces of k features.

    Raises:
        CorruptStoreError: The file is damaged, or it is another kernel.
    """
    side: Literal["primal", "dual"] = "primal" if k <= n else "dual"
    size = min(n, k)
    with open_for_reading(path) as file:
        found = {name: file.attrs[name] for name in ("side", "n", "k")}
        if found != {"side": side, "n": n, "k": k}:
            raise corrupt(path, f"is the kernel of {found}, expected side={side}, n={n}, k={k}")
        return Kernel(
            side=side,
            n=n,
            k=k,
            gram=read_array(file, path, "gram", (size, size), "float32"),
            eigenvalues=read_array(file, path, "eigenvalues", (size,), "float64"),
            trace=float(file.attrs["trace"]),
        )


def _checked(blocks: Iterable[Tensor], n: int, k: int) -> Iterable[Tensor]:
    rows = 0
    for block in blocks:
        if block.dim() != 2 or block.shape[1] != k:
            raise ValueError(
                f"gram(blocks, n={n}, k={k}): a block has shape {tuple(block.shape)}, expected [n_i, {k}]."
            )
        rows += block.shape[0]
        yield block
    if rows != n:
        raise ValueError(f"gram(blocks, n={n}, k={k}): the blocks have {rows} rows in all, expected {n}.")


def _primal(blocks: Iterable[Tensor], k: int) -> Tensor:
    total = torch.zeros(k, k, dtype=torch.float64)
    for block in blocks:
        rows = block.double()
        total += rows.T @ rows  # [k, n_i] x [n_i, k] -> [k, k]
    return _symmetric(total)


def _dual(features: Tensor) -> Tensor:
    total = torch.zeros(features.shape[0], features.shape[0], dtype=torch.float64)
    # By columns, so that float64 copies of all features never stand beside the Gram matrix.
    for columns in torch.split(features, _COLUMNS_PER_STEP, dim=1):
        wide = columns.double()
        total += wide @ wide.T  # [n, c] x [c, n] -> [n, n]
    return _symmetric(total)


def _symmetric(matrix: Tensor) -> Tensor:
    """BLAS may round the two triangles differently; a Cholesky of the stored matrix must not see that."""
    return (matrix + matrix.T) / 2
