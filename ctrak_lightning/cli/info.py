"""``ctrak info``: what a store holds."""

from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from ctrak_lightning.cli.printing import say
from ctrak_lightning.errors import listed
from ctrak_lightning.store import Checkpoint, TraceStore


def parser() -> ArgumentParser:
    parser = ArgumentParser(description="What a trace store holds.")
    parser.add_argument("store", type=str, help="the folder of the traces")
    parser.add_argument("--verify", action="store_true", help="recompute the hash of every file")
    return parser


def run(args: Namespace) -> None:
    store = TraceStore(args.store)
    header = store.header
    say(f"run        {store.run_id}")
    say(f"method     {header.method['name']}")
    say(f"samples    {len(store)}, metadata: {', '.join(sorted(store.samples.metadata)) or 'none'}")
    say(f"traces     {header.dim} x {header.dtype}")
    say(*(f"projection {fact}" for fact in _facts(header.projection)))
    for checkpoint in store.checkpoints:
        exposed = checkpoint.exposed()
        losses = checkpoint.losses() if exposed is None else checkpoint.losses()[exposed]
        say(
            f"checkpoint step {checkpoint.step}, epoch {checkpoint.epoch}, mean loss "
            f"{losses.mean():.4f}, {_exposures(checkpoint)}"
        )
    say(*(f"model      {fact}" for fact in _facts(header.model)))
    if args.verify:
        problems = store.verify()
        say(*problems or ["verified: every file is as it was sealed"])
        if problems:
            raise SystemExit(1)


def _facts(facts: Mapping[str, Any]) -> Iterator[str]:
    """Nested facts, a value a line; of long ones the beginning."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _facts(value)
        elif value is not None:
            shown = listed(value, 3, str) if isinstance(value, list) else str(value)[:16]
            yield f"{key} {shown}"


def _exposures(checkpoint: Checkpoint) -> str:
    counts = checkpoint.exposures()
    if counts is None:
        return "exposures not known"
    never = int((counts == 0).sum())
    told = f", {never} samples never trained on" if never else ""
    return f"exposures {int(counts.min())} to {int(counts.max())}{told}"
