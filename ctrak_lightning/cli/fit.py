"""``ctrak fit``: LightningCLI's own."""

from collections.abc import Sequence


def run(argv: Sequence[str]) -> None:
    from lightning.pytorch.cli import LightningCLI

    LightningCLI(args=["fit", *argv])
