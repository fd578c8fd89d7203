"""A store has one writer at a time, and a writer that is gone holds nothing."""

import gc
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from store_builder import Capture, make_header, make_table, read_bytes

from ctrak_lightning.errors import StoreError, StoreLockedError, StoreMismatchError
from ctrak_lightning.store import TraceStore, TraceWriter
from ctrak_lightning.store.lock import NoLock, WriterLock, hold_folder, ledger_lock
from ctrak_lightning.store.schema import MANIFEST, WRITER_LOCK
from ctrak_lightning.store.sections import Visits
from ctrak_lightning.utilities.processes import Processes

needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrak_lightning.store.lock._GRACE_S", 0.02)


def child(work: Callable[[int], None]) -> tuple[int, int]:
    """A process that does ``work`` with the end of a pipe to write to; its id and the end to read
    from."""
    readable, writable = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads
        pid = os.fork()
    if pid:
        os.close(writable)
        return pid, readable
    try:
        work(writable)
    finally:
        os._exit(1)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_second_writer_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    writer = Capture().open(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in sorted(os.listdir(tmp_path))}
    me = rf"this very process \({os.getpid()} on {re.escape(socket.gethostname())}\), which traces into it since 20"
    for other in (tmp_path, tmp_path / ".." / tmp_path.name):
        with pytest.raises(StoreLockedError, match=f"{me}.*Nothing was changed.*HINT"):
            Capture().open(other)
    assert {name: (tmp_path / name).read_bytes() for name in sorted(os.listdir(tmp_path))} == before
    writer.close()
    writer.close()
    assert (tmp_path / WRITER_LOCK).read_bytes() == b""
    with pytest.raises(StoreError, match="its writer was closed.*HINT"):
        writer.write_samples(make_table())
    with Capture().open(tmp_path) as again:
        again.write_samples(make_table())
    Capture().open(tmp_path)


def test_a_writer_that_nobody_uses_any_more_holds_nothing(tmp_path: Path) -> None:
    first = Capture().open(tmp_path)
    del first
    second = Capture().open(tmp_path)
    second.itself = second  # type: ignore[attr-defined]
    del second
    gc.disable()  # what a cycle keeps alive is looked for when somebody is about to be refused
    try:
        third = Capture().open(tmp_path)
    finally:
        gc.enable()
    third.close()
    with pytest.raises(StoreMismatchError) as kept:  # with the frames in which it was raised
        TraceWriter(tmp_path, make_header(dim=7))
    Capture().open(tmp_path)
    assert kept.value.__traceback__ is not None


def test_a_folder_of_other_files_gets_no_lock(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"thesis\.tex"):
        hold_folder(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@needs_fork
def test_a_killed_holder_holds_nothing_even_if_its_workers_live(tmp_path: Path) -> None:
    def hold(pipe: int) -> None:
        lock = WriterLock(tmp_path, "traces into it")
        worker = os.fork()  # as a DataLoader does; it outlives the holder
        if not worker:
            try:
                lock.require()
            except StoreError as error:
                os.write(pipe, f"{os.getpid()} {type(error).__name__}\n".encode())
            lock.release()  # of no effect
            time.sleep(60)
        os.read(os.pipe()[0], 1)

    pid, pipe = child(hold)
    worker, told = os.read(pipe, 100).decode().split()
    try:
        assert told == "StoreError"  # the worker is a copy that may not write
        with pytest.raises(
            StoreLockedError, match=rf"held by process {pid} on {re.escape(socket.gethostname())}"
        ):
            WriterLock(tmp_path, "forgets samples")
        kill(pid)
        assert (
            json.loads((tmp_path / WRITER_LOCK).read_text())["pid"] == pid
        )  # what a dead one leaves behind
        os.kill(int(worker), 0)
        WriterLock(tmp_path, "forgets samples").release()
    finally:
        os.kill(int(worker), signal.SIGKILL)


@needs_fork
def test_a_dead_process_is_not_blamed(tmp_path: Path) -> None:
    pid, _ = child(lambda pipe: os._exit(0))
    os.waitpid(pid, 0)
    for host, held_by in (
        (socket.gethostname(), "another process"),
        ("far-away", f"process {pid} on far-away"),
    ):
        note = {"host": host, "pid": pid, "since": "2026-01-01T00:00:00Z", "work": "traces into it"}
        (tmp_path / WRITER_LOCK).write_text(json.dumps(note))
        with (
            FileLock(tmp_path / WRITER_LOCK),
            pytest.raises(StoreLockedError, match=f"is held by {held_by}[.,]"),
        ):
            WriterLock(tmp_path, "traces into it")


@pytest.mark.parametrize(
    "note", ["", "{}", "[" * 4000, '{"host": "\\u001b[2J", "pid": 1, "since": "", "work": ""}']
)
def test_any_note_may_stand_in_the_lock(tmp_path: Path, note: str) -> None:
    (tmp_path / WRITER_LOCK).write_text(note)
    with (
        FileLock(tmp_path / WRITER_LOCK),
        pytest.raises(StoreLockedError, match="is held by another process"),
    ):
        WriterLock(tmp_path, "traces into it")
    WriterLock(tmp_path, "traces into it").release()


def test_a_ledger_has_a_lock_of_its_own(tmp_path: Path) -> None:
    lock = WriterLock(tmp_path, "traces into it")
    with (
        ledger_lock(tmp_path),
        pytest.raises(StoreError, match=r"ledger\.lock: another process is writing"),
        ledger_lock(tmp_path, 0.01),
    ):
        pass
    lock.release()


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(
        StoreError, match=r"cannot be locked.*Function not implemented.*HINT: keep the store"
    ):
        Capture().open(tmp_path)


def test_a_manifest_that_another_has_changed_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where locks do not hold: two writers of one store, as on some network file systems."""
    capture = Capture(steps=(300,))
    first = capture.open(tmp_path)
    first.write_samples(make_table())
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    capture.run(tmp_path)
    sealed = read_bytes(tmp_path)
    # Of the step that the other has sealed as well, whose files have the same names.
    for step in (300, 900):
        with pytest.raises(
            StoreError, match=r"manifest\.json: another process has changed it.*HINT"
        ):
            first.begin_checkpoint(
                step, epoch=9, weights={"a": torch.ones(7)}, exposures=torch.ones(10)
            )
        assert read_bytes(tmp_path) == sealed
    assert read_bytes(tmp_path) == sealed
    assert TraceStore(tmp_path).verify() == []
    first.close()
    third = capture.open(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"manifest\.json was removed"):
        third.begin_checkpoint(900, epoch=9)


def remove_folder(root: Path) -> None:
    shutil.rmtree(root)


def remove_lock(root: Path) -> None:
    (root / WRITER_LOCK).unlink()


@pytest.mark.parametrize("remove", [remove_folder, remove_lock])
def test_a_run_whose_lock_was_removed_writes_nothing(
    tmp_path: Path, remove: Callable[[Path], None]
) -> None:
    root, capture = tmp_path / "store", Capture(steps=(300,))
    first = capture.open(root)
    first.write_samples(make_table())
    other_rank = NoLock(root)
    begun = first.begin_checkpoint(300, epoch=3)
    features, loss = capture.traces(300)
    begun.append(torch.arange(3), features[:3], loss[:3])
    remove(root)
    for lock in (first._lock, other_rank):
        with pytest.raises(StoreLockedError, match=r"writer\.lock was removed or replaced.*HINT"):
            lock.require()
    if remove is remove_folder:
        capture.run(root)
    else:  # the first run's checkpoint is the second's to go on with
        with capture.open(root) as second:
            second.discard_after(0)
        capture.run(root)
    theirs = read_bytes(root)
    none = torch.zeros(10, dtype=torch.int64)
    attempts: tuple[Callable[[], object], ...] = (
        lambda: begun.write_visits(Visits(counts=none, timesteps=none[:0], steps=none[:0])),
        lambda: begun.append(torch.arange(3, 10), features[3:], loss[3:]) or begun.flush(),  # type: ignore[func-returns-value]
        lambda: first.begin_checkpoint(600, epoch=6, weights={"a": torch.ones(2)}),
        lambda: first.discard_after(0),
        other_rank.require,
    )
    for attempt in attempts:
        with pytest.raises(StoreLockedError, match="was removed or replaced"):
            attempt()
        assert read_bytes(root) == theirs
    other_rank.release()
    assert TraceStore(root).verify() == []


def test_a_file_is_checked_again_before_it_gets_its_name(tmp_path: Path) -> None:
    """A kernel of a large store takes minutes, in which its folder may become another's."""
    writer = Capture().open(tmp_path)
    writer.write_samples(make_table())
    name = "checkpoint-00000300/kernel.h5"

    def fill(path: Path) -> None:
        path.write_bytes(b"x")
        remove_lock(tmp_path)

    with pytest.raises(StoreLockedError):
        writer._records.write(name, fill)
    assert os.listdir(tmp_path / "checkpoint-00000300") == []


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_sealed_is_not_written_over(tmp_path: Path, rank: int) -> None:
    root = Capture(steps=(300,)).run(tmp_path)
    sealed = read_bytes(root)
    writer = Capture().open(root)
    writer._records._processes = Processes()
    writer._records._processes.rank = rank
    for name in [name for name in sealed if name != MANIFEST]:
        with pytest.raises(StoreError, match="part of what this store has sealed.*HINT"):
            writer._records.write(name, lambda path: path.write_bytes(b"x") and None)
    assert read_bytes(root) == sealed
