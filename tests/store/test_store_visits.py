"""Visits beside the traces: what is written is read, what does not fit or was altered is
refused."""

import json
from pathlib import Path

import h5py
import pytest
import torch

from ctrak_lightning.errors import CorruptStoreError, StoreError
from ctrak_lightning.store import SampleTable, StoreHeader, TraceStore, TraceWriter, Visits
from ctrak_lightning.store.sections import sorted_visits

FILE = "checkpoint-00000300/visits.h5"


def visits() -> Visits:
    samples = torch.tensor([2, 0, 2, 1])
    return sorted_visits(samples, torch.tensor([7.0, 1.0, 9.5, 3.0]), torch.tensor([0, 0, 1, 1]), 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    header = StoreHeader(
        method={}, projection={}, model={}, dataset={"size": 3}, dim=2, dtype="float32"
    )
    writer = TraceWriter(tmp_path / "store", header)
    writer.write_samples(SampleTable(["a", "b", "c"], [""] * 3, {}))
    for step, given in {300: visits(), 600: None}.items():
        with writer.begin_checkpoint(step, epoch=0) as checkpoint:
            if given is not None:
                checkpoint.write_visits(given)
            checkpoint.append(torch.arange(3), torch.ones(3, 2), torch.zeros(3))
            checkpoint.seal()
            with pytest.raises(StoreError, match=r"write_visits\(\): checkpoint .* is sealed"):
                checkpoint.write_visits(visits())
    return tmp_path / "store"


def test_what_is_written_is_read(path: Path) -> None:
    store = TraceStore(path)
    assert store.verify() == []
    read = store.checkpoints[0].visits()
    assert read is not None
    assert read.counts.tolist() == [1, 1, 2]
    assert [part.tolist() for part in read.of(2)] == [[7.0, 9.5], [0, 1]]
    assert [part.tolist() for part in read.of(1)] == [[3.0], [1]]
    assert store.checkpoints[1].visits() is None


def test_a_discarded_checkpoint_takes_its_visits_along(path: Path) -> None:
    store = TraceStore(path)
    writer = TraceWriter(path, store.header)
    writer.discard_after(0)
    assert not (path / FILE).exists()


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="add up to 3, 2 timesteps"):
        Visits(
            counts=torch.tensor([1, 2]),
            timesteps=torch.zeros(2),
            steps=torch.zeros(3, dtype=torch.int64),
        )
    header = StoreHeader(
        method={}, projection={}, model={}, dataset={"size": 1}, dim=2, dtype="float32"
    )
    writer = TraceWriter(tmp_path, header)
    writer.write_samples(SampleTable(["a"], [""], {}))
    with (
        writer.begin_checkpoint(1, epoch=0) as checkpoint,
        pytest.raises(ValueError, match=r"write_visits\(3 samples\): expected 1"),
    ):
        checkpoint.write_visits(visits())
    once = Visits(
        counts=torch.tensor([1]), timesteps=torch.zeros(1), steps=torch.zeros(1, dtype=torch.int64)
    )
    with (
        writer.begin_checkpoint(2, epoch=0, exposures=torch.tensor([0])) as checkpoint,
        pytest.raises(
            ValueError, match="1 samples are visited and have no exposure, for example 'a'"
        ),
    ):
        checkpoint.write_visits(once)


def test_an_altered_file_is_found(path: Path) -> None:
    with h5py.File(path / FILE, "r+") as file:
        file["timesteps"][0] = 2.0
    store = TraceStore(path)
    assert [problem.split(":")[0] for problem in store.verify()] == [FILE]
    with pytest.raises(CorruptStoreError, match="visits.h5: sha256"):
        store.checkpoints[0].visits()


def test_visits_of_no_recorded_checkpoint_are_refused(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    manifest = json.loads(text)
    manifest["files"]["checkpoint-00000900/visits.h5"] = manifest["files"][FILE]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "checkpoint-00000900").mkdir()
    (path / "checkpoint-00000900" / "visits.h5").write_bytes((path / FILE).read_bytes())
    with pytest.raises(CorruptStoreError, match="belongs to no recorded checkpoint"):
        TraceStore(path)
