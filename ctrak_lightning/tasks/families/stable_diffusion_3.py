"""Stable Diffusion 3 and 3.5."""

from typing import ClassVar

from torch import Tensor

from ctrak_lightning.schedules import NoiseSchedule, Schedule
from ctrak_lightning.tasks.base import Condition
from ctrak_lightning.tasks.pipeline import FIELDS
from ctrak_lightning.tasks.registry import register_family
from ctrak_lightning.tasks.text import TOKENS, Given, PromptTask


@register_family
class StableDiffusion3Task(PromptTask):
    """``StableDiffusion3Pipeline``: flow matching, three text encoders, pooled embeddings.
    Arguments: :class:`PromptTask`.

    T5 (``text_encoder_3``) may be left out, as the pipeline allows.
    """

    pipelines: ClassVar[tuple[str | type, ...]] = ("StableDiffusion3Pipeline",)
    denoisers: ClassVar[tuple[str, ...]] = ("SD3Transformer2DModel",)
    frozen_parts: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "text_encoder_2")
    embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")
    fields: ClassVar[tuple[str, ...]] = (*FIELDS, "caption", *TOKENS, *embeddings)
    optional_parts: ClassVar[tuple[str, ...]] = ("text_encoder_3",)

    def schedule(self) -> Schedule:
        height, width = self.resolution
        side = int(self.pipeline.vae_scale_factor * self.pipeline.patch_size)
        return NoiseSchedule.from_scheduler(
            self.pipeline.scheduler, tokens=(height // side) * (width // side)
        )

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output: Tensor = self.denoiser(
            hidden_states=x_t, timestep=t, return_dict=False, **condition
        )[0]
        return output

    def embed(self, prompts: list[str]) -> Given:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            **self._length,
        )
        return embeddings, pooled

    def conditioned(self, *embeddings: Tensor) -> Condition:
        return {"encoder_hidden_states": embeddings[0], "pooled_projections": embeddings[1]}
