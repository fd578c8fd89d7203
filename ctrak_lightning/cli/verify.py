"""``ctrak verify``: is a store what was recorded?"""

from jsonargparse import ArgumentParser, Namespace

from ctrak_lightning.cli.printing import say
from ctrak_lightning.provenance.ledger import Ledger
from ctrak_lightning.provenance.signature import read_signature
from ctrak_lightning.provenance.verification import verify


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=(
            "Holds every byte of a trace store against its manifest and its ledger. Exit code 1 "
            "on problems."
        ),
    )
    parser.add_argument("store", type=str, help="the folder of the traces")
    parser.add_argument(
        "--deep", action="store_true", help="compute the kernels anew from the shards"
    )
    parser.add_argument(
        "--public-key",
        type=str,
        default=None,
        help="PEM file of the Ed25519 key that must have signed the ledger",
    )
    return parser


def run(args: Namespace) -> None:
    problems = verify(args.store, deep=args.deep, public_key=args.public_key)
    ledger = Ledger(args.store)
    if ledger.exists:
        entries = ledger.chain().entries
        if entries and "run_id" in entries[0].facts:
            say(f"run        {entries[0].facts['run_id']}")
        say(f"ledger     {len(entries)} entries, head {entries[-1].sha256 if entries else 'none'}")
        say(f"signature  {_signature_of(ledger, len(entries))}")
    else:
        say(
            "ledger     none: only the manifest vouches for the files (attach ProvenanceRecorder "
            "to keep one)"
        )
    say(*problems or ["verified: every file is what was recorded"])
    if problems:
        raise SystemExit(1)


def _signature_of(ledger: Ledger, entries: int) -> str:
    document = read_signature(ledger.root)
    if document is None:
        return (
            "none: whoever can write the folder could have written the ledger anew; keep its "
            "head elsewhere, or sign it"
        )
    if "problem" in document:
        return "damaged"
    later = entries - document["entries"]
    return (
        f"of entry {document['entries'] - 1} by {document['public_key']}, {later} entries later "
        "than it"
    )
