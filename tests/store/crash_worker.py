"""Captures that SIGKILL themselves; each runs in a fork, so torch is imported once. Writes a JSON
report."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
from store_builder import Capture, read_bytes

from ctrak_lightning.errors import CorruptStoreError, StoreError
from ctrak_lightning.store import TraceStore


def in_fork(
    work: Callable[..., object],
    *arguments: Any,
    kill_tick: int = 0,
    kill_after_s: float | None = None,
) -> int:
    """Run ``work(*arguments)`` in a fork; returns its exit status, or minus the signal that ended
    it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if kill_tick:
                kill_at(kill_tick)
            work(*arguments)
            status = 0
        finally:
            os._exit(status)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(tick: int) -> None:
    """SIGKILL this process just before or just after its ``tick``-th step that touches the disk."""
    ticks = 0

    def tick_once() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == tick:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            tick_once()
            result = original(*args, **kwargs)
            tick_once()
            return result

        setattr(owner, name, wrapped)

    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "mkdir"), (Path, "unlink")):
        wrap(owner, name)
    wrap(h5py.Group, "create_dataset")


def check_and_continue(path: Path, capture: Capture) -> None:
    """The store opens and is sound, or says in a typed error that nothing is sealed yet; then
    complete it."""
    try:
        for checkpoint in TraceStore(path).checkpoints:
            assert bool((checkpoint.features().norm(dim=1) > 0).all())
    except CorruptStoreError:
        raise
    except StoreError:
        pass
    capture.run(path, batch=2)


def every_tick(folder: Path, capture: Capture, expected: dict[str, bytes]) -> dict[str, Any]:
    bad: list[int] = []
    tick = 0
    while True:
        tick += 1
        path = folder / str(tick)
        status = in_fork(capture.run, path, kill_tick=tick)
        if status == 0:
            return {"killed": tick - 1, "bad": bad}
        continued = in_fork(check_and_continue, path, capture)
        if (status, continued) != (-signal.SIGKILL, 0) or read_bytes(path) != expected:
            bad.append(tick)


def again_and_again(folder: Path, capture: Capture, expected: dict[str, bytes]) -> dict[str, Any]:
    kills = 0
    while in_fork(capture.run, folder / "chain", kill_tick=60) != 0:
        kills += 1
        if kills > 100:
            break
    return {"killed": kills, "bad": [] if read_bytes(folder / "chain") == expected else ["chain"]}


def any_time(folder: Path, capture: Capture, expected: dict[str, bytes]) -> dict[str, Any]:
    bad: list[int] = []
    killed = 0
    for attempt in range(6):
        path = folder / f"timed{attempt}"
        delay = random.Random(attempt).uniform(0.005, 0.1)
        killed += in_fork(capture.run, path, kill_after_s=delay) == -signal.SIGKILL
        if in_fork(capture.run, path) != 0 or read_bytes(path) != expected:
            bad.append(attempt)
    return {"killed": killed, "bad": bad}


def run(root: Path, capture: Capture, works: list[Callable[..., dict[str, Any]]]) -> dict[str, Any]:
    in_fork(capture.run, root / "whole")
    expected = read_bytes(root / "whole")
    return {
        work.__name__: work(root, capture, expected) | {"files": len(expected)} for work in works
    }


if __name__ == "__main__":
    # SIGKILL does not take the page cache along, and a busy disk takes 0.2 s for one fsync.
    os.fsync = lambda descriptor: None
    small, usual = Path(sys.argv[1]) / "small", Path(sys.argv[1]) / "usual"
    report = run(small, Capture(n=6, steps=(300,)), [every_tick])
    json.dump(report | run(usual, Capture(), [again_and_again, any_time]), sys.stdout)
