"""Stable Diffusion 1.x and 2.x."""

from typing import Any, ClassVar

from torch import Tensor

from ctrak_lightning.errors import TaskError
from ctrak_lightning.task.prompts import Given, PromptTask
from ctrak_lightning.task.protocol import Condition


class StableDiffusionTask(PromptTask):
    """``StableDiffusionPipeline``: noise or v prediction, as the scheduler says. Arguments: :class:`PromptTask`.

    Raises:
        TaskError: the network takes the guidance scale as an input (distilled consistency models).
    """

    denoiser_part: ClassVar[str] = "unet"
    frozen_parts: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")

    def __init__(self, pipeline: Any, **options: Any) -> None:
        super().__init__(pipeline, **options)
        if self.denoiser.config.get("time_cond_proj_dim") is not None:
            raise TaskError(
                f"{type(self).__name__}({type(pipeline).__name__}): the network takes the guidance scale as an input "
                "(`time_cond_proj_dim`), which is not supported for UNets. HINT: trace the model that it was distilled from."
            )

    def embed(self, prompts: list[str]) -> Given:
        embeddings, _ = self.pipeline.encode_prompt(
            prompts, self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return (embeddings,)

    def conditioned(self, *embeddings: Tensor) -> Condition:
        return {"encoder_hidden_states": embeddings[0]}
