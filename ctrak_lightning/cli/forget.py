"""``ctrak forget``: takes samples out whose owners have withdrawn their consent."""

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ctrak_lightning.cli.printing import say
from ctrak_lightning.errors import StoreError
from ctrak_lightning.provenance.forgetting import (
    Forgotten,
    finish,
    forget,
    ids_where,
    positions_of,
    read_ids,
)
from ctrak_lightning.provenance.run_facts import stored_table
from ctrak_lightning.store import SampleTable
from ctrak_lightning.store.manifest import read_manifest

_SHOWN = 20


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=(
            "Takes samples out of a trace store, for good: rows, thumbnails, metadata, their "
            "part in the kernels. Without any samples named: completes a command that was "
            "interrupted."
        ),
    )
    parser.add_argument("store", type=str, help="the folder of the traces")
    # Not `nargs`: an id may begin with a dash, and then --sample=ID names it.
    parser.add_argument(
        "--sample", action="append", type=str, default=[], help="id of a sample; as often as needed"
    )
    parser.add_argument(
        "--ids-from", type=str, default=None, help="a file of UTF-8 text with an id a line"
    )
    parser.add_argument(
        "--where",
        action="append",
        type=str,
        default=[],
        help=(
            "column=value, such as owner=anna: the samples with that metadata; of several all "
            "must hold"
        ),
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say who would go, and change nothing"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    return parser


def run(args: Namespace) -> None:
    if not (args.sample or args.where or args.ids_from is not None):
        _complete(args)
        return
    manifest = read_manifest(Path(args.store))
    table = stored_table(Path(args.store), manifest)
    chosen = _chosen(args, table)
    if args.dry_run:
        say(*(f"sample     {sample_id}" for sample_id in chosen))
        say(f"would go   {len(chosen)} of {len(table)} samples; nothing was changed")
        return
    if not args.yes:
        _confirm(chosen, len(table))
    _tell(forget(args.store, chosen))


def _complete(args: Namespace) -> None:
    if args.dry_run:
        raise StoreError(
            "--dry-run: of no samples. HINT: name them with --sample, --ids-from or --where."
        )
    finish(args.store)
    say("nothing is left to forget")


def _chosen(args: Namespace, table: SampleTable) -> list[str]:
    if args.where and (args.sample or args.ids_from is not None):
        raise StoreError(
            "--where and --sample or --ids-from: expected one or the other; nothing was "
            "forgotten. HINT: one command for each."
        )
    if args.where:
        wanted = ids_where(table, args.where)
    else:
        wanted = [*args.sample, *([] if args.ids_from is None else read_ids(args.ids_from))]
    return [table.sample_ids[i] for i in positions_of(table, wanted, Path(args.store))]


def _confirm(chosen: Sequence[str], total: int) -> None:
    if sys.stdin is None or not sys.stdin.isatty():
        raise StoreError(
            f"{len(chosen)} of {total} samples would be forgotten for good, and there is no "
            "terminal to ask at; nothing was forgotten. HINT: --dry-run names them, --yes goes "
            "ahead."
        )
    say(*(f"sample     {sample_id}" for sample_id in chosen[:_SHOWN]))
    if len(chosen) > _SHOWN:
        say(f"           and {len(chosen) - _SHOWN} more (--dry-run names all)")
    say(f"These {len(chosen)} of {total} samples go for good. Type their number to go on:")
    try:
        answer = input()
    except EOFError:
        answer = ""
    if answer.strip() != str(len(chosen)):
        raise StoreError(f"answered {answer!r}, expected '{len(chosen)}'; nothing was forgotten.")


def _tell(done: Forgotten) -> None:
    say(f"forgotten  {len(done.sample_ids)} samples, {done.remaining} remain")
    for tombstone in done.tombstones:
        say(f"tombstone  {tombstone}")
    if not done.tombstones:
        say("tombstone  none: the store has no ledger")
    if done.unsealed:
        say(f"removed    the unsealed checkpoints of steps {done.unsealed}")
    say(
        "note       the weights that were trained on these samples are unchanged, and so are "
        "copies of this store"
    )
