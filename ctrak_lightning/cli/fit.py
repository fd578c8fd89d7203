"""``ctrak fit``: trains with any LightningCLI YAML."""

import re
import sys
from collections.abc import Sequence
from typing import Any

# Of a value that may be of several types jsonargparse lists why it is none of them, and what it is.
_OF_EVERY_TYPE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: |Errors:$|Given value|"
    r"- Expected a <class|- Not a valid subclass of|Subclass types expect one of:|- a (class|dict) "
)


def run(argv: Sequence[str]) -> None:
    lightning_cli(["fit", *argv])


def lightning_cli(argv: Sequence[str], **options: Any) -> Any:
    """A LightningCLI over these arguments, as if they had been typed.

    Args:
        argv: without the program's name.
        options: of ``LightningCLI``, such as ``run=False``.
    """
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    class Parser(LightningArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            return super().error(readable(message), ex)

    class CLI(LightningCLI):
        def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
            parser = super().init_parser(**kwargs)
            parser.__class__ = Parser
            return parser

        def instantiate_classes(self) -> None:
            try:
                super().instantiate_classes()
            except ValueError as error:
                if not _OF_EVERY_TYPE.match(str(error)):
                    raise
                self.parser.error(str(error), error)

    # LightningCLI warns of arguments that are given beside those of the command line, so they are
    # given as these.
    before, sys.argv = sys.argv, ["ctrak", *argv]
    try:
        return CLI(**options)
    finally:
        sys.argv = before


def readable(message: str) -> str:
    """A parser's message with the reason that counts alone: the type that was meant, of all those
    that a value may have.

    Example:
        >>> print(readable('''Parser key "method":
        ...   Does not validate against any of the Union subtypes
        ...   Subtypes: [<class 'Method'>, <class 'str'>]
        ...   Errors:
        ...     - Problem with given class_path 'Method':
        ...         damping=-3: expected a number > 0.
        ...     - Expected a <class 'str'>
        ...   Given value: dict(class_path=...)'''))
        Parser key "method":
            - Problem with given class_path 'Method':
                damping=-3: expected a number > 0.
    """
    lines = message.split("\n")
    kept = [line for line in lines if not _OF_EVERY_TYPE.match(line.strip())]
    # Where no type was meant more than another, all reasons count.
    return message if kept[-1:] and kept[-1].rstrip().endswith(":") else "\n".join(kept)
