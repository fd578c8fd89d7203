"""``ctrak fit``: LightningCLI's own."""

import sys
from collections.abc import Sequence


def run(argv: Sequence[str]) -> None:
    from lightning.pytorch.cli import LightningCLI

    # LightningCLI warns of arguments that are given beside those of the command line, so they are given as these.
    before, sys.argv = sys.argv, [sys.argv[0], "fit", *argv]
    try:
        LightningCLI()
    finally:
        sys.argv = before
