"""``ctrak forget``: takes samples out of a store whose owners have withdrawn their consent."""

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from ctrak_lightning.cli.printing import say
from ctrak_lightning.provenance.forgetting import finish, forget


def run(argv: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="ctrak forget",
        description="Takes samples out of a trace store, for good: rows, thumbnails, metadata, their part in the kernels. "
        "Without --sample: completes a command that was interrupted.",
    )
    parser.add_argument("store", type=str, help="the folder of the traces")
    # Not `nargs`: an id may begin with a dash, and then --sample=ID names it.
    parser.add_argument(
        "--sample", action="append", type=str, default=[], help="id of a sample; as often as needed"
    )
    args = parser.parse_args(list(argv))
    if not args.sample:
        finish(args.store)
        say("nothing is left to forget")
        return
    done = forget(args.store, args.sample)
    say(f"forgotten  {len(done.sample_ids)} samples, {done.remaining} remain")
    for tombstone in done.tombstones:
        say(f"tombstone  {tombstone}")
    if not done.tombstones:
        say("tombstone  none: the store has no ledger")
    if done.unsealed:
        say(f"removed    the unsealed checkpoints of steps {done.unsealed}")
    say(
        "note       the weights that were trained on these samples are unchanged, and so are copies of this store"
    )
