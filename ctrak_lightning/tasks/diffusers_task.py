"""DiffusersTask: a diffusers model, whole or in parts that a module already has, as a
DiffusionTask."""

import copy
import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ctrak_lightning.errors import TaskError, nearest
from ctrak_lightning.tasks import families  # noqa: F401, as each registers itself
from ctrak_lightning.tasks.pipeline import PipelineTask
from ctrak_lightning.tasks.registry import family_of, pipeline_class, pipeline_for

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
            f"It has: {nearest(name, _names(holder))}. HINT: give the attribute that holds it, dotted "
            "where it is deeper: 'model.unet'."
        )
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
            classes = (f"{name} ({type(part).__name__})" for name, part in sorted(parts.items()))
            raise TaskError(
                f"DiffusersTask, parts of {kind.__name__}: {', '.join(classes)} do not make one: "
                f"{error}. HINT: is each attribute the part that its name says?"
            ) from error


def accepted_by(kind: type) -> dict[str, inspect.Parameter]:
    """The components and options that a pipeline's class takes."""
    return dict(list(inspect.signature(kind.__init__).parameters.items())[1:])  # type: ignore[misc]


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


PARTS = (
    "unet",
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
    "scheduler",
)
OTHER_NAMES = {"scheduler": ("noise_scheduler",)}


class DiffusersTask:
    """Where a module keeps the parts of a diffusers model, so that it can be traced as it is: by
    their attributes' names.

    :meth:`bind` makes the DiffusionTask; a :class:`~ctrak_lightning.callbacks.ConceptTracer` and an
    :class:`~ctrak_lightning.Attributor` do that themselves. The module is not changed: it gets no
    submodules, and no parameter's ``requires_grad`` and no training flag is touched. (A module that
    is yet to be written carries ``self.task = DiffusersTask.from_pipeline(pipeline)`` instead.)

    Args:
        unet: the attribute that is this part, dotted where it is deeper (``"model.unet"``). None
            takes the attribute of the part's own name, if there is one. So for the parts below.
        transformer: the same, of pipelines that have one instead of a UNet.
        vae: the same.
        text_encoder: the same.
        text_encoder_2: the same.
        text_encoder_3: the same.
        tokenizer: the same.
        tokenizer_2: the same.
        tokenizer_3: the same.
        scheduler: the same; without a name also the attribute ``noise_scheduler``.
        batch: what the columns of the module's batches are, where they have other names:
            ``{"pixel_values": "image", "input_ids": "tokens"}``; ``docs/attach.md`` lists ours. Of
            a batch that is a tuple: ``{"0": "image", "1": "class"}``.
        pipeline: the diffusers pipeline that the parts belong to, such as
            ``"StableDiffusionPipeline"``; None infers it from the denoiser's class.
        options: arguments of the family, such as ``{"resolution": 512}``; ``docs/adapters.md``
            lists them.

    Example::

        columns = {"pixel_values": "image", "input_ids": "tokens"}
        task = DiffusersTask(scheduler="noise_scheduler", batch=columns)
        tracer = ConceptTracer("runs/x/traces", task=task)
        L.Trainer(callbacks=[tracer]).fit(module, loader)
        Attributor("runs/x/traces", module, task=task)
    """

    def __init__(
        self,
        unet: str | None = None,
        transformer: str | None = None,
        vae: str | None = None,
        text_encoder: str | None = None,
        text_encoder_2: str | None = None,
        text_encoder_3: str | None = None,
        tokenizer: str | None = None,
        tokenizer_2: str | None = None,
        tokenizer_3: str | None = None,
        scheduler: str | None = None,
        batch: dict[str, str] | None = None,
        pipeline: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        given = locals()
        self.paths: dict[str, str] = {
            name: given[name] for name in PARTS if given[name] is not None
        }
        self.batch = dict(batch or {})
        self.pipeline = pipeline
        self.options = dict(options or {})
        if pipeline is not None:
            pipeline_class(pipeline)

    def bind(self, module: Any) -> PipelineTask:
        """The task of a module that has the named attributes, or of a mapping with these keys.

        Raises:
            TaskError: it has no such attribute, and the message lists the nearest; a part is
                missing; the denoiser is of no known family.
        """
        parts = {name: find(module, path, name) for name, path in self.paths.items()}
        for name in PARTS:
            for path in (name, *OTHER_NAMES.get(name, ())):
                if name not in parts and (found := find(module, path)) is not None:
                    parts[name] = found
        denoiser = parts.get("unet", parts.get("transformer"))
        if denoiser is None:
            find(module, "unet", "unet")
        if isinstance(module, nn.Module) and not any(
            denoiser is inner for inner in module.modules()
        ):
            raise TaskError(
                f"DiffusersTask: the denoiser is no submodule of {type(module).__name__}, so its "
                "parameters are not among those that train. HINT: make it an attribute of the "
                "module itself, as in `self.unet = pipeline.unet`."
            )
        inner: Iterable[tuple[str, Any]] = module.items() if isinstance(module, Mapping) else ()
        if isinstance(module, nn.Module):
            inner = module.named_modules()
        control = [name for name, part in inner if "ControlNet" in type(part).__name__]
        if control:
            raise TaskError(
                f"DiffusersTask: {type(module).__name__}.{control[0]} is a ControlNet, whose "
                "images this task does not give it. Expected a module that trains the denoiser on "
                "text, classes or nothing. HINT: write a DiffusionTask whose predict(x_t, t, "
                "condition) calls both, with a `denoiser` that holds what is traced."
            )
        kind = pipeline_class(self.pipeline) if self.pipeline else pipeline_for(denoiser, parts)
        accepted = accepted_by(kind)
        parts = {
            name: part for name, part in parts.items() if name in self.paths or name in accepted
        }
        try:
            pipeline = pipeline_of(kind, parts)
            return family_of(pipeline)(pipeline, batch=self.batch, owns_parts=False, **self.options)
        except TaskError as error:
            raise TaskError(
                f"DiffusersTask bound to {type(module).__name__}, which has {sorted(parts)}: "
                f"{error}"
            ) from error

    def __repr__(self) -> str:
        named = ("batch", "pipeline", "options")
        facts = {**self.paths, **{name: getattr(self, name) for name in named}}
        shown = ", ".join(f"{name}={value!r}" for name, value in facts.items() if value)
        return f"DiffusersTask({shown})"

    @staticmethod
    def from_pipeline(pipeline: Any, **options: Any) -> PipelineTask:
        """The task of a diffusers pipeline, for a LightningModule to have as its attribute
        ``task``.

        Args:
            pipeline: a loaded pipeline; ``docs/adapters.md`` lists the families.
            options: of the family's class; see there.

        Raises:
            TaskError: its family is unknown, or it lacks a part.

        Example::

            class LoraFineTune(L.LightningModule):
                def __init__(self, pipeline):
                    super().__init__()
                    pipeline.unet.requires_grad_(False)
                    layers = ["to_q", "to_k", "to_v", "to_out.0"]
                    pipeline.unet.add_adapter(LoraConfig(r=8, target_modules=layers))
                    self.task = DiffusersTask.from_pipeline(pipeline)

                def training_step(self, batch, batch_idx):
                    return self.task.loss(batch)

                def configure_optimizers(self):
                    trained = [p for p in self.parameters() if p.requires_grad]
                    return torch.optim.AdamW(trained, lr=1e-4)
        """
        return family_of(pipeline)(pipeline, **options)

    @staticmethod
    def from_parts(pipeline_class: type, parts: Mapping[str, Any], **options: Any) -> PipelineTask:
        """The same from separate parts.

        Args:
            pipeline_class: the diffusers pipeline that the parts belong to, such as
                ``StableDiffusionPipeline``.
            parts: its components by name: ``{"unet": unet, "vae": vae, ...}``. Safety checkers may
                be left out.
            options: as of :meth:`from_pipeline`.

        Raises:
            TaskError: parts are missing or unknown; the message names them.
        """
        return DiffusersTask.from_pipeline(
            pipeline_of(pipeline_class, parts, complete=True), **options
        )
