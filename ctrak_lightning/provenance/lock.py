"""One process at a time changes a ledger, or makes a store forget."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ctrak_lightning.errors import StoreError
from ctrak_lightning.traces.schema import LEDGER_LOCK

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

_AGAIN_S = 0.05


@contextmanager
def exclusive(root: Path, wait_s: float = 30.0) -> Iterator[None]:
    """Holds the lock of the store at ``root``: ``flock`` on an empty file that stays there.

    The system gives it back when the process ends, however it ends. Where there is no ``flock`` (Windows) nothing is locked, and
    keeping to one process at a time is the user's affair.

    Args:
        root: folder of the store.
        wait_s: how long to wait for another process.

    Raises:
        StoreError: another process holds it all that time, or the folder cannot be written.
    """
    path = root / LEDGER_LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be opened for writing ({error}). HINT: the folder of the store must be writable to record anything "
            "in its ledger."
        ) from error
    try:
        _take(descriptor, path, time.monotonic() + wait_s)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path, deadline: float) -> None:
    if fcntl is None:
        return
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise StoreError(
                    f"{path}: another process is writing to the ledger of this store, or making it forget. HINT: try again when "
                    "it has ended."
                ) from error
            time.sleep(_AGAIN_S)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be locked ({error}). HINT: keep the store on a file system that has locks."
            ) from error
