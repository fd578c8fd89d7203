"""What the commands that ask a store have in common: the model and the concept, from the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from ctrak_lightning.attribution import Attributor, Concept
from ctrak_lightning.errors import ConceptError
from ctrak_lightning.task import Spec
from ctrak_lightning.trajectory import Sampler


def add_question(parser: ArgumentParser) -> None:
    """The arguments that :func:`concept_of` and :func:`attributor_of` read."""
    parser.add_argument("store", type=str, help="the folder of the traces")
    parser.add_argument(
        "--config", type=str, required=True, help="the YAML of the run (its `model` section is used)"
    )
    parser.add_argument(
        "--present", nargs="+", required=True, help="attribute=value words, or one quoted prompt"
    )
    parser.add_argument(
        "--absent", nargs="*", default=None, help="the same without the concept; nothing: the null condition"
    )
    parser.add_argument(
        "--name", type=str, default=None, help="the concept's name; by default what `absent` lacks"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the generated image")
    parser.add_argument("--asker", type=str, default=None, help="who asks, for the store's ledger")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps")
    parser.add_argument("--guidance", type=float, default=2.0, help="classifier-free guidance scale")


def concept_of(args: Namespace) -> Concept:
    """The concept that the arguments name."""
    present, absent = parse_spec(args.present), parse_spec(args.absent)
    return Concept(args.name or difference(present, absent), present, absent)


def attributor_of(args: Namespace) -> Attributor:
    """The store and the model that the arguments name."""
    sampler = Sampler(steps=args.steps, guidance=args.guidance)
    return Attributor(args.store, load_module(args.config), sampler=sampler, progress=True, asker=args.asker)


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

    try:
        facts = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{config}: no YAML: {error}") from error
    if not isinstance(facts, dict) or "class_path" not in (facts.get("model") or {}):
        raise ValueError(f"{config}: expected a LightningCLI YAML with `model: {{class_path: ...}}`.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningModule, "model")
    try:
        return parser.instantiate(parser.parse_object({"model": facts["model"]})).model
    except ArgumentError as error:
        raise ValueError(f"{config}: {error}") from error


def difference(present: Spec, absent: Spec) -> str:
    """A name for what ``absent`` lacks."""
    if isinstance(present, str) or isinstance(absent, str):
        return str(present)
    return " ".join(value for key, value in present.items() if absent.get(key) != value) or "concept"
