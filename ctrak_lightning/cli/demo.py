"""``ctrak demo``: the demonstration, of a checkout of the repository or of an installed wheel."""

import importlib
from collections.abc import Sequence

from ctrak_lightning.cli.recipe import NAME, load


def run(argv: Sequence[str]) -> None:
    load()
    importlib.import_module(f"{NAME}.emoji_artists.demo").main(argv)
