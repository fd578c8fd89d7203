"""How files reach the disk, and how they are read: whole or not at all, hashed, under names that
stay inside."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from safetensors import SafetensorError

from ctrak_lightning.errors import StoreError

CHECKPOINT_FOLDER = "checkpoint-[0-9]{8,19}"
_FOLDER_PATTERN = re.compile(CHECKPOINT_FOLDER)
# A pipe that nobody writes to would be waited for; Windows would change ends of lines.
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def is_there(path: Path) -> bool:
    """Whether anything has the name ``path``, be it a link that leads nowhere."""
    return os.path.lexists(path)


def is_checkpoint_folder(name: str) -> bool:
    """Whether a folder of this name is the store's own."""
    return _FOLDER_PATTERN.fullmatch(name) is not None


def open_file(path: Path, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """A descriptor of the store's file at ``path``, which is a file of its own: a store from
    somebody else may hold links to what is none of its business, and whoever asks it, or goes on
    with it, would read or change that.

    The store's folder itself may be a link; its checkpoints' folders may not.

    Raises:
        OSError: it cannot be opened, is a link, is no regular file, or its checkpoint's folder is a
            link.
    """
    refuse_linked_folder(path.parent)
    if path.is_symlink():  # in plain words; O_NOFOLLOW holds also for one that appears right now
        raise _is_link(path)
    descriptor = os.open(path, flags | _FLAGS, mode)
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def reading(path: Path) -> FileIO:
    """The store's file at ``path``, to read without a buffer; raises as :func:`open_file`."""
    return FileIO(open_file(path))


def size_of(path: Path) -> int:
    """Size in bytes of the store's file at ``path``; an OSError where there is none, or it is no
    file of its own."""
    refuse_linked_folder(path.parent)
    found = path.lstat()
    _require_regular(path, found.st_mode)
    return found.st_size


def refuse_linked_folder(folder: Path) -> None:
    """Raises an OSError if ``folder`` is the link that stands for a checkpoint's folder."""
    if is_checkpoint_folder(folder.name) and folder.is_symlink():
        raise _is_link(folder)


def _require_regular(path: Path, mode: int) -> None:
    if stat.S_ISLNK(mode):
        raise _is_link(path)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))


def _is_link(path: Path) -> OSError:
    return OSError(
        errno.ELOOP, "is a link, and nothing of a store is read or written through one", str(path)
    )


TEMPORARY_SUFFIX = ".ctrak-tmp"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What the manifest remembers of one file."""

    sha256: str
    """Hex digest of the content."""
    bytes: int
    """Size in bytes."""

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """That of the file at ``path`` as it is."""
        return cls(sha256=sha256_of(path), bytes=path.lstat().st_size)


def write_atomically(path: Path, fill: Callable[[Path], object]) -> FileRecord:
    """Let ``fill`` write a temporary file beside ``path``, then put it in place durably.

    Args:
        path: Where the file is to be; replaced if it exists.
        fill: Writes the whole content to the file that it is given, which is there and empty, and
            closes it.

    Returns:
        Digest and size of what was written.

    Raises:
        StoreError: The file cannot be written; whatever stood at ``path`` is untouched.
    """
    # A name that nobody can have put a link under, and that no other process writes to.
    temporary = path.with_name(
        f"{path.name}.{os.getpid()}-{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
    )
    try:
        os.close(open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        fill(temporary)
        record = FileRecord.of(temporary)
        _fsync(temporary)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    # h5py reports a full disk as RuntimeError when it only notices on close.
    except (OSError, RuntimeError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StoreError(
            f"{path} cannot be written ({error}). HINT: check the permissions and the free space "
            "of its folder; everything recorded earlier is intact, so run again to continue."
        ) from error
    return record


def make_folder(folder: Path) -> None:
    """Create ``folder`` and its parents durably; a no-op where it exists.

    Raises:
        StoreError: It cannot be created, a file has its name, or a link that of a checkpoint's
            folder.
    """
    try:
        refuse_linked_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        fsync_folder(folder.parent)
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be used as a folder ({error}). HINT: give a path that is a folder or "
            "does not exist yet, below a folder that this user may write to."
        ) from error


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable; only POSIX can fsync a folder, elsewhere a no-op."""
    if os.name == "posix":
        _fsync(folder)


def sha256_of(path: Path) -> str:
    """Hex digest of the content of the store's file at ``path``; an OSError where it cannot be
    read, or is a link."""
    with reading(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
