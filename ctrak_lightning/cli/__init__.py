"""``ctrak``: one module per command, which says its arguments (``parser``) and does its work (``run``)."""

import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from jsonargparse import ArgumentParser

from ctrak_lightning import __version__
from ctrak_lightning.errors import nearest, visible

_TITLE = re.compile(r'"""``ctrak (\w+)``: (.+?)\.?(""")?$')


def _found() -> Iterator[tuple[str, str]]:
    """The commands: the modules here whose first line names one, and says what it does."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        with path.open(encoding="utf-8") as file:
            title = _TITLE.match(file.readline().rstrip())
        if title:
            yield title[1], title[2]


COMMANDS = dict(_found())
OWN_PARSERS = ("fit", "demo")
"""They take their arguments as they are typed: ``fit`` is LightningCLI, ``demo`` a recipe."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``ctrak`` command. Ends with a message and exit code 1 on an expected
    error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    asked = arguments[0] if arguments else "--help"
    if asked in ("-V", "--version"):
        print(f"ctrak-lightning {__version__}")
        return
    if asked.startswith("-"):
        command_line().parse_args([asked])
        return
    if asked not in COMMANDS:
        raise SystemExit(
            f"ctrak: unknown command {visible(asked)!r}. The known ones, the nearest first: "
            f"{nearest(asked, COMMANDS)}."
        )
    # A user's classes are named by import path and live in the folder that the user stands in.
    sys.path.insert(0, str(Path.cwd()))
    try:
        command = _module(asked)
        if asked in OWN_PARSERS:
            command.run(arguments[1:])
        else:
            parser = command.parser()  # alone, so that its messages are about its own arguments
            parser.prog = f"ctrak {asked}"
            command.run(parser.parse_args(arguments[1:]))
    except (ValueError, TypeError, OSError) as error:
        if asked == "fit" and not type(error).__module__.startswith(__package__.partition(".")[0]):
            raise  # from the training code of a user, who needs to know where
        # Line by line: what other programs report (YAML, argparse) has line ends of its own.
        lines = "\n".join(map(visible, str(error).split("\n")))
        raise SystemExit(f"ctrak {asked}: {lines}") from error


def command_line(*commands: str) -> ArgumentParser:
    """The parser of ``ctrak``, with the arguments of these commands; of the others, whose modules
    need not be imported, it knows the names."""
    parser = ArgumentParser(
        prog="ctrak",
        description="Which training samples taught a diffusion model this concept?",
        version=__version__,
    )
    parsers = parser.add_subcommands(metavar="COMMAND")
    for name, summary in COMMANDS.items():
        known = name in commands and name not in OWN_PARSERS
        its = _module(name).parser() if known else ArgumentParser()
        parsers.add_subcommand(name, its, help=summary)
    return parser


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{command}")
