"""Ids for samples that have none: their positions in the data set."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset


def numbered(batches: Iterable[Any], column: str) -> Iterable[Any]:
    """The same batches, with a column of the samples' positions in the data set where they have no such column.

    Args:
        batches: a DataLoader; of anything else, and of a data set that is a stream, positions are not known, and it is returned as
            it is.
        column: the name of the ids in a batch. A batch that is a tuple becomes a mapping with the keys ``"0"``, ``"1"``, ...
    """
    if not isinstance(batches, DataLoader) or isinstance(batches.dataset, IterableDataset):
        return batches
    collate = _Collate(batches.collate_fn, column)
    options: dict[str, Any] = {
        "num_workers": batches.num_workers,
        "pin_memory": batches.pin_memory,
        "worker_init_fn": batches.worker_init_fn,
    }
    if batches.batch_sampler is None:
        return batches
    return DataLoader(
        _Positions(batches.dataset), batch_sampler=batches.batch_sampler, collate_fn=collate, **options
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
        return {**batch, self.column: [str(position) for position, _ in rows]}
