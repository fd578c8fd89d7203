"""``ctrak report``: the answer as a page to read and show."""

import shlex
from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

from ctrak_lightning.attribution import Concept
from ctrak_lightning.attribution.report import check_path, write_report
from ctrak_lightning.attribution.report.columns import Columns
from ctrak_lightning.cli.question import add_question, attributor_of, concept_of, difference, parse_spec
from ctrak_lightning.errors import ConceptError


def run(argv: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="ctrak report",
        description="Which training samples taught the model a concept? As one self-contained HTML page. Without --absent and "
        "--concept, each attribute of --present is asked as a concept of its own.",
    )
    add_question(parser)
    parser.add_argument(
        "--concept",
        action="append",
        default=None,
        help='"NAME: what is left without the concept", such as "owl: artist=noto"; repeat it for several on one page',
    )
    parser.add_argument("--out", type=str, default="report.html", help="the page")
    parser.add_argument(
        "--group", type=str, default=None, help="the metadata column to give shares for; by default the owner"
    )
    args = parser.parse_args(list(argv))
    concepts = concepts_of(args)
    check_path(args.out)
    attributor = attributor_of(args)
    Columns.of(
        list(attributor.store.samples.metadata), args.group
    )  # refuses an unknown one before minutes of work
    results = attributor.attribute_many(concepts, args.seed, parts=True)
    write_report(args.out, results, group=args.group)
    print(f"{args.out}: {', '.join(concept.name for concept in concepts)}")


def concepts_of(args: Namespace) -> list[Concept]:
    """The concepts that the arguments name, all of one image.

    Raises:
        ConceptError: arguments that exclude each other, or a ``--concept`` without a name.
    """
    if args.concept is not None:
        if args.absent is not None or args.name is not None:
            raise ConceptError(
                "--concept and --absent or --name: expected one or the other. HINT: --concept 'NAME: attribute=value' says both "
                "the name and what is left without the concept."
            )
        return [_concept(args, text) for text in args.concept]
    present = parse_spec(args.present)
    if args.absent is not None or args.name is not None or isinstance(present, str):
        return [concept_of(args)]
    rests = [{key: value for key, value in present.items() if key != left_out} for left_out in present]
    return [Concept(difference(present, rest), present, rest) for rest in rests]


def _concept(args: Namespace, text: str) -> Concept:
    name, separator, rest = text.partition(":")
    if not separator or not name.strip():
        raise ConceptError(
            f"--concept {text!r}: expected 'NAME: what is left without the concept'. HINT: --concept 'owl: artist=noto'."
        )
    prompt = rest.strip()
    absent = parse_spec(shlex.split(prompt)) if not prompt or "=" in prompt else prompt
    return Concept(name.strip(), parse_spec(args.present), absent)
