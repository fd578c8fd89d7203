"""``ctrak selfcheck``: are traces right on your own model?"""

from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch.utils.data import DataLoader

from ctrak_lightning.capture.reference_check import Check, selfcheck
from ctrak_lightning.cli.fit import lightning_cli
from ctrak_lightning.cli.printing import say
from ctrak_lightning.errors import BatchError


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=(
            "Tries the numeric promises of traces on your own model and data. Exit code 1: "
            "something failed."
        ),
    )
    parser.add_argument(
        "--config",
        type=str,
        action="append",
        required=True,
        help=(
            "the YAML of the run, and that of the tracer if it is another file; as for `ctrak fit`"
        ),
    )
    parser.add_argument("--samples", type=int, default=4, help="how many images")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    return parser


def run(args: Namespace) -> None:
    configs = [word for path in args.config for word in ("--config", path)]
    cli = lightning_cli(configs, run=False, save_config_callback=None)
    batch = first_batch(cli.datamodule, cli.model, args.samples)
    checks = selfcheck(
        cli.model, batch, samples=args.samples, seed=args.seed, **traced_by(cli.trainer.callbacks)
    )
    say(*(line for check in checks for line in told(check).split("\n")))
    failed = sum(check.outcome == "fail" for check in checks)
    say(f"{len(checks)} checks, {failed or 'none'} failed")
    if failed:
        raise SystemExit(1)


def traced_by(callbacks: Sequence[Any]) -> dict[str, Any]:
    """How the first tracer among the callbacks traces, as arguments of :func:`selfcheck`; none: the
    defaults."""
    from ctrak_lightning.callbacks import ConceptTracer

    for callback in callbacks:
        if isinstance(callback, ConceptTracer):
            engine = "hooks" if callback.mode == "inline" else "auto"
            facts = {
                "method": callback.method,
                "projection": callback.projection,
                "layers": callback.layers,
            }
            return facts | {"engine": engine}
    return {}


def first_batch(data: Any, module: Any, samples: int) -> Any:
    """The first samples of the loader that a tracer would trace.

    Raises:
        BatchError: there is none.
    """
    if data is not None:
        data.prepare_data()
        data.setup("fit")
    for name in ("trace_dataloader", "train_dataloader"):
        for owner in (data, module):
            loader = getattr(owner, name, None)
            if loader is None:
                continue
            found = loader()
            if isinstance(found, DataLoader):
                plain = DataLoader(found.dataset, batch_size=samples, collate_fn=found.collate_fn)
                return next(iter(plain))
            if found is not None:
                return next(iter(found))
    raise BatchError(
        "ctrak selfcheck: the configuration has no training data. HINT: name the DataModule under "
        "`data`, as for `ctrak fit`."
    )


def told(check: Check) -> str:
    """A check as a line or two."""
    lines = f"{check.outcome:4s}  {check.name}: {check.found}"
    return f"{lines}\n      HINT: {check.hint}" if check.hint else lines
