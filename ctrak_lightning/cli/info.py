"""``ctrak info``: what a store holds."""

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from ctrak_lightning.cli.printing import say
from ctrak_lightning.store import Checkpoint, TraceStore


def run(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="ctrak info", description="What a trace store holds.")
    parser.add_argument("store", type=str, help="the folder of the traces")
    parser.add_argument("--verify", action="store_true", help="recompute the hash of every file")
    args = parser.parse_args(list(argv))
    store = TraceStore(args.store)
    header = store.header
    say(f"run        {store.run_id}")
    say(f"method     {header.method['name']}")
    say(f"samples    {len(store)}, metadata: {', '.join(sorted(store.samples.metadata)) or 'none'}")
    say(f"traces     {header.dim} x {header.dtype}, projection {header.projection}")
    for checkpoint in store.checkpoints:
        exposed = checkpoint.exposed()
        losses = checkpoint.losses() if exposed is None else checkpoint.losses()[exposed]
        say(
            f"checkpoint step {checkpoint.step}, epoch {checkpoint.epoch}, mean loss "
            f"{losses.mean():.4f}, {_exposures(checkpoint)}"
        )
    for name, value in header.model.items():
        say(f"model      {name} {value[:16]}")
    if args.verify:
        problems = store.verify()
        say(*problems or ["verified: every file is as it was sealed"])
        if problems:
            raise SystemExit(1)


def _exposures(checkpoint: Checkpoint) -> str:
    counts = checkpoint.exposures()
    if counts is None:
        return "exposures not known"
    never = int((counts == 0).sum())
    told = f", {never} samples never trained on" if never else ""
    return f"exposures {int(counts.min())} to {int(counts.max())}{told}"
