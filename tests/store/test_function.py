"""The network's answers to a fixed input, as a file."""

from dataclasses import replace
from pathlib import Path

import h5py
import pytest
import torch

from ctrak_lightning.errors import CorruptStoreError
from ctrak_lightning.store.sections import Function, read_function, write_function

FUNCTION = Function(
    timesteps=torch.tensor([10.0, 50.0], dtype=torch.float64),
    outputs=torch.tensor([[3.0, 4.0], [0.0, 2.0]]),
    dtype="bfloat16",
    on_cpu=False,
)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_function(tmp_path / "a.h5", FUNCTION)
    write_function(tmp_path / "b.h5", FUNCTION)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    found = read_function(tmp_path / "a.h5")
    assert torch.equal(found.outputs, FUNCTION.outputs)
    assert torch.equal(found.timesteps, FUNCTION.timesteps)
    assert (found.dtype, found.on_cpu) == ("bfloat16", False)


def test_differences_are_relative_and_infinite_where_there_is_no_comparing() -> None:
    other = replace(FUNCTION, outputs=torch.tensor([[3.0, 4.5], [0.0, 2.0]]))
    torch.testing.assert_close(
        FUNCTION.differences(other),
        torch.tensor([0.1, 0.0], dtype=torch.float64),
        rtol=1e-6,
        atol=0,
    )
    nothing = torch.full((2, 2), torch.nan)
    for unlike in (
        replace(FUNCTION, outputs=torch.ones(2, 3)),
        replace(FUNCTION, timesteps=FUNCTION.timesteps + 1),
        replace(FUNCTION, outputs=nothing),
    ):
        assert FUNCTION.differences(unlike).isinf().all()


@pytest.mark.parametrize("kind", [-1, 4])
def test_what_it_cannot_be_is_a_damaged_file(tmp_path: Path, kind: int) -> None:
    write_function(tmp_path / "a.h5", FUNCTION)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["dtype"][0] = kind
    with pytest.raises(CorruptStoreError, match="dtype"):
        read_function(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["outputs"]
        file.create_dataset("outputs", shape=(2, 2**40), dtype="float32", chunks=(1, 2))
    with pytest.raises(CorruptStoreError, match="outputs"):
        read_function(tmp_path / "a.h5")
