"""Samples without ids are numbered as in their data set."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from ctrak_lightning.capture.identity import numbered
from ctrak_lightning.errors import BatchError

ROWS = [{"x": torch.tensor(float(i))} for i in range(5)]


def ids(batches: Any) -> list[str]:
    return [name for batch in batches for name in batch["sample_id"]]


def test_positions_in_the_data_set_in_any_order() -> None:
    assert ids(numbered(DataLoader(ROWS, 2), "sample_id")) == ["0", "1", "2", "3", "4"]  # type: ignore[arg-type]
    reverse = DataLoader(ROWS, batch_sampler=[[4, 3], [0]])  # type: ignore[arg-type]
    assert ids(numbered(reverse, "sample_id")) == ["4", "3", "0"]
    assert ids(numbered(DataLoader(Subset(ROWS, [3, 1]), 1), "sample_id")) == ["0", "1"]  # type: ignore[arg-type]
    values = [batch["x"].tolist() for batch in numbered(reverse, "sample_id")]
    assert values == [[4.0, 3.0], [0.0]]


def test_their_own_ids_and_collation_stay() -> None:
    named = [row | {"name": f"image {i}"} for i, row in enumerate(ROWS)]
    batches = list(numbered(DataLoader(named, 3), "name"))  # type: ignore[arg-type]
    assert [batch["name"] for batch in batches] == [
        ["image 0", "image 1", "image 2"],
        ["image 3", "image 4"],
    ]

    def doubled(rows: list[Any]) -> Any:
        return {"x": default_collate(rows)["x"] * 2}

    [batch] = numbered(DataLoader(ROWS, 5, collate_fn=doubled), "sample_id")  # type: ignore[arg-type]
    assert batch["x"].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert batch["sample_id"] == ["0", "1", "2", "3", "4"]


def test_tuples_become_mappings() -> None:
    data = TensorDataset(torch.arange(3), torch.arange(3) * 10)
    [batch] = numbered(DataLoader(data, 3), "sample_id")
    assert batch["0"].tolist() == [0, 1, 2]
    assert batch["1"].tolist() == [0, 10, 20]
    assert batch["sample_id"] == ["0", "1", "2"]


def test_what_has_no_positions_is_left_as_it_is() -> None:
    class Stream(IterableDataset[dict[str, Any]]):
        def __iter__(self) -> Any:
            return iter(ROWS)

    for batches in (ROWS, DataLoader(Stream(), 2)):
        assert numbered(batches, "sample_id") is batches
    Pair = namedtuple("Pair", ["x"])
    [batch] = numbered(DataLoader([Pair(1)], 1), "sample_id")  # type: ignore[list-item]
    assert batch.x.tolist() == [1]


def some(rows: list[Any]) -> Any:
    kept = [row for row in rows if row is not None and row["x"] != 2]
    return default_collate(kept) if kept else None


def test_samples_that_a_collate_function_leaves_out_do_not_shift_the_numbers() -> None:
    broken = [ROWS[0], None, ROWS[3], None, None, None, ROWS[4]]
    batches = list(numbered(DataLoader(broken, 3, collate_fn=some), "sample_id"))  # type: ignore[arg-type]
    assert [batch and batch["sample_id"] for batch in batches] == [["0", "2"], None, ["6"]]
    assert batches[0]["x"].tolist() == [0.0, 3.0]
    with pytest.raises(
        BatchError,
        match=r"\[2\] rows of the 3 samples at positions '0', '1', '2' of.*HINT: let the data set return None",
    ):
        list(numbered(DataLoader(ROWS, 3, collate_fn=some), "sample_id"))  # type: ignore[arg-type]
