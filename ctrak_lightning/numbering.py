"""Ids for samples that have none: their positions in the data set."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ctrak_lightning.errors import BatchError
from ctrak_lightning.task.ids import plain_id

_SHOWN = 5


def numbered(batches: Iterable[Any], column: str) -> Iterable[Any]:
    """The same batches, with a column of the samples' positions in the data set where they have no
    such column.

    Args:
        batches: a DataLoader; of anything else, and of a data set that is a stream, positions are
            not known, and it is returned as it is.
        column: the name of the ids in a batch. A batch that is a tuple becomes a mapping with the
            keys ``"0"``, ``"1"``, ...

    Raises:
        BatchError: by the batches, where a ``collate_fn`` leaves samples out and it cannot be known
            which. Samples that are None are known to be left out.
    """
    if not isinstance(batches, DataLoader) or isinstance(batches.dataset, IterableDataset):
        return batches
    if batches.batch_sampler is None:
        return batches
    collate = _Collate(batches.collate_fn, column)
    return reloaded(
        batches,
        _Positions(batches.dataset),
        batch_sampler=batches.batch_sampler,
        collate_fn=collate,
    )


def reloaded(loader: DataLoader[Any], dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
    """A DataLoader that loads as ``loader`` does, by as many workers of the same kind, but another
    selection of samples.

    It has no generator of its own: whoever goes through it seeds torch's, so that every pass is the
    same.
    """
    if loader.num_workers > 0:
        options |= {
            "prefetch_factor": loader.prefetch_factor,
            "timeout": loader.timeout,
            "multiprocessing_context": loader.multiprocessing_context,
        }
    return DataLoader(
        dataset,
        **{"collate_fn": loader.collate_fn} | options,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )


class _Positions(Dataset[tuple[Any, Any]]):
    """The samples of a data set, each with its position."""

    def __init__(self, samples: Dataset[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, position: Any) -> tuple[Any, Any]:
        return position, self.samples[position]


class _Collate:
    """Puts samples together as ``collate`` does, and their positions beside them."""

    def __init__(self, collate: Callable[[list[Any]], Any], column: str) -> None:
        self.collate, self.column = collate, column

    def __call__(self, rows: list[tuple[Any, Any]]) -> Any:
        batch = self.collate([sample for _, sample in rows])
        if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
            batch = {str(i): values for i, values in enumerate(batch)}
        if not isinstance(batch, Mapping) or self.column in batch:
            return batch
        return {**batch, self.column: self._positions(rows, batch)}

    def _positions(self, rows: list[tuple[Any, Any]], batch: Mapping[Any, Any]) -> list[str]:
        every = [plain_id(position) for position, _ in rows]
        kept = [name for name, (_, sample) in zip(every, rows, strict=True) if sample is not None]
        lengths = _lengths(batch)
        # A batch without a column that can be counted is left to `encode`, which compares lengths.
        if not lengths or len(kept) in lengths:
            return kept
        raise BatchError(
            f"The collate_fn made a batch of {sorted(lengths)} rows of the {len(rows)} samples at "
            f"positions {every[:_SHOWN]}{'...' if len(every) > _SHOWN else ''} of the data set, of "
            f"which {len(rows) - len(kept)} are None. Samples are numbered by these positions, and "
            "which of them are in the batch cannot be known. HINT: let the data set return None "
            "for a sample that is to be left out, or give every sample an id of its own in the "
            f"column {self.column!r}."
        )


def _lengths(batch: Mapping[Any, Any]) -> set[int]:
    """How many rows the columns of a batch have: its tensors, or where it has none, its lists."""
    tensors = {
        len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim > 0
    }
    return tensors or {len(value) for value in batch.values() if isinstance(value, (list, tuple))}
