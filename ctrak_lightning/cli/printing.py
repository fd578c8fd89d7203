"""What the commands print and where they write."""

import os
from collections.abc import Mapping
from pathlib import Path

from jsonargparse import ArgumentParser

from ctrak_lightning.errors import ReportError, visible


def say(*lines: object) -> None:
    """Prints each of ``lines`` as one line; whatever in it could act on the terminal, or look like
    a line of ours, is escaped."""
    for line in lines:
        print(visible(line))


def add_force(parser: ArgumentParser) -> None:
    """The argument that :func:`check_outputs` reads."""
    parser.add_argument("--force", action="store_true", help="write over files that exist")


def check_outputs(paths: Mapping[str, str | None], *, store: str, force: bool) -> None:
    """Makes the folders of the files that a command is going to write, and refuses what could not
    or should not be written.

    What is no regular file, such as ``/dev/stdout``, is nobody's work and may be written to.

    Args:
        paths: by option; None where it was not given.
        store: the folder of the traces, whose files are a record and nobody's to add to.
        force: write over files that exist.

    Raises:
        ReportError: a path is a folder, lies in the store, stands there twice, exists, or cannot be
            written.
    """
    taken: dict[Path, str] = {}
    for option, given in paths.items():
        if given is None:
            continue
        path, told = Path(given), f"{option} {given}"
        whole = path.resolve()
        if path.is_dir():
            raise ReportError(f"{told} is a folder; expected the path of a file.")
        if whole.is_relative_to(Path(store).resolve()):
            raise ReportError(
                f"{told} lies in the folder of the traces, which holds what was recorded and "
                "nothing else. HINT: name another folder."
            )
        if whole in taken:
            raise ReportError(
                f"{told} is also what {taken[whole]} names; expected a file for each."
            )
        taken[whole] = option
        if path.is_file() and not force:
            raise ReportError(
                f"{told} exists. HINT: name another file, or --force to write over it."
            )
        _check_writable(path, told)


def _check_writable(path: Path, told: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(
            f"{told} cannot be written: its folder cannot be made ({error}). HINT: name another."
        ) from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ReportError(
            f"{told} cannot be written: this user may not write there. HINT: name another."
        )
