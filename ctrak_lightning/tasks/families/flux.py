"""Flux."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ctrak_lightning.schedules import FlowSchedule, Schedule
from ctrak_lightning.tasks.base import Condition
from ctrak_lightning.tasks.pipeline import FIELDS
from ctrak_lightning.tasks.registry import register_family
from ctrak_lightning.tasks.text import TOKENS, Given, PromptTask


@register_family
class FluxTask(PromptTask):
    """``FluxPipeline``: flow matching on packed latents, T5 and a pooled CLIP embedding.

    States are unpacked latents [B, C, h, w] everywhere outside :meth:`predict`. The schedule's
    shift depends on the image's size, so give ``resolution`` where it is not 1024. A sampler's
    ``guidance`` is classifier-free guidance (the pipeline's ``true_cfg_scale``):
    ``Sampler(guidance=1.0)`` generates as the pipeline does by default.

    Args:
        embedded_guidance: the guidance scale that a guidance-distilled network (FLUX.1-dev) is
            told, in training, tracing and generation alike.
        pipeline, resolution, batch, negative_prompt, max_sequence_length: as of
        :class:`PromptTask`.
    """

    pipelines: ClassVar[tuple[str | type, ...]] = ("FluxPipeline",)
    denoisers: ClassVar[tuple[str, ...]] = ("FluxTransformer2DModel",)
    frozen_parts: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "text_encoder_2")
    embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")
    fields: ClassVar[tuple[str, ...]] = (*FIELDS, "caption", *TOKENS[:2], *embeddings)

    def __init__(self, pipeline: Any, *, embedded_guidance: float = 3.5, **options: Any) -> None:
        super().__init__(pipeline, **options)
        self.embedded_guidance = embedded_guidance

    def schedule(self) -> Schedule:
        height, width = self.resolution
        side = 2 * int(self.pipeline.vae_scale_factor)
        tokens = (height // side) * (width // side)
        flow = FlowSchedule.from_scheduler(self.pipeline.scheduler, tokens=tokens)
        # The pipeline brings steps of its own, from 1 to 1 / steps, unless the scheduler's are
        # asked for.
        return (
            flow
            if self.pipeline.scheduler.config.get("use_flow_sigmas")
            else replace(flow, ends=None)
        )

    def expected_config(self, pipeline: Any) -> Mapping[str, Collection[Any]]:
        # Latents are packed, four positions into one; without a VAE the network's own numbers are
        # all that is known.
        packed = 1 if getattr(pipeline, "vae", None) is None else 4
        return {
            name: [packed * channels for channels in allowed]
            for name, allowed in super().expected_config(pipeline).items()
        }

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        batch, channels, height, width = x_t.shape
        embeddings = condition["encoder_hidden_states"]
        image_ids = self.pipeline._prepare_latent_image_ids(
            batch, height // 2, width // 2, x_t.device, x_t.dtype
        )
        output = self.denoiser(
            hidden_states=self.pipeline._pack_latents(x_t, batch, channels, height, width),
            timestep=t.to(x_t.dtype) / len(self.noise_schedule),
            txt_ids=torch.zeros(embeddings.shape[1], 3, device=x_t.device, dtype=x_t.dtype),
            img_ids=image_ids,
            return_dict=False,
            **condition,
        )[0]
        unpacked: Tensor = self.pipeline._unpack_latents(output, height, width, 1)
        return unpacked

    def embed(self, prompts: list[str]) -> Given:
        embeddings, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, **self._length
        )
        return embeddings, pooled

    def conditioned(self, *embeddings: Tensor) -> Condition:
        states, pooled = embeddings
        condition = {"encoder_hidden_states": states, "pooled_projections": pooled}
        if self.denoiser.config.guidance_embeds:
            condition["guidance"] = torch.full(
                (len(states),), self.embedded_guidance, device=self.device
            )
        return condition
