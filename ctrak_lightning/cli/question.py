"""What the commands that ask a store have in common: the model and the concept, from the command
line."""

import shlex
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from PIL import Image
from torch import Tensor

from ctrak_lightning import methods
from ctrak_lightning.attribution import Attributor, Concept
from ctrak_lightning.errors import ConceptError, ReportError
from ctrak_lightning.methods.method import Method
from ctrak_lightning.methods.trajectories import Sampler
from ctrak_lightning.store import TraceStore
from ctrak_lightning.tasks import DiffusersTask, Precision, Spec


def tracer_task(config: str | Path) -> Any:
    """The ``task`` of the ConceptTracer among a LightningCLI YAML's callbacks; None where there is
    none.

    Raises:
        ValueError: several tracers of the file have different tasks.
    """
    facts = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    trainer = facts.get("trainer") if isinstance(facts, Mapping) else None
    found: list[Any] = []
    for key in ("callbacks", "callbacks+"):
        listed = (trainer or {}).get(key) or []
        for callback in [listed] if isinstance(listed, Mapping) else listed:
            if str(callback.get("class_path", "")).rpartition(".")[2] == "ConceptTracer":
                found.append((callback.get("init_args") or {}).get("task"))
    given = [task for task in found if task]
    if not given:
        return None
    if any(task != given[0] for task in given):
        raise ValueError(
            f"{config}: its ConceptTracers have different tasks: {given}. HINT: keep one of them "
            "in the file."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DiffusersTask, "task")
    return parser.instantiate(parser.parse_object({"task": given[0]})).task


def add_question(parser: ArgumentParser) -> None:
    """The arguments that :func:`concepts_of` and :func:`attributor_of` read."""
    parser.add_argument("store", type=str, help="the folder of the traces")
    parser.add_argument(
        "--config",
        type=str,
        required=True,
        help="the YAML of the run (its `model` section is used)",
    )
    parser.add_argument(
        "--model",
        type=str,
        default=None,
        help=(
            "package.module.Class of the module, where the YAML does not name it: a "
            "LightningCLI that was given the class leaves it out of the file that it saves"
        ),
    )
    parser.add_argument(
        "--method",
        type=str,
        default=None,
        help=(
            "a preset, or package.module.name of a Method or of a function that makes one; by "
            "default the store's own. One whose classes are yours, in a module that the YAML "
            "does not name, is found so"
        ),
    )
    parser.add_argument(
        "--prompt",
        type=str,
        default=None,
        help="the prompt of the image; name parts of it with --concept",
    )
    parser.add_argument(
        "--present", nargs="+", default=None, help="attribute=value words, or one quoted prompt"
    )
    parser.add_argument(
        "--absent",
        nargs="*",
        default=None,
        help="the same without the concept; nothing: the null condition",
    )
    parser.add_argument(
        "--concept",
        action="append",
        default=None,
        help=(
            "words of --prompt; or, with --present, 'NAME: what is left without the concept', "
            "such as 'owl: artist=noto'. Repeat it for several concepts of one image"
        ),
    )
    parser.add_argument(
        "--absent-prompt",
        type=str,
        default=None,
        help="the prompt without the concept, instead of the one made by rules",
    )
    parser.add_argument(
        "--name",
        type=str,
        default=None,
        help="the concept's name; by default its words, or what `absent` lacks",
    )
    parser.add_argument(
        "--global",
        action="store_true",
        help="ask of the model's own distribution rather than of one image",
    )
    parser.add_argument(
        "--image",
        type=str,
        default=None,
        help="an image file to ask about, instead of generating one",
    )
    parser.add_argument(
        "--mask",
        type=str,
        default=None,
        help="an image file of the same size: white where the question is about",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the generated image")
    parser.add_argument("--asker", type=str, default=None, help="who asks, for the store's ledger")
    parser.add_argument(
        "--device",
        type=str,
        default=None,
        help="cpu, cuda, cuda:1; by default a GPU, if there is one",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default=None,
        help="in which the network is run; by default as the traces were made",
    )
    parser.add_argument("--steps", type=int, default=25, help="sampling steps")
    parser.add_argument(
        "--guidance", type=float, default=2.0, help="classifier-free guidance scale"
    )


def concepts_of(args: Namespace, *, each_attribute: bool = False) -> list[Concept]:
    """The concepts that the arguments name, all of one image.

    Args:
        args: of :func:`add_question`.
        each_attribute: without any concept named, take each attribute of ``--present`` for one.

    Raises:
        ConceptError: arguments that exclude each other or say nothing.
    """
    if (args.prompt is None) == (args.present is None):
        raise ConceptError(
            "expected --prompt or --present, and not both. HINT: --prompt 'Pikachu in the style "
            "of Picasso' --concept Pikachu, or --present object=owl artist=noto --absent "
            "artist=noto."
        )
    rest = _image_of(args)
    if args.prompt is not None:
        return _of_prompt(args, rest)
    if args.absent_prompt is not None:
        raise ConceptError(
            "--absent-prompt goes with --prompt. HINT: --absent 'the prompt without the concept'."
        )
    present = parse_spec(args.present)
    if args.concept is not None:
        if args.absent is not None or args.name is not None:
            raise ConceptError(
                "--concept and --absent or --name: expected one or the other. HINT: --concept "
                "'NAME: attribute=value' says both the name and what is left without the concept."
            )
        return [_named(present, text, rest) for text in args.concept]
    if (
        args.absent is not None
        or args.name is not None
        or isinstance(present, str)
        or not each_attribute
    ):
        absent = parse_spec(args.absent)
        return [Concept(args.name or difference(present, absent), present, absent, **rest)]
    lefts = [
        {key: value for key, value in present.items() if key != left_out} for left_out in present
    ]
    return [Concept(difference(present, left), present, left, **rest) for left in lefts]


def _of_prompt(args: Namespace, rest: dict[str, Any]) -> list[Concept]:
    if not args.concept or args.absent is not None:
        raise ConceptError(
            f"--prompt {args.prompt!r}: expected --concept with words of it, and no --absent. "
            "HINT: --absent-prompt gives another prompt without the concept than the rules make."
        )
    if len(args.concept) > 1:
        if args.absent_prompt is not None or args.name is not None:
            raise ConceptError(
                f"--concept {' --concept '.join(map(repr, args.concept))}: expected one with "
                "--absent-prompt or --name."
            )
        return Concept.split(args.prompt, args.concept, **rest)
    named = {} if args.name is None else {"name": args.name}
    return [
        Concept.from_prompt(
            args.prompt, args.concept[0], absent=args.absent_prompt, **named, **rest
        )
    ]


def _named(present: Spec, text: str, rest: dict[str, Any]) -> Concept:
    name, separator, left = text.partition(":")
    if not separator or not name.strip():
        raise ConceptError(
            f"--concept {text!r}: expected 'NAME: what is left without the concept'. HINT: "
            "--concept 'owl: artist=noto'; with --prompt, words of it."
        )
    prompt = left.strip()
    absent = parse_spec(shlex.split(prompt)) if not prompt or "=" in prompt else prompt
    return Concept(name.strip(), present, absent, **rest)


def _image_of(args: Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if getattr(args, "global"):
        if args.image is not None:
            raise ConceptError("--global and --image: expected one or the other.")
        found["image"] = None
    if args.image is not None:
        found["image"] = read_image(args.image)
    if args.mask is not None:
        found["mask"] = torch.from_numpy(
            np.asarray(Image.open(args.mask).convert("L"), dtype=np.float32) / 255
        )
    return found


def read_image(path: str | Path) -> Tensor:
    """An image file as a tensor [3, H, W] in [-1, 1]; what is transparent becomes white.

    Raises:
        OSError: there is no such file, or it is no image.
    """
    picture = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, picture).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def opened_store(args: Namespace) -> TraceStore:
    """The store that the arguments name; nothing is loaded or computed yet.

    Raises:
        ReportError: it lacks the column that ``--group`` names.
    """
    store = TraceStore(args.store)
    known = store.samples.metadata
    group = getattr(args, "group", None)  # not every command has groups
    if group is not None and group not in known:
        raise ReportError(
            f"--group {group!r}: no such metadata column. The store has: "
            f"{', '.join(sorted(known)) or 'none'}. HINT: `encode` gives the columns, for example "
            'Encoded(..., metadata={"owner": batch["owner"]}).'
        )
    return store


def attributor_of(args: Namespace, store: TraceStore) -> Attributor:
    """The store, and the model that the arguments name."""
    sampler = Sampler(steps=args.steps, guidance=args.guidance)
    return Attributor(
        store,
        load_module(args.config, args.model),
        task=tracer_task(args.config),
        method=None if args.method is None else method_at(args.method),
        sampler=sampler,
        device=args.device,
        precision=args.precision,
        progress=True,
        asker=args.asker,
    )


def method_at(place: str) -> Method:
    """The method of a preset's name, or at ``package.module.name``: a Method, or what makes one
    without arguments.

    Raises:
        ValueError: there is none.
    """
    if "." not in place:
        try:
            return methods.by_name(place)
        except ValueError as error:
            raise ValueError(
                f"--method {place}: {error} HINT: a method of your own is named "
                "package.module.name."
            ) from error
    module, _, name = place.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"--method {place}: {error}. HINT: package.module.name, from the folder that you stand "
            "in."
        ) from error
    try:
        method = found if isinstance(found, Method) or not callable(found) else found()
    except TypeError as error:
        raise ValueError(
            f"--method {place}: {error}. HINT: name a Method, or a function that makes one without "
            "arguments."
        ) from error
    if not isinstance(method, Method):
        raise ValueError(
            f"--method {place}: it is {type(method).__name__}, expected a Method, or a function "
            "that makes one. HINT: Method(..., training=MyObjective(), ...) puts your parts "
            "together."
        )
    return method


def parse_spec(words: Sequence[str] | None) -> Spec:
    """``["object=owl", "artist=noto"]`` as attributes, one word or phrase without ``=`` as a
    prompt, nothing as ``{}``.

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
                f"{words}: expected attribute=value words, each attribute once (object=owl "
                "artist=noto), or one quoted prompt."
            )
        spec[attribute] = value
    return spec


def load_module(config: str | Path, class_path: str | None = None) -> Any:
    """The LightningModule that a LightningCLI YAML describes under ``model``.

    Args:
        config: the file.
        class_path: of the module, where ``model`` holds its arguments alone.

    Raises:
        ValueError: the file is no such YAML, or nothing names the class.
    """
    import lightning as L

    try:
        facts = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{config}: no YAML: {error}") from error
    model = (facts.get("model") or {}) if isinstance(facts, dict) else None
    if isinstance(model, dict) and "class_path" not in model and class_path is not None:
        model = {"class_path": class_path, "init_args": model}
    if not isinstance(model, dict) or "class_path" not in model:
        raise ValueError(
            f"{config}: expected a LightningCLI YAML with `model: {{class_path: ...}}`. HINT: a "
            "script that calls LightningCLI(MyModule, ...) saves the arguments without the class; "
            "name it: --model package.module.MyModule, from where that can be imported (values "
            "that the script links to others may have to be added to the file)."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningModule, "model")
    try:
        return parser.instantiate(parser.parse_object({"model": model})).model
    except ArgumentError as error:
        raise ValueError(f"{config}: {error}") from error


def difference(present: Spec, absent: Spec) -> str:
    """A name for what ``absent`` lacks."""
    if isinstance(present, str) or isinstance(absent, str):
        return str(present)
    return (
        " ".join(value for key, value in present.items() if absent.get(key) != value) or "concept"
    )
