"""Files that are either whole or absent: write aside, fsync, rename, fsync the folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from ctrak_lightning.errors import StoreError
from ctrak_lightning.traces.files import open_file, reading, refuse_linked_folder

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


def write_atomically(path: Path, fill: Callable[[Path], None]) -> FileRecord:
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
