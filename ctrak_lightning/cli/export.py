"""``ctrak export``: a store's record as PROV or Croissant, or for a model card."""

import json
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ctrak_lightning.cli.printing import add_force, check_outputs
from ctrak_lightning.provenance.exports import croissant, prov_json
from ctrak_lightning.provenance.summary import model_card


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=(
            "W3C PROV-JSON of the runs, Croissant of the samples, or a Markdown section for a "
            "model card."
        ),
    )
    parser.add_argument("store", type=str, help="the folder of the traces")
    parser.add_argument("--format", choices=("prov", "croissant", "model-card"), required=True)
    parser.add_argument(
        "--out", type=str, default=None, help="the file to write; by default it is printed"
    )
    add_force(parser)
    return parser


def run(args: Namespace) -> None:
    check_outputs({"--out": args.out}, store=args.store, force=args.force)
    if args.format == "model-card":
        text = model_card(args.store)
    else:
        document = prov_json(args.store) if args.format == "prov" else croissant(args.store)
        # JSON escapes no more than the first 32 control characters by itself; a terminal obeys
        # others too.
        text = json.dumps(document, indent=1, ensure_ascii=args.out is None, allow_nan=False) + "\n"
    if args.out is None:
        print(text, end="")
    else:
        Path(args.out).write_text(text, encoding="utf-8")
