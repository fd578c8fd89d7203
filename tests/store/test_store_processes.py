"""Several processes capture one checkpoint: the store is the one that a single process writes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from store_builder import make_header, make_table, make_traces, read_bytes

from ctrak_lightning.errors import CorruptStoreError, StoreError, StoreMismatchError
from ctrak_lightning.store import TraceStore, TraceWriter
from ctrak_lightning.utilities.processes import ALONE, Processes

from ..threads import together

N = 22
FOLDER = "checkpoint-00000001"


class StoppedError(Exception):
    """What ends a capture half-way."""


def capture(
    path: Path,
    processes: Processes,
    *,
    k: int = 6,
    stop: dict[int, int] | None = None,
    weights: float = 1.0,
    done: list[int] | None = None,
) -> TraceWriter:
    """Each process traces every so-manieth sample, two at a time into shards of 3; rank r stops
    before its ``stop[r]``-th."""
    features, loss = make_traces(N, k)
    writer = TraceWriter(
        path, make_header(dim=k, dataset={"size": N}), shard_rows=3, run_id="r", processes=processes
    )
    writer.write_samples(make_table(N))
    checkpoint = writer.begin_checkpoint(1, epoch=0, weights={"w": torch.tensor([weights])})
    with closing_on_error(writer), checkpoint:
        own = torch.arange(N)[processes.rank :: processes.count]
        if done is not None:
            done[processes.rank] = checkpoint.rows_done
        with processes.sharing_errors():
            for i in range(checkpoint.rows_done, len(own), 2):
                if stop and i >= stop.get(processes.rank, N):
                    checkpoint.flush()
                    raise StoppedError
                checkpoint.append(own[i : i + 2], features[own[i : i + 2]], loss[own[i : i + 2]])
        checkpoint.seal()
    return writer


@contextmanager
def closing_on_error(writer: TraceWriter) -> Iterator[None]:
    """As the end of a process does; here what was raised keeps the writer alive."""
    try:
        yield
    except BaseException:
        writer.close()
        raise


@pytest.mark.parametrize("k", [6, 40], ids=["primal", "dual"])
@pytest.mark.parametrize("count", [2, 3])
def test_the_store_is_that_of_one_process(tmp_path: Path, count: int, k: int) -> None:
    writers = together(count, lambda processes: capture(tmp_path / "many", processes, k=k))
    capture(tmp_path / "one", ALONE, k=k)
    assert all(writer.sealed_steps == [1] for writer in writers)
    many, one = TraceStore(tmp_path / "many"), TraceStore(tmp_path / "one")
    assert many.verify() == []
    assert torch.equal(many.checkpoints[0].features(), one.checkpoints[0].features())
    assert torch.equal(many.checkpoints[0].losses(), one.checkpoints[0].losses())
    mine, other = many.checkpoints[0].kernel(), one.checkpoints[0].kernel()
    torch.testing.assert_close(
        mine.eigenvalues, other.eigenvalues, rtol=1e-9, atol=1e-9 * one_trace(other)
    )
    torch.testing.assert_close(mine.gram(), other.gram(), rtol=1e-5, atol=1e-6 * one_trace(other))
    torch.testing.assert_close(mine.mean, other.mean)
    names = [f"rank{rank}" for rank in range(count)]
    assert [
        name for name in names if not list((tmp_path / "many" / FOLDER).glob(f"{name}-*.h5"))
    ] == []
    assert list((tmp_path / "many" / FOLDER).glob("*.json")) == []


def one_trace(kernel: Any) -> float:
    return float(kernel.trace)


def test_an_interrupted_capture_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    ended = together(2, lambda processes: capture(tmp_path / "cut", processes, stop={1: 6}))
    assert isinstance(ended[1], StoppedError)
    assert isinstance(ended[0], RuntimeError)
    assert "rank 1: StoppedError" in str(ended[0])
    with pytest.raises(StoreError, match="no sealed checkpoint"):
        TraceStore(tmp_path / "cut")
    done = [0, 0]
    together(2, lambda processes: capture(tmp_path / "cut", processes, done=done))
    assert done == [9, 6]
    together(2, lambda processes: capture(tmp_path / "whole", processes))
    assert read_bytes(tmp_path / "cut") == read_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("count", "weights"), [(2, 2.0), (3, 1.0), (1, 1.0)], ids=["weights", "more", "one"]
)
def test_other_weights_or_another_number_of_processes_begin_anew(
    tmp_path: Path, count: int, weights: float
) -> None:
    together(2, lambda processes: capture(tmp_path / "cut", processes, stop={0: 6, 1: 6}))
    assert list((tmp_path / "cut" / FOLDER).glob("rank1*"))
    done = [-1] * count
    ended = together(
        count, lambda processes: capture(tmp_path / "cut", processes, weights=weights, done=done)
    )
    assert [error for error in ended if isinstance(error, Exception)] == []
    assert done == [0] * count
    together(count, lambda processes: capture(tmp_path / "whole", processes, weights=weights))
    assert read_bytes(tmp_path / "cut") == read_bytes(tmp_path / "whole")


def seal(path: Path, processes: Processes, own: torch.Tensor) -> None:
    features, loss = make_traces(N, 6)
    writer = TraceWriter(path, make_header(dataset={"size": N}), processes=processes)
    writer.write_samples(make_table(N))
    with writer.begin_checkpoint(1, epoch=0) as checkpoint:
        checkpoint.append(own, features[own], loss[own])
        checkpoint.seal()


def test_a_sample_of_two_processes_is_refused_in_both(tmp_path: Path) -> None:
    for error in together(2, lambda one: seal(tmp_path, one, torch.arange(12) + 10 * one.rank)):
        assert isinstance(error, StoreError)
        assert (
            "2 samples have traces of more than one process: 'image/010.png', 'image/011.png'"
            in str(error)
        )


def test_a_missing_sample_is_told_to_all(tmp_path: Path) -> None:
    for error in together(2, lambda one: seal(tmp_path, one, torch.arange(1, N)[one.rank :: 2])):
        assert "1 of 22 samples have no trace: 'image/000.png'" in str(error)


def test_a_process_with_another_set_up_is_told_in_all(tmp_path: Path) -> None:
    def differently(processes: Processes) -> TraceWriter:
        header = make_header(model={"architecture": f"a{processes.rank}"})
        return TraceWriter(tmp_path, header, processes=processes)

    first, second = together(2, differently)
    assert isinstance(second, StoreMismatchError)
    assert "model.architecture" in str(second)
    assert isinstance(first, StoreMismatchError)
    assert "rank 1" in str(first)


def test_a_shard_that_cannot_be_written_by_one_stops_all_and_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctrak_lightning.store import checkpoint_writer

    write, broken = checkpoint_writer.write_shard, [True]

    def full_disk(path: Path, rows: Any) -> None:
        if broken[0] and path.name.startswith("rank1-00001"):
            raise OSError(28, "No space left on device")
        write(path, rows)

    monkeypatch.setattr(checkpoint_writer, "write_shard", full_disk)
    ended = together(2, lambda processes: capture(tmp_path / "cut", processes))
    assert all(isinstance(error, StoreError) and "No space left" in str(error) for error in ended)
    broken[0] = False
    together(2, lambda processes: capture(tmp_path / "cut", processes))
    together(2, lambda processes: capture(tmp_path / "whole", processes))
    assert read_bytes(tmp_path / "cut") == read_bytes(tmp_path / "whole")


def test_journals_that_a_crash_left_after_sealing_are_removed(tmp_path: Path) -> None:
    together(2, lambda processes: capture(tmp_path / "cut", processes, stop={1: 6}))
    journal = (tmp_path / "cut" / FOLDER / "rank1.json").read_bytes()
    together(2, lambda processes: capture(tmp_path / "cut", processes))
    (tmp_path / "cut" / FOLDER / "rank1.json").write_bytes(journal)
    assert TraceStore(tmp_path / "cut").verify() == [
        f"{FOLDER}/rank1.json: not recorded in the manifest"
    ]
    TraceWriter(tmp_path / "cut", make_header(dim=6, dataset={"size": N}))
    assert TraceStore(tmp_path / "cut").verify() == []


def test_journals_of_a_capture_in_progress_are_no_strangers(tmp_path: Path) -> None:
    def two_steps(processes: Processes) -> None:
        writer = capture(tmp_path, processes)
        features, loss = make_traces(N, 6)
        with writer.begin_checkpoint(2, epoch=1) as checkpoint:
            own = torch.arange(N)[processes.rank :: 2]
            checkpoint.append(own[:6], features[own[:6]], loss[own[:6]])

    together(2, two_steps)
    assert (tmp_path / "checkpoint-00000002" / "rank1.json").exists()
    with pytest.warns(UserWarning, match=r"steps \[2\] are not sealed"):
        store = TraceStore(tmp_path)
    assert store.verify() == []
    # A single process that opens the store keeps them too: nothing is lost by looking.
    TraceWriter(tmp_path, make_header(dim=6, dataset={"size": N}))
    assert (tmp_path / "checkpoint-00000002" / "rank1-00001.h5").exists()


@pytest.mark.parametrize("damage", ["cut", "other shard"])
def test_a_damaged_journal_is_refused_in_all(tmp_path: Path, damage: str) -> None:
    together(2, lambda processes: capture(tmp_path, processes, stop={1: 6}))
    journal = tmp_path / FOLDER / "rank1.json"
    if damage == "cut":
        journal.write_bytes(journal.read_bytes()[:-9])
    else:
        content = json.loads(journal.read_text())
        content["files"][f"{FOLDER}/rank1-00000.h5"]["bytes"] += 1
        journal.write_text(json.dumps(content))
    for error in together(2, lambda processes: capture(tmp_path, processes)):
        assert isinstance(error, CorruptStoreError)
        assert "rank1" in str(error)


def test_discarding_is_done_by_all(tmp_path: Path) -> None:
    def twice(processes: Processes) -> tuple[list[int], list[int]]:
        writer = capture(tmp_path, processes)
        features, loss = make_traces(N, 6)
        own = torch.arange(N)[processes.rank :: 2]
        checkpoint = writer.begin_checkpoint(2, epoch=1)
        checkpoint.append(own, features[own], loss[own])
        gone = writer.discard_after(1)
        with writer.begin_checkpoint(2, epoch=1) as again:
            assert again.rows_done == 0
            again.append(own, features[own], loss[own])
            again.seal()
        return gone, writer.sealed_steps

    assert together(2, twice) == [([2], [1, 2])] * 2
    assert TraceStore(tmp_path).verify() == []
