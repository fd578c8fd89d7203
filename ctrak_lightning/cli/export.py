"""``ctrak export``: a store's record in the forms that others read."""

import json
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from ctrak_lightning.cli.printing import add_force, check_outputs
from ctrak_lightning.provenance.exports import croissant, model_card, prov_json


def run(argv: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="ctrak export",
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
    args = parser.parse_args(list(argv))
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
