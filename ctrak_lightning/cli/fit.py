"""``ctrak fit``: LightningCLI's own."""

import sys
from collections.abc import Sequence
from typing import Any


def run(argv: Sequence[str]) -> None:
    lightning_cli(["fit", *argv])


def lightning_cli(argv: Sequence[str], **options: Any) -> Any:
    """A LightningCLI over these arguments, as if they had been typed.

    Args:
        argv: without the program's name.
        options: of ``LightningCLI``, such as ``run=False``.
    """
    from lightning.pytorch.cli import LightningCLI

    # LightningCLI warns of arguments that are given beside those of the command line, so they are
    # given as these.
    before, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        return LightningCLI(**options)
    finally:
        sys.argv = before
