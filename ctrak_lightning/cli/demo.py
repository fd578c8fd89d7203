"""``ctrak demo``: the demonstration, of a checkout of the repository or of the installed wheel."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

# The wheel carries the recipe here; the name `recipes` is too common to be taken in everybody's
# environment.
_IN_THE_WHEEL = Path(__file__).parents[1] / "demo_files"


def run(argv: Sequence[str]) -> None:
    if importlib.util.find_spec("recipes") is None:
        sys.path.append(str(_IN_THE_WHEEL))
    try:
        demo = importlib.import_module("recipes.emoji_artists.demo")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("recipes"):
            raise ValueError(
                "the demo's recipe is not here, or another package has the name `recipes`. HINT: "
                "run `make demo`, or `ctrak demo`, in a checkout of the repository, or `ctrak "
                "demo` in an environment with nothing but the wheel."
            ) from error
        raise
    demo.main(argv)
