"""``ctrak demo``: fine-tunes, traces, generates and attributes, on emoji."""

import importlib
from collections.abc import Sequence

from ctrak_lightning.cli.recipe import NAME, load


def run(argv: Sequence[str]) -> None:
    load()
    importlib.import_module(f"{NAME}.emoji_artists.demo").main(argv)
