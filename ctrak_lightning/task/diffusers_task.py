"""DiffusersTask: a diffusers model, whole or in parts that a module already has, as a
DiffusionTask."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ctrak_lightning.errors import TaskError
from ctrak_lightning.task.assembly import (
    accepted_by,
    family_name,
    find,
    pipeline_class,
    pipeline_of,
)
from ctrak_lightning.task.families import family_of
from ctrak_lightning.task.pipeline_task import PipelineTask

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
        unet, transformer, vae, text_encoder, text_encoder_2, text_encoder_3, tokenizer,
        tokenizer_2, tokenizer_3, scheduler: the
            attribute that is this part, dotted where it is deeper (``"model.unet"``). None takes
            the attribute of the part's own name, if there is one (of the scheduler also
            ``noise_scheduler``).
        batch: what the columns of the module's batches are, where they have other names:
            ``{"pixel_values": "image", "input_ids": "tokens"}``; ``docs/attach.md`` lists ours. Of
            a batch that is a tuple: ``{"0": "image", "1": "class"}``.
        pipeline: the diffusers pipeline that the parts belong to, such as
            ``"StableDiffusionPipeline"``; None infers it from the denoiser's class.
        options: arguments of the family, such as ``{"resolution": 512}``; ``docs/adapters.md``
            lists them.

    Example::

        task = DiffusersTask(scheduler="noise_scheduler", batch={"pixel_values": "image",
        "input_ids": "tokens"}) L.Trainer(callbacks=[ConceptTracer("runs/x/traces",
        task=task)]).fit(module, loader) Attributor("runs/x/traces", module, task=task)
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
        given = (
            unet,
            transformer,
            vae,
            text_encoder,
            text_encoder_2,
            text_encoder_3,
            tokenizer,
            tokenizer_2,
            tokenizer_3,
            scheduler,
        )
        self.paths = {
            name: path for name, path in zip(PARTS, given, strict=True) if path is not None
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
        control = [
            name for name, part in _submodules(module) if "ControlNet" in type(part).__name__
        ]
        if control:
            raise TaskError(
                f"DiffusersTask: {type(module).__name__}.{control[0]} is a ControlNet, whose "
                "images this task does not give it. Expected a module that trains the denoiser on "
                "text, classes or nothing. HINT: write a DiffusionTask whose predict(x_t, t, "
                "condition) calls both, with a `denoiser` that holds what is traced."
            )
        kind = pipeline_class(self.pipeline or family_name(denoiser, parts))
        accepted = accepted_by(kind)
        parts = {
            name: part for name, part in parts.items() if name in self.paths or name in accepted
        }
        try:
            pipeline = pipeline_of(kind, parts)
            return family_of(pipeline)(pipeline, batch=self.batch, borrowed=True, **self.options)
        except TaskError as error:
            raise TaskError(
                f"DiffusersTask bound to {type(module).__name__}, which has {sorted(parts)}: "
                f"{error}"
            ) from error

    def __repr__(self) -> str:
        facts = {
            **self.paths,
            "batch": self.batch,
            "pipeline": self.pipeline,
            "options": self.options,
        }
        return f"DiffusersTask({', '.join(f'{name}={value!r}' for name, value in facts.items() if value)})"

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
                    pipeline.unet.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k",
                    "to_v", "to_out.0"])) self.task = DiffusersTask.from_pipeline(pipeline)

                def training_step(self, batch, batch_idx):
                    return self.task.loss(batch)

                def configure_optimizers(self):
                    return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad],
                    lr=1e-4)
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


def _submodules(module: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a module, or of a mapping, with their names."""
    if isinstance(module, nn.Module):
        yield from module.named_modules()
    elif isinstance(module, Mapping):
        yield from module.items()
