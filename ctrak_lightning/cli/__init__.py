"""``ctrak``: one module per command."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ctrak_lightning import __version__
from ctrak_lightning.errors import visible

USAGE = """usage: ctrak COMMAND ...

commands:
  fit        train with any LightningCLI YAML:      ctrak fit --config run.yaml --config callbacks/concept_tracer.yaml
  attribute  ask a store who taught a concept:      ctrak attribute STORE --config run.yaml --present object=owl artist=noto --absent artist=noto
                                                    ctrak attribute STORE --config run.yaml --prompt "Pikachu by Picasso" --concept Pikachu --concept Picasso
  report     the same as a page to read and show:   ctrak report STORE --config run.yaml --present object=owl artist=noto --out report.html
  selfcheck  are traces right on your own model?    ctrak selfcheck --config run.yaml --config callbacks/concept_tracer.yaml
  info       what a store holds:                    ctrak info STORE [--verify]
  verify     is a store what was recorded?          ctrak verify STORE [--deep] [--public-key public.pem]
  sign       sign a store's ledger:                 ctrak sign STORE --key key.pem
  forget     take samples out, consent withdrawn:   ctrak forget STORE --where owner=anna [--dry-run]
  lineage    the runs that a run goes on from:      ctrak lineage STORE
  export     a store's record for others:           ctrak export STORE --format prov|croissant|model-card [--out FILE]
  demo       fine-tune, trace, generate, attribute: ctrak demo

`ctrak COMMAND --help`, or `ctrak help COMMAND`, lists a command's options; `ctrak --version` names the library's."""

# Each is `run(argv)` of a module of this package, imported when it is asked for.
COMMANDS = (
    "fit",
    "attribute",
    "report",
    "selfcheck",
    "info",
    "verify",
    "sign",
    "forget",
    "lineage",
    "export",
    "demo",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``ctrak`` command. Ends with a message and exit code 1 on an expected
    error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [arguments[1], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return
    if arguments[0] in ("-V", "--version"):
        print(f"ctrak-lightning {__version__}")
        return
    if arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise SystemExit(
            f"ctrak: unknown command {visible(arguments[0])!r}.{meant} Known: "
            f"{', '.join(COMMANDS)}."
        )
    # A recipe's classes are named by import path and live in the folder that the user stands in.
    sys.path.insert(0, str(Path.cwd()))
    command = importlib.import_module(f"ctrak_lightning.cli.{arguments[0]}")
    try:
        command.run(arguments[1:])
    except (ValueError, TypeError, OSError) as error:
        # Line by line: what other programs report (YAML, argparse) has line ends of its own.
        told = "\n".join(map(visible, str(error).split("\n")))
        raise SystemExit(f"ctrak {arguments[0]}: {told}") from error
