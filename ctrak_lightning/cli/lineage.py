"""``ctrak lineage``: the runs that a store's run goes on from."""

from jsonargparse import ArgumentParser, Namespace

from ctrak_lightning.cli.printing import say
from ctrak_lightning.provenance.history import replay
from ctrak_lightning.provenance.parents import Link, lineage

_WEIGHTS = {
    "equal": "begins with the weights of its parent's last checkpoint (compared)",
    "different": "does NOT begin with the weights of its parent's last checkpoint (compared)",
    "not comparable": "its first weights could not be compared with its parent's",
}


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=(
            "The run of a store, its parent's, and so on. Exit code 1 where one is missing or "
            "changed."
        ),
    )
    parser.add_argument("store", type=str, help="the folder of the traces")
    return parser


def run(args: Namespace) -> None:
    links = lineage(args.store)
    for generation, link in enumerate(links):
        _print(generation, link)
    if any(link.problems for link in links):
        raise SystemExit(1)


def _print(generation: int, link: Link) -> None:
    say(f"{'run' if generation == 0 else 'parent'} {link.run_id}  {link.path}")
    if link.entries:
        history = replay(link.entries)
        begun, base = history.runs[0], history.runs[0].facts["base_model"]
        say(f"    begun {begun.time}, base model {base['name'] or 'not named'}")
        say(
            f"    {len(history.checkpoints)} checkpoints, {len(link.entries)} entries, head "
            f"{link.entries[-1].sha256}"
        )
    if link.weights is not None:
        say(f"    {_WEIGHTS[link.weights]}")
    for problem in link.problems:
        say(f"    PROBLEM: {problem}")
