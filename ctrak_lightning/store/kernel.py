"""The Gram matrix of a checkpoint's traces, on whichever side is smaller, as its
eigendecomposition. A damaged file, or that of another kernel, raises a CorruptStoreError."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ctrak_lightning.store.arrays import (
    corrupt,
    open_for_reading,
    open_for_writing,
    read_array,
    write_array,
)
from ctrak_lightning.utilities.processes import Processes

_PANEL = 1024


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Gram matrix ``V diag(eigenvalues) V^T`` of the features Phi [n, k], with m = min(n, k).

    The decomposition serves every damping: a solve costs two products with V, never a
    factorisation. V in float32 is enough: its rounding changes scores in proportion to the square
    root of the condition number of the damped matrix, where that of a Gram matrix in float32 did so
    in proportion to the condition number itself.
    """

    side: Literal["primal", "dual"]
    """``primal``: Phi^T Phi [k, k]; ``dual``: Phi Phi^T [n, n], in the order of the sample
    table."""
    n: int
    """Samples."""
    k: int
    """Features per sample."""
    eigenvalues: Tensor
    """float64 [m], ascending; of the float64 Gram matrix, so rounding can leave zeros slightly
    negative."""
    eigenvectors: Tensor
    """V, float32 [m, m], one eigenvector per column."""
    trace: float
    """Trace of the float64 Gram matrix: the sum of the squared norms of all traces."""
    mean: Tensor
    """Mean of the traces over the samples, float64 [k]."""
    exposed: int | None = None
    """Samples that had been trained on, where the traces of the others are zeros; None: all of
    them."""

    @property
    def mean_eigenvalue(self) -> float:
        """What a damping is relative to: ``trace / min(n, k)``, where n counts the samples that had
        been trained on."""
        return self.trace / min(self.exposed or self.n, self.k)

    def gram(self) -> Tensor:
        """The Gram matrix, float64 [m, m], made again from its decomposition."""
        vectors = self.eigenvectors.double()
        matrix = (vectors * self.eigenvalues) @ vectors.T
        return (matrix + matrix.T) / 2

    def solve(self, rows: Tensor, dampings: Sequence[float | None]) -> Tensor:
        """Rows [q, m] times ``(gram + damping * mean_eigenvalue * I)^-1``, float64 [d, q, m]; as
        they are where a damping is None."""
        wide, vectors = rows.double(), self.eigenvectors.double()
        values, mean = self.eigenvalues.clamp(min=0), self.mean_eigenvalue
        along = wide @ vectors  # [q, m]
        return torch.stack(
            [wide if d is None else along / (values + d * mean) @ vectors.T for d in dampings]
        )

    def score_moments(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [c] and standard deviation [c], over the samples that had been trained on, of the
        scores ``Phi d`` of directions d [c, k], float64.

        ``sum_i (phi_i d)^2 = d^T Phi^T Phi d``, so no trace need be read. For the primal side only.
        """
        count = self.exposed or self.n
        mean = directions.double() @ self.mean * (self.n / count)
        along = directions.double() @ self.eigenvectors.double()
        square = (along.square() * self.eigenvalues.clamp(min=0)).sum(1) / count
        return mean, (square - mean.square()).clamp(min=0).sqrt()


@dataclass(frozen=True, kw_only=True)
class GramSums:
    """Sums over some of the traces; those of all make the primal kernel."""

    products: Tensor
    """Phi^T Phi, float64 [k, k]; what is below the diagonal is not filled."""
    features: Tensor
    """Sum of the traces, float64 [k]."""
    rows: int
    """How many traces."""

    def over(self, processes: Processes) -> GramSums:
        """The sums over the traces of all processes; all call it."""
        return GramSums(
            products=processes.sum(self.products),
            features=processes.sum(self.features),
            rows=sum(processes.gather(self.rows)),
        )

    def kernel(self) -> Kernel:
        """The primal kernel, if these are the sums over all traces."""
        k = len(self.features)
        return _decomposed("primal", self.rows, k, self.products, self.features / self.rows)


def gram_of_rows(blocks: Iterable[Tensor], k: int) -> GramSums:
    """The sums over traces that come in blocks [n_i, k] in any order, each looked at once."""
    products = torch.zeros(k, k, dtype=torch.float64)
    features = torch.zeros(k, dtype=torch.float64)
    rows = 0
    for block in blocks:
        if block.dim() != 2 or block.shape[1] != k:
            raise ValueError(
                f"gram_of_rows: a block has shape {tuple(block.shape)}, expected [n_i, {k}]."
            )
        rows += len(block)
        wide = block.double()
        features += wide.sum(0)
        for start in range(0, k, _PANEL):
            # [p, n_i] x [n_i, k - start] -> [p, k - start]: what is below the diagonal is what is
            # above it
            products[start : start + _PANEL, start:] += (
                wide[:, start : start + _PANEL].T @ wide[:, start:]
            )
    return GramSums(products=products, features=features, rows=rows)


def kernel_of_columns(panels: Iterable[Tensor], n: int, k: int) -> Kernel:
    """The dual kernel of n < k traces, from columns [n, k_i] in order, each looked at once."""
    total = torch.zeros(n, n, dtype=torch.float64)
    means = []
    for panel in panels:
        if panel.dim() != 2 or panel.shape[0] != n:
            raise ValueError(
                f"kernel_of_columns: a panel has shape {tuple(panel.shape)}, expected [{n}, k_i]."
            )
        for columns in panel.split(_PANEL, 1):
            wide = columns.double()
            total += wide @ wide.T  # [n, p] x [p, n] -> [n, n]
            means.append(wide.mean(0))
    if sum(map(len, means)) != k:
        raise ValueError(
            f"kernel_of_columns: the panels have {sum(map(len, means))} columns in all, expected "
            f"{k}."
        )
    return _decomposed("dual", n, k, total, torch.cat(means))


def write_kernel(path: Path, kernel: Kernel) -> None:
    """Write ``kernel`` to a new HDF5 file; equal kernels give equal bytes."""
    with open_for_writing(path) as file:
        for name in ("eigenvectors", "eigenvalues", "mean"):
            write_array(file, name, getattr(kernel, name), chunk_rows=_PANEL)
        file.attrs["side"] = kernel.side
        file.attrs["n"] = kernel.n
        file.attrs["k"] = kernel.k
        file.attrs["trace"] = kernel.trace


def read_kernel(path: Path, n: int, k: int) -> Kernel:
    """Read the kernel of n traces of k features."""
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
            eigenvalues=read_array(file, path, "eigenvalues", (size,), "float64"),
            eigenvectors=read_array(file, path, "eigenvectors", (size, size), "float32"),
            trace=float(file.attrs["trace"]),
            mean=read_array(file, path, "mean", (k,), "float64"),
        )


def _decomposed(
    side: Literal["primal", "dual"], n: int, k: int, upper: Tensor, mean: Tensor
) -> Kernel:
    trace = float(upper.trace())
    values, vectors = torch.linalg.eigh(upper, UPLO="U")
    decomposition = {"eigenvalues": values, "eigenvectors": vectors.float()}
    return Kernel(side=side, n=n, k=k, trace=trace, mean=mean, **decomposition)
