"""Who may change a store: one writer at a time, and one process at a time in its ledger."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ctrak_lightning.errors import StoreError, StoreLockedError
from ctrak_lightning.store.files import TEMPORARY_SUFFIX, make_folder, open_file, reading
from ctrak_lightning.store.schema import LEDGER_LOCK, MANIFEST, WRITER_LOCK
from ctrak_lightning.utilities.naming import utc_now
from ctrak_lightning.utilities.processes import ALONE, Processes

_GRACE_S = 0.5
"""A process that was just killed takes a moment to end; so does a look at a store by another
command."""
_AGAIN_S = 0.05
_LONGEST_NOTE = 4096


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a store, as the lock file says."""

    host: str
    pid: int
    since: str
    """UTC, ISO 8601, to the second."""
    work: str
    """What it does, as a verb phrase: "traces into it"."""

    @classmethod
    def myself(cls, work: str) -> Holder:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), utc_now(), work)

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine."""
        return self.host == socket.gethostname()

    @property
    def has_ended(self) -> bool:
        """Whether it is known not to run any more: it left its note behind, and another holds the
        lock."""
        try:
            if self.is_here:
                os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # of another user
            return False
        return False

    def __str__(self) -> str:
        where = f"process {self.pid} on {self.host}"
        if self.is_here and self.pid == os.getpid():
            where = f"this very process ({self.pid} on {self.host})"
        return f"{where}, which {self.work} since {self.since}"


class WriterLock:
    """The right to change the store at ``root``: no other process, and nobody else in this one, has
    it meanwhile.

    Held from here on until :meth:`release`, until nothing refers to it any more, or until the
    process ends, however it ends: ``flock``, which processes that are forked off do not keep alive.
    The file that it is taken on stays in the store; while it is held it says by whom, and what
    ``work`` that does.

    Raises:
        StoreLockedError: another has it; the message names host and process.
        StoreError: the file cannot be written, or the file system has no locks.
    """

    def __init__(self, root: Path, work: str) -> None:
        self.root = root
        self._pid = os.getpid()
        path = root / WRITER_LOCK
        descriptors: list[int] = []
        note = json.dumps(asdict(Holder.myself(work))).encode("ascii")
        self._lock = _lock(path, descriptors.append)
        if not _taken(self._lock, _GRACE_S):
            gc.collect()  # a writer of this process that nobody uses any more
            if not _taken(self._lock, 0):
                raise _held(root)
        self._descriptor: int | None = descriptors[-1]
        self._free = weakref.finalize(self, _release, self._lock, descriptors[-1], self._pid)
        with contextlib.suppress(OSError):  # of a full disk; the next writer's error says less then
            os.ftruncate(descriptors[-1], 0)
            os.pwrite(descriptors[-1], note, 0)

    def release(self) -> None:
        """Let others write; idempotent."""
        self._free()

    def require(self) -> None:
        """Raises a StoreError if it is not held any more, or by the process that this one was
        forked from; a StoreLockedError if another file, or none, has its name: whoever comes next
        may hold that one, and the store then is theirs."""
        if self._pid != os.getpid():
            raise StoreError(
                f"{self.root} is written by process {self._pid}, of which this one, {os.getpid()}, "
                "is a copy. Nothing was changed. HINT: write in the process that opened the store."
            )
        if not self._free.alive:
            raise StoreError(
                f"{self.root}: its writer was closed. Nothing was changed. HINT: open the store "
                "again."
            )
        self._require_file()

    def _require_file(self) -> None:
        path = self.root / WRITER_LOCK
        if self._descriptor is None or _is_at(self._descriptor, path):
            return
        raise StoreLockedError(
            f"{path} was removed or replaced while this run had its store open: another run may "
            "have begun here since. Nothing was changed. HINT: end the run before its folder is "
            "removed, leave the lock where it is, and trace into a new folder."
        )


class NoLock(WriterLock):
    """What the other processes of a capture have: the first one holds the lock for all, once these
    are made."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._descriptor = None
        # Not locked, but open: as long as it is, no other file gets its number. Other machines may
        # see it late: then unchecked.
        with contextlib.suppress(OSError):
            self._descriptor = open_file(root / WRITER_LOCK)
            self._close = weakref.finalize(self, os.close, self._descriptor)

    def release(self) -> None:
        """Lets go of the file; idempotent."""
        if self._descriptor is not None:
            self._descriptor = None
            self._close()

    def require(self) -> None:
        """Raises a StoreLockedError if the lock that the first process held is not there any
        more."""
        self._require_file()


def hold_folder(
    root: Path, processes: Processes = ALONE, work: str = "traces into it"
) -> WriterLock:
    """Makes the folder of a store if it is not there, and takes its lock; all ``processes`` call
    it, the first has it.

    Raises:
        StoreLockedError: another holds it; nothing was changed.
        StoreError: the folder holds files that are not a store's, or it cannot be written.
    """
    lock: WriterLock | None = None
    with processes.sharing_errors():
        if processes.is_first:
            make_folder(root)
            _refuse_foreign_files(root)
            lock = WriterLock(root, work)
    return NoLock(root) if lock is None else lock


@contextmanager
def hold_for(root: Path, work: str) -> Iterator[WriterLock]:
    """Holds the store at ``root`` and its ledger for one piece of work; gives the lock, to be
    required before anything is replaced.

    Raises:
        StoreLockedError: another holds the store; nothing was changed.
        StoreError: as of :func:`ledger_lock`.
    """
    lock = WriterLock(root, work)
    try:
        with ledger_lock(root):
            yield lock
    finally:
        lock.release()


@contextmanager
def ledger_lock(root: Path, wait_s: float = 30.0) -> Iterator[None]:
    """Holds the ledger of the store at ``root``; entries are added while a writer holds the store.
    Another process is waited for.

    Raises:
        StoreError: another process holds it all that time, or the folder cannot be written.
    """
    path = root / LEDGER_LOCK
    lock = _lock(path, None)
    if not _taken(lock, wait_s):
        raise StoreError(
            f"{path}: another process is writing to the ledger of this store, or making it forget. "
            "HINT: try again when it has ended."
        )
    try:
        yield
    finally:
        lock.release()


def _lock(path: Path, on_acquired: Callable[[int], None] | None) -> FileLock:
    try:
        # With the permissions that the user's umask gives, so that a group can share a store.
        os.close(open_file(path, os.O_RDWR | os.O_CREAT))
    except OSError as error:
        raise StoreError(
            f"{path} cannot be opened for writing ({error}). HINT: the folder of the store must be "
            "writable to change anything in it or in its ledger."
        ) from error
    # No way out by a file that is there or not, which a killed process would leave behind.
    return FileLock(
        path,
        thread_local=False,
        fallback_to_soft=False,
        preserve_lock_file=True,
        on_acquired=on_acquired,
    )


def _taken(lock: FileLock, wait_s: float) -> bool:
    try:
        lock.acquire(timeout=wait_s, poll_interval=_AGAIN_S)
    except Timeout:
        return False
    except OSError as error:
        raise StoreError(
            f"{lock.lock_file} cannot be locked ({error}). HINT: keep the store on a file system "
            "that has locks (flock), such as a local disk, and copy it when training has ended."
        ) from error
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StoreError(
            f"{path} cannot be looked at ({error}). HINT: check the permissions of its folder."
        ) from error


def _release(lock: FileLock, descriptor: int, pid: int) -> None:
    if pid != os.getpid():
        return  # a copy of the process that holds it
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
    lock.release(force=True)


def _held(root: Path) -> StoreLockedError:
    holder = _read_note(root / WRITER_LOCK)
    who = "another process" if holder is None or holder.has_ended else str(holder)
    return StoreLockedError(
        f"{root} is held by {who}. A store has one writer at a time. Nothing was changed. HINT: "
        "write to another folder, or wait until it has ended; TraceWriter.close() lets go of a "
        "store. A process that was killed holds nothing."
    )


def _read_note(path: Path) -> Holder | None:
    try:
        with reading(path) as file:
            content = json.loads(file.read(_LONGEST_NOTE))
        holder = Holder(**content)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    texts = (holder.host, holder.since, holder.work)
    # Printed as it is: a store from somebody else may say anything.
    is_sound = all(isinstance(text, str) and text.isprintable() for text in texts)
    is_sound &= type(holder.pid) is int and holder.pid > 0
    return holder if is_sound else None


def _refuse_foreign_files(root: Path) -> None:
    if (root / MANIFEST).exists():
        return
    own = {WRITER_LOCK, LEDGER_LOCK}
    names = sorted(entry.name for entry in root.iterdir())
    foreign = [name for name in names if name not in own and not name.endswith(TEMPORARY_SUFFIX)]
    if foreign:
        raise StoreError(
            f"{root} has no {MANIFEST} but holds {len(foreign)} other files, such as "
            f"{foreign[0]!r}. HINT: give an empty folder, or one that does not exist yet."
        )
