"""``ctrak``: fit, attribute, info and demo from the command line."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from ctrak_lightning.attribution import Attribution, Attributor, Concept
from ctrak_lightning.errors import ConceptError
from ctrak_lightning.task import Spec
from ctrak_lightning.traces import TraceStore
from ctrak_lightning.trajectory import Sampler

USAGE = """usage: ctrak COMMAND ...

commands:
  fit        train with any LightningCLI YAML:      ctrak fit --config run.yaml --config callbacks/concept_tracer.yaml
  attribute  ask a store who taught a concept:      ctrak attribute STORE --config run.yaml --present object=owl artist=noto --absent artist=noto
  info       what a store holds:                    ctrak info STORE [--verify]
  demo       fine-tune, trace, generate, attribute: ctrak demo

`ctrak COMMAND --help` lists a command's options."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``ctrak`` command. Ends with a message and exit code 1 on an expected error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"fit": _fit, "attribute": _attribute, "info": _info, "demo": _demo}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if arguments[0] not in commands:
        raise SystemExit(f"ctrak: unknown command {arguments[0]!r}; known: {', '.join(commands)}.")
    # A recipe's classes are named by import path and live in the folder that the user stands in.
    sys.path.insert(0, str(Path.cwd()))
    try:
        commands[arguments[0]](arguments[1:])
    except (ValueError, TypeError, OSError) as error:
        raise SystemExit(f"ctrak {arguments[0]}: {error}") from error


def parse_spec(words: Sequence[str] | None) -> Spec:
    """``["object=owl", "artist=noto"]`` as attributes, one word or phrase without ``=`` as a prompt, nothing as ``{}``.

    Raises:
        ConceptError: both kinds are mixed, or an attribute is given twice.

    Example:
        >>> parse_spec(["object=owl", "artist=noto"])
        {'object': 'owl', 'artist': 'noto'}
    """
    words = list(words or [])
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    spec: dict[str, str] = {}
    for word in words:
        attribute, separator, value = word.partition("=")
        if not separator or not attribute or attribute in spec:
            raise ConceptError(
                f"{words}: expected attribute=value words, each attribute once (object=owl artist=noto), or one quoted prompt."
            )
        spec[attribute] = value
    return spec


def load_module(config: str | Path) -> Any:
    """The LightningModule that a LightningCLI YAML describes under ``model``.

    Raises:
        ValueError: the file has no ``model`` section with a ``class_path``.
    """
    import lightning as L

    facts = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    if not isinstance(facts, dict) or "class_path" not in (facts.get("model") or {}):
        raise ValueError(f"{config}: expected a LightningCLI YAML with `model: {{class_path: ...}}`.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningModule, "model")
    return parser.instantiate(parser.parse_object({"model": facts["model"]})).model


def _fit(argv: Sequence[str]) -> None:
    from lightning.pytorch.cli import LightningCLI

    LightningCLI(args=["fit", *argv])


def _attribute(argv: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="ctrak attribute", description="Which training samples taught the model a concept?"
    )
    parser.add_argument("store", type=str, help="the folder of the traces")
    parser.add_argument(
        "--config", type=str, required=True, help="the YAML of the run (its `model` section is used)"
    )
    parser.add_argument(
        "--present", nargs="+", required=True, help="attribute=value words, or one quoted prompt"
    )
    parser.add_argument(
        "--absent", nargs="*", default=[], help="the same without the concept; nothing: the null condition"
    )
    parser.add_argument(
        "--name", type=str, default=None, help="the concept's name; by default what `absent` lacks"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the generated image")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps")
    parser.add_argument("--guidance", type=float, default=2.0, help="classifier-free guidance scale")
    parser.add_argument("--top", type=int, default=10, help="rows to print")
    parser.add_argument("--group", type=str, default=None, help="a metadata column to print shares for")
    parser.add_argument("--csv", type=str, default=None, help="write the whole ranking")
    parser.add_argument("--json", type=str, default=None, help="write the whole result")
    args = parser.parse_args(list(argv))
    present, absent = parse_spec(args.present), parse_spec(args.absent)
    concept = Concept(args.name or _difference(present, absent), present, absent)
    sampler = Sampler(steps=args.steps, guidance=args.guidance)
    attributor = Attributor(args.store, load_module(args.config), sampler=sampler, progress=True)
    result = attributor.attribute(concept, seed=args.seed)
    _print_result(result, args)
    if args.csv:
        result.to_csv(args.csv)
    if args.json:
        result.to_json(args.json)


def _print_result(result: Attribution, args: Namespace) -> None:
    print(
        f"{result.concept.name}: {len(result.samples.sample_ids)} samples, checkpoints at steps {result.steps}"
    )
    for record in result.top(args.top):
        print(f"{record.rank:4d}  {record.score:8.3f}  {record.sample_id}")
    if args.group:
        print(f"share by {args.group} (95 % bootstrap interval):")
        for share in result.by_group(args.group):
            print(
                f"  {share.share:6.1%}  [{share.low:.1%}, {share.high:.1%}]  {share.group} ({share.samples} samples)"
            )


def _difference(present: Spec, absent: Spec) -> str:
    if isinstance(present, str) or isinstance(absent, str):
        return str(present)
    return " ".join(value for key, value in present.items() if absent.get(key) != value) or "concept"


def _info(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="ctrak info", description="What a trace store holds.")
    parser.add_argument("store", type=str, help="the folder of the traces")
    parser.add_argument("--verify", action="store_true", help="recompute the hash of every file")
    args = parser.parse_args(list(argv))
    store = TraceStore(args.store)
    header = store.header
    print(f"run        {store.run_id}")
    print(f"method     {header.method['name']}")
    print(f"samples    {len(store)}, metadata: {', '.join(sorted(store.samples.metadata)) or 'none'}")
    print(f"traces     {header.dim} x {header.dtype}, projection {header.projection}")
    for checkpoint in store.checkpoints:
        print(
            f"checkpoint step {checkpoint.step}, epoch {checkpoint.epoch}, mean loss {checkpoint.losses().mean():.4f}"
        )
    for name, value in header.model.items():
        print(f"model      {name} {value[:16]}")
    if args.verify:
        problems = store.verify()
        print("\n".join(problems) if problems else "verified: every file is as it was sealed")
        if problems:
            raise SystemExit(1)


def _demo(argv: Sequence[str]) -> None:
    try:
        demo = importlib.import_module("recipes.emoji_artists.demo")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("recipes"):
            raise ValueError(
                "the demo's recipe is not here. HINT: run `make demo`, or `ctrak demo`, in a checkout of the repository."
            ) from error
        raise
    demo.main(argv)


if __name__ == "__main__":
    main()
