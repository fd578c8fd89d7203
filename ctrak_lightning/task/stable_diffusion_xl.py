"""Stable Diffusion XL."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ctrak_lightning.task.protocol import Condition
from ctrak_lightning.task.stable_diffusion import StableDiffusionTask


class StableDiffusionXLTask(StableDiffusionTask):
    """``StableDiffusionXLPipeline``: two text encoders, the second one's pooled embedding, and the time ids (original size,
    crop, target size). Arguments: :class:`~ctrak_lightning.task.prompts.PromptTask`.

    A batch may have ``original_size`` [B, 2] and ``crop_top_left`` [B, 2] in pixels, height or top first; without them an image
    counts as not cropped, of the size it has. Concepts and the unconditional side are asked at ``resolution``.
    """

    frozen_parts: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "text_encoder_2")
    fields: ClassVar[tuple[str, ...]] = (*StableDiffusionTask.fields, "original_size", "crop_top_left")

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        added = {name: condition[name] for name in ("text_embeds", "time_ids")}
        output: Tensor = self.denoiser(
            x_t,
            t,
            encoder_hidden_states=condition["encoder_hidden_states"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output

    def encode_prompts(self, prompts: list[str]) -> Condition:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, do_classifier_free_guidance=False
        )
        height, width = self.resolution
        ids = torch.tensor([[height, width, 0, 0, height, width]], device=self.device, dtype=pooled.dtype)
        return {
            "encoder_hidden_states": embeddings,
            "text_embeds": pooled,
            "time_ids": ids.expand(len(prompts), -1),
        }

    def encode_null(self) -> Condition:
        null = super().encode_null()
        if self.negative_prompt is None and self.pipeline.config.force_zeros_for_empty_prompt:
            return null | {
                name: torch.zeros_like(null[name]) for name in ("encoder_hidden_states", "text_embeds")
            }
        return null

    def batch_condition(self, batch: Mapping[str, Any]) -> Condition:
        condition = super().batch_condition(batch)
        images: Tensor = self.column(batch, "image")
        target = torch.tensor([images.shape[-2:]] * len(images))
        original = batch.get(self._names["original_size"], target)
        corner = batch.get(self._names["crop_top_left"], torch.zeros_like(target))
        ids = torch.cat([torch.as_tensor(part).cpu() for part in (original, corner, target)], dim=1)
        return condition | {"time_ids": ids.to(condition["time_ids"])}
