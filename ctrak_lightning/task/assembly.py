"""The parts of a diffusers model: found by name, and put together into a pipeline."""

import copy
import difflib
import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ctrak_lightning.errors import TaskError
from ctrak_lightning.task.families import FAMILIES

DENOISERS = {
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "DiTTransformer2DModel": "DiTPipeline",
    "UNet2DModel": "DDPMPipeline",
}
_NOT_NEEDED = ("safety_checker", "feature_extractor")


def find(module: Any, path: str, part: str | None = None) -> Any:
    """What an attribute path such as ``"model.unet"`` leads to from a module, or a key and
    attributes from a mapping.

    Args:
        module: where to look.
        path: the names, with dots between them.
        part: of what it is the name, for the message; None returns None where there is no such
            attribute.

    Raises:
        TaskError: there is no such attribute, or it is None; the message lists the nearest names.
    """
    found = module
    for i, name in enumerate(path.split(".")):
        holder = found
        found = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
        if found is not None:
            continue
        if part is None:
            return None
        where = ".".join([type(module).__name__, *path.split(".")[:i]])
        raise TaskError(
            f"DiffusersTask({part}={path!r}): {where} has no attribute {name!r}, or it is None. "
            f"{_nearest(name, _names(holder))} HINT: give the attribute that holds it, dotted "
            "where it is deeper: 'model.unet'."
        )
    return found


def family_name(denoiser: Any, parts: Mapping[str, Any]) -> str:
    """The pipeline that a denoiser and the other parts belong to.

    Raises:
        TaskError: that cannot be told; the message lists what can.
    """
    inner = getattr(denoiser, "_orig_mod", denoiser)  # of torch.compile
    if hasattr(inner, "get_base_model"):  # of peft.get_peft_model
        inner = inner.get_base_model()
    name = type(inner).__name__
    if name == "UNet2DConditionModel":
        return (
            "StableDiffusionXLPipeline" if "text_encoder_2" in parts else _by_time_embedding(inner)
        )
    if name in DENOISERS:
        return DENOISERS[name]
    told = (
        "Alpha and Sigma cannot be told apart" if name.startswith("PixArt") else "expected one of "
    )
    known = "" if name.startswith("PixArt") else ", ".join(["UNet2DConditionModel", *DENOISERS])
    raise TaskError(
        f"DiffusersTask: the denoiser is {name}: {told}{known}. HINT: "
        "pipeline='PixArtSigmaPipeline', say, names the family; a network that Fabric, Accelerate "
        "or DDP has wrapped is given unwrapped."
    )


def _by_time_embedding(unet: Any) -> str:
    has_sizes = unet.config.get("addition_embed_type") == "text_time"
    return "StableDiffusionXLPipeline" if has_sizes else "StableDiffusionPipeline"


def pipeline_class(name: str) -> type:
    """A diffusers pipeline by name.

    Raises:
        TaskError: it is of no known family.
    """
    if name not in FAMILIES:
        raise TaskError(f"DiffusersTask(pipeline={name!r}): expected one of {', '.join(FAMILIES)}.")
    import diffusers

    found: type = getattr(diffusers, name)
    return found


def pipeline_of(kind: type, parts: Mapping[str, Any], *, complete: bool = False) -> Any:
    """A pipeline of these parts, which stay as they are.

    Args:
        kind: its class.
        parts: its components by name.
        complete: whether every component that the pipeline cannot do without must be there.

    Raises:
        TaskError: parts are missing or unknown; the message names them.
    """
    accepted = accepted_by(kind)
    unknown = sorted(set(parts) - set(accepted))
    required = [
        name for name, parameter in accepted.items() if parameter.default is parameter.empty
    ]
    missing = [name for name in required if name not in parts and name not in _NOT_NEEDED]
    if unknown or (missing and complete):
        raise TaskError(
            f"DiffusersTask, parts of {kind.__name__}: missing {missing}, unknown {unknown}, given "
            f"{sorted(parts)}. Expected {sorted(set(required) - set(_NOT_NEEDED))}."
        )
    given = dict.fromkeys(required) | dict(parts)
    # Some pipelines change the configuration of an outdated scheduler, with a warning.
    given["scheduler"] = copy.deepcopy(given["scheduler"])
    if "requires_safety_checker" in accepted:
        given.setdefault("requires_safety_checker", False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The configuration file of this scheduler", FutureWarning)
        try:
            return kind(**given)
        except (AttributeError, TypeError, ValueError) as error:
            raise TaskError(
                f"DiffusersTask, parts of {kind.__name__}: {_classes(parts)} do not make one: "
                f"{error}. HINT: is each attribute the part that its name says?"
            ) from error


def accepted_by(kind: type) -> dict[str, inspect.Parameter]:
    """The components and options that a pipeline's class takes."""
    return dict(list(inspect.signature(kind.__init__).parameters.items())[1:])  # type: ignore[misc]


def _classes(parts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({type(part).__name__})" for name, part in sorted(parts.items()))


def _names(holder: Any) -> list[str]:
    if isinstance(holder, Mapping):
        return list(map(str, holder))
    own = (
        [name for name in vars(holder) if not name.startswith("_")]
        if hasattr(holder, "__dict__")
        else []
    )
    inner = [name for name, _ in holder.named_children()] if isinstance(holder, nn.Module) else []
    return sorted({*own, *inner} - {"training"})


def _nearest(name: str, names: Iterable[str]) -> str:
    listed = list(names)
    near = difflib.get_close_matches(name, listed, n=5, cutoff=0.4)
    rest = [other for other in listed if other not in near]
    return f"It has: {', '.join((near + rest)[:20])}."
