"""``ctrak attribute``: which training samples taught the model a concept?"""

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from ctrak_lightning.attribution import Attribution
from ctrak_lightning.cli.printing import add_force, check_outputs, say
from ctrak_lightning.cli.question import add_question, attributor_of, concepts_of, opened_store


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=(
            "Which training samples taught the model a concept? Of several concepts of one "
            "image also what they share."
        ),
    )
    add_question(parser)
    parser.add_argument("--top", type=PositiveInt, default=10, help="rows to print")
    parser.add_argument(
        "--group", type=str, default=None, help="a metadata column to print shares for"
    )
    parser.add_argument(
        "--csv",
        type=str,
        default=None,
        help="write the whole ranking; of several concepts, side by side",
    )
    parser.add_argument(
        "--json",
        type=str,
        default=None,
        help="write the whole result; of several concepts, what they share",
    )
    add_force(parser)
    return parser


def run(args: Namespace) -> None:
    concepts = concepts_of(args)
    store = opened_store(args)
    check_outputs({"--csv": args.csv, "--json": args.json}, store=args.store, force=args.force)
    results = attributor_of(args, store).attribute_many(concepts, args.seed)
    for result in results:
        _print_result(result, args)
    if len(results) > 1:
        say(*results.table(args.top).splitlines())
    written = results[0] if len(results) == 1 else results
    if args.csv:
        written.to_csv(args.csv)
    if args.json:
        written.to_json(args.json)


def _print_result(result: Attribution, args: Namespace) -> None:
    found = result.confidence
    if found.says_nothing:
        say(f"{result.concept.name}: {found.verdict}", *(f"  {reason}" for reason in found.reasons))
    else:
        say(
            "Look at the generated image first: if it does not show the concept, the ranking says "
            "nothing."
        )
    say(result.concept)
    say(
        f"{result.concept.name}: {len(result.samples.sample_ids)} samples, checkpoints at steps "
        f"{result.steps}"
    )
    for record in result.top(args.top):
        say(f"{record.rank:4d}  {record.score:8.3f}  {record.sample_id}")
    if args.group:
        _print_shares(result, args.group)


def _print_shares(result: Attribution, group: str) -> None:
    if result.confidence.says_nothing:
        say(f"no shares by {group}: nobody should be paid by a ranking that says nothing")
        return
    if not bool((result.scores > 0).any()):
        say(f"no shares by {group}: no sample has a positive score")
        return
    say(f"share by {group} (95 % bootstrap interval):")
    for share in result.by_group(group):
        say(
            f"  {share.share:6.1%}  [{share.low:.1%}, {share.high:.1%}]  {share.group} "
            f"({share.samples} samples)"
        )
