"""Shards are written by a thread: capture does not wait for it, and what goes wrong there is raised
by the next call."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from store_builder import Capture, make_table, read_bytes

from ctrak_lightning.errors import StoreError
from ctrak_lightning.store import CheckpointWriter, TraceStore, TraceWriter, checkpoint_writer
from ctrak_lightning.store.background import InBackground

WRITE = checkpoint_writer.write_shard


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert writing() == []


def writing() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ctrak-write"]


@pytest.fixture
def opened(tmp_path: Path, capture: Capture) -> tuple[TraceWriter, CheckpointWriter]:
    writer = capture.open(tmp_path / "store")
    writer.write_samples(make_table())
    return writer, begin(writer, capture)


def begin(writer: TraceWriter, capture: Capture) -> CheckpointWriter:
    return writer.begin_checkpoint(300, epoch=3, learning_rate=0.1, weights=capture.weights(300))


def append(checkpoint: CheckpointWriter, capture: Capture, start: int, stop: int) -> None:
    features, loss = capture.traces(300)
    rows = capture.order(300)[start:stop]
    checkpoint.append(rows, features[rows], loss[rows])


def on_write(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> list[str]:
    """Call ``act`` with the number of the attempt before each shard is written; returns the names
    of the threads."""
    threads: list[str] = []

    def write(path: Path, rows: Any) -> None:
        threads.append(threading.current_thread().name)
        act(len(threads))
        WRITE(path, rows)

    monkeypatch.setattr(checkpoint_writer, "write_shard", write)
    return threads


def wait_for(gate: threading.Semaphore) -> None:
    gate.acquire()


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_capture_waits_for_the_disk_no_longer_than_the_queue(
    opened: tuple[TraceWriter, CheckpointWriter], capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Semaphore(0)
    threads = on_write(monkeypatch, lambda attempt: wait_for(gate))
    _, checkpoint = opened
    append(checkpoint, capture, 0, 8)  # two shards: one being written, one in the queue of two
    assert checkpoint.rows_done == 0
    gate.release(2)
    checkpoint.flush()
    assert checkpoint.rows_done == 8
    append(checkpoint, capture, 8, 10)
    gate.release()
    checkpoint.seal()
    assert threads == ["ctrak-write"] * 3


def test_a_full_queue_makes_capture_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, done = threading.Semaphore(0), []
    jobs = InBackground(2)
    submitted = threading.Event()

    def work(i: int) -> None:
        gate.acquire()
        done.append(i)

    def submit() -> None:
        for i in range(3):
            jobs.submit(partial(work, i))
        submitted.set()

    caller = threading.Thread(target=submit)
    caller.start()
    early = submitted.wait(0.2)
    gate.release()
    late = submitted.wait(10)
    gate.release(2)
    caller.join()
    jobs.wait()
    assert (early, late) == (False, True)
    assert done == [0, 1, 2]


def test_the_bytes_are_those_of_a_writer_that_waits_after_every_batch(
    tmp_path: Path, capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_bytes(capture.run(tmp_path / "whole", batch=1))
    real = CheckpointWriter.append

    def waiting(self: CheckpointWriter, *arguments: torch.Tensor) -> None:
        real(self, *arguments)
        self.flush()

    monkeypatch.setattr(CheckpointWriter, "append", waiting)
    assert read_bytes(capture.run(tmp_path / "waiting", batch=1)) == whole


@pytest.mark.parametrize("call", ["append", "seal", "flush", "close", "with", "begin"])
def test_a_full_disk_is_told_by_the_next_call_and_sealed_shards_stay(
    opened: tuple[TraceWriter, CheckpointWriter],
    capture: Capture,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    writer, checkpoint = opened
    append(checkpoint, capture, 0, 4)
    checkpoint.flush()
    on_write(monkeypatch, full_disk)
    append(checkpoint, capture, 4, 10 if call == "seal" else 8)
    settle()
    message = r"rank0-00001\.h5 cannot be written.*No space left on device.*HINT: .*free space"

    calls: dict[str, Callable[[], object]] = {
        "append": lambda: append(checkpoint, capture, 8, 10),
        "seal": checkpoint.seal,
        "flush": checkpoint.flush,
        "close": checkpoint.close,
        "with": lambda: checkpoint.__exit__(None, None, None),
        "begin": lambda: begin(writer, capture),
    }
    with pytest.raises(StoreError, match=message) as caught:
        calls[call]()
    assert isinstance(caught.value.__cause__, OSError)
    assert writing() == []
    checkpoint.close()
    monkeypatch.undo()
    with begin(writer, capture) as again:
        assert again.rows_done == 4
        append(again, capture, 4, 10)
        again.seal()
    store = TraceStore(writer.path)
    assert store.verify() == []
    torch.testing.assert_close(
        store.checkpoints[0].features(), capture.traces(300)[0], rtol=1e-6, atol=0
    )


def settle() -> None:
    """Let the thread come to its end, without asking the checkpoint."""
    for thread in writing():
        thread.join()


def test_a_refused_append_took_nothing_in_and_the_next_one_tries_again(
    opened: tuple[TraceWriter, CheckpointWriter],
    tmp_path: Path,
    capture: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = read_bytes(Capture(steps=(300,)).run(tmp_path / "whole"))
    on_write(monkeypatch, lambda attempt: full_disk() if attempt == 1 else None)
    writer, checkpoint = opened
    append(checkpoint, capture, 0, 4)
    settle()
    with pytest.raises(StoreError, match="No space left"):
        append(checkpoint, capture, 4, 9)
    append(checkpoint, capture, 4, 9)
    append(checkpoint, capture, 9, 10)
    checkpoint.seal()
    assert read_bytes(writer.path) == whole


def test_an_exception_of_the_capture_is_not_hidden_by_the_disk(
    opened: tuple[TraceWriter, CheckpointWriter], capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_write(monkeypatch, full_disk)
    _, checkpoint = opened

    def interrupted() -> None:
        with checkpoint:
            append(checkpoint, capture, 0, 4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


def test_full_shards_are_written_before_a_capture_is_left(
    opened: tuple[TraceWriter, CheckpointWriter], capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_write(monkeypatch, lambda attempt: time.sleep(0.05))
    writer, checkpoint = opened
    append(checkpoint, capture, 0, 9)
    checkpoint.close()
    assert begin(writer, capture).rows_done == 8


@pytest.mark.parametrize("death", [SystemExit, MemoryError, ZeroDivisionError])
def test_a_thread_that_dies_of_another_error_is_told_and_replaced(
    opened: tuple[TraceWriter, CheckpointWriter],
    capture: Capture,
    monkeypatch: pytest.MonkeyPatch,
    death: type[BaseException],
) -> None:
    def die(attempt: int) -> None:
        if attempt == 1:
            raise death("gone")

    on_write(monkeypatch, die)
    writer, checkpoint = opened
    append(checkpoint, capture, 0, 9)
    settle()
    with pytest.raises(
        StoreError, match=rf"thread that writes traces ended with {death.__name__}: gone.*HINT"
    ):
        append(checkpoint, capture, 9, 10)
    append(checkpoint, capture, 9, 10)
    checkpoint.seal()
    assert TraceStore(writer.path).verify() == []


def test_a_thread_that_dies_without_a_word_does_not_hang_the_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs, done = InBackground(1), []
    with monkeypatch.context() as patch:
        patch.setattr(InBackground, "_run", lambda self: None)
        for i in range(3):
            jobs.submit(partial(done.append, i))
        with pytest.raises(StoreError, match="it died with jobs left to do.*HINT"):
            jobs.wait()
    jobs.wait()
    assert done == [0, 1, 2]


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    jobs, done = InBackground(1), []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        jobs.submit(lambda: done.append(1))
        with pytest.raises(StoreError, match="can't start new thread"):
            jobs.raise_error()
    jobs.wait()
    assert done == [1]


def test_discarding_waits_for_shards_of_an_earlier_checkpoint(
    opened: tuple[TraceWriter, CheckpointWriter], capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_write(monkeypatch, lambda attempt: time.sleep(0.05))
    writer, checkpoint = opened
    append(checkpoint, capture, 0, 8)
    assert writer.discard_after(300) == []
    assert checkpoint.rows_done == 8
    append(checkpoint, capture, 8, 10)
    checkpoint.seal()
    assert TraceStore(writer.path).verify() == []


FILL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from store_builder import Capture, make_table
from ctrak_lightning.errors import StoreError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
capture = Capture(n=64, k=4096, shard_rows=16, steps=(300,))
writer = capture.open(Path(sys.argv[2]))
writer.write_samples(make_table(64))
checkpoint = writer.begin_checkpoint(300, epoch=3, learning_rate=0.1, weights=capture.weights(300))
features, loss = capture.traces(300)
order = capture.order(300)
checkpoint.append(order[:16], features[order[:16]], loss[order[:16]])
checkpoint.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    with checkpoint:
        checkpoint.append(order[16:], features[order[16:]], loss[order[16:]])
        checkpoint.seal()
except StoreError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="limits the size of files through POSIX")
def test_files_that_the_system_refuses_to_let_grow(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", FILL, here, str(tmp_path / "store")]
    environment = os.environ | {"PYTHONPATH": str(Path(here).parents[1])}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "rank0-00001.h5 cannot be written" in done.stdout
    assert "HINT" in done.stdout
    capture = Capture(n=64, k=4096, shard_rows=16, steps=(300,))
    assert read_bytes(capture.run(tmp_path / "store")) == read_bytes(
        capture.run(tmp_path / "whole")
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
