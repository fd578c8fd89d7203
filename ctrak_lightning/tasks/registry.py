"""Which task serves which diffusers pipeline."""

from typing import Any

from ctrak_lightning.errors import TaskError
from ctrak_lightning.tasks.families.class_conditional import ClassUNetTask
from ctrak_lightning.tasks.families.dit import DiTTask
from ctrak_lightning.tasks.families.flux import FluxTask
from ctrak_lightning.tasks.families.pixart import PixArtTask
from ctrak_lightning.tasks.families.stable_diffusion import StableDiffusionTask
from ctrak_lightning.tasks.families.stable_diffusion_3 import StableDiffusion3Task
from ctrak_lightning.tasks.families.stable_diffusion_xl import StableDiffusionXLTask
from ctrak_lightning.tasks.families.unconditional import UnconditionalTask
from ctrak_lightning.tasks.pipeline import PipelineTask

FAMILIES: dict[str, type[PipelineTask]] = {
    "StableDiffusionPipeline": StableDiffusionTask,
    "StableDiffusionXLPipeline": StableDiffusionXLTask,
    "StableDiffusion3Pipeline": StableDiffusion3Task,
    "FluxPipeline": FluxTask,
    "PixArtAlphaPipeline": PixArtTask,
    "PixArtSigmaPipeline": PixArtTask,
    "DiTPipeline": DiTTask,
    "DDPMPipeline": UnconditionalTask,
    "DDIMPipeline": UnconditionalTask,
}


def family_of(pipeline: Any) -> type[PipelineTask]:
    """The class of the task for a pipeline, or for one that it inherits from.

    Raises:
        TaskError: there is none; the message lists the known pipelines.
    """
    for base in type(pipeline).__mro__:
        if base.__name__ in FAMILIES:
            family = FAMILIES[base.__name__]
            if family is UnconditionalTask and pipeline.unet.config.num_class_embeds:
                return ClassUNetTask
            return family
    raise TaskError(
        f"DiffusersTask.from_pipeline({type(pipeline).__name__}): expected one of "
        f"{', '.join(FAMILIES)}. HINT: write a DiffusionTask for it: denoiser, noise_schedule, "
        "encode(batch) and condition(spec, n)."
    )
