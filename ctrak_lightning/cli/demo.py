"""``ctrak demo``: the demonstration, in a checkout of the repository."""

import importlib
from collections.abc import Sequence


def run(argv: Sequence[str]) -> None:
    try:
        demo = importlib.import_module("recipes.emoji_artists.demo")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("recipes"):
            raise ValueError(
                "the demo's recipe is not here. HINT: run `make demo`, or `ctrak demo`, in a checkout of the repository."
            ) from error
        raise
    demo.main(argv)
