"""``ctrak report``: the answer as a page to read and show."""

from jsonargparse import ArgumentParser, Namespace

from ctrak_lightning.cli.printing import add_force, check_outputs, say
from ctrak_lightning.cli.question import add_question, attributor_of, concepts_of, opened_store
from ctrak_lightning.errors import ConceptError
from ctrak_lightning.report import write_report


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=(
            "Which training samples taught the model a concept? As one self-contained HTML "
            "page. Without --absent and --concept, each attribute of --present is asked as a "
            "concept of its own."
        ),
    )
    add_question(parser)
    parser.add_argument("--out", type=str, default="report.html", help="the page")
    parser.add_argument(
        "--group",
        type=str,
        default=None,
        help="the metadata column to give shares for; by default the owner",
    )
    add_force(parser)
    return parser


def run(args: Namespace) -> None:
    concepts = concepts_of(args, each_attribute=True)
    if getattr(args, "global") and len(concepts) > 1:
        raise ConceptError(
            f"--global with {len(concepts)} concepts: each has images of its own; expected one. "
            "HINT: a page for each, or `ctrak attribute`."
        )
    store = opened_store(args)
    check_outputs({"--out": args.out}, store=args.store, force=args.force)
    for concept in concepts:
        say(concept)
    results = attributor_of(args, store).attribute_many(concepts, args.seed, parts=True)
    write_report(args.out, results, group=args.group)
    say(f"{args.out}: {', '.join(concept.name for concept in concepts)}")
