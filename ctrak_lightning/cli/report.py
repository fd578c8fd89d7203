"""``ctrak report``: the answer as a page to read and show."""

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from ctrak_lightning.attribution.report import check_path, write_report
from ctrak_lightning.attribution.report.columns import Columns
from ctrak_lightning.cli.printing import say
from ctrak_lightning.cli.question import add_question, attributor_of, concepts_of
from ctrak_lightning.errors import ConceptError


def run(argv: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="ctrak report",
        description="Which training samples taught the model a concept? As one self-contained HTML page. Without --absent and "
        "--concept, each attribute of --present is asked as a concept of its own.",
    )
    add_question(parser)
    parser.add_argument("--out", type=str, default="report.html", help="the page")
    parser.add_argument(
        "--group", type=str, default=None, help="the metadata column to give shares for; by default the owner"
    )
    args = parser.parse_args(list(argv))
    concepts = concepts_of(args, each_attribute=True)
    if getattr(args, "global") and len(concepts) > 1:
        raise ConceptError(
            f"--global with {len(concepts)} concepts: each has images of its own; expected one. HINT: a page for each, or "
            "`ctrak attribute`."
        )
    check_path(args.out)
    attributor = attributor_of(args)
    Columns.of(
        list(attributor.store.samples.metadata), args.group
    )  # refuses an unknown one before minutes of work
    for concept in concepts:
        say(concept)
    results = attributor.attribute_many(concepts, args.seed, parts=True)
    write_report(args.out, results, group=args.group)
    say(f"{args.out}: {', '.join(concept.name for concept in concepts)}")
