"""``ctrak sign``: puts an Ed25519 signature beside a ledger."""

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from ctrak_lightning.cli.printing import say
from ctrak_lightning.provenance.signature import sign


def run(argv: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="ctrak sign", description="Signs the ledger of a trace store as it is now."
    )
    parser.add_argument("store", type=str, help="the folder of the traces")
    parser.add_argument("--key", type=str, required=True, help="PEM file of an Ed25519 private key")
    args = parser.parse_args(list(argv))
    document = sign(args.store, args.key)
    say(
        f"signed {document['entries']} entries, head {document['head']}, with key "
        f"{document['public_key']}"
    )
