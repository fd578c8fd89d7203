"""``ctrak sign``: signs a store's ledger."""

from jsonargparse import ArgumentParser, Namespace

from ctrak_lightning.cli.printing import say
from ctrak_lightning.provenance.signature import sign


def parser() -> ArgumentParser:
    parser = ArgumentParser(description="Signs the ledger of a trace store as it is now.")
    parser.add_argument("store", type=str, help="the folder of the traces")
    parser.add_argument("--key", type=str, required=True, help="PEM file of an Ed25519 private key")
    return parser


def run(args: Namespace) -> None:
    document = sign(args.store, args.key)
    say(
        f"signed {document['entries']} entries, head {document['head']}, with key "
        f"{document['public_key']}"
    )
