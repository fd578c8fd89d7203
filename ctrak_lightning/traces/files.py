"""Opens the files of a store, and nothing else that somebody has put in their place."""

from __future__ import annotations

import errno
import os
import re
import stat
from io import FileIO
from pathlib import Path

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
    if (
        path.is_symlink()
    ):  # told in these words; O_NOFOLLOW holds also for one that appears right now
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
