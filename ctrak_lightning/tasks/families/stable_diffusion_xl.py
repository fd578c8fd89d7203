"""Stable Diffusion XL."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ctrak_lightning.tasks.base import Condition
from ctrak_lightning.tasks.families.stable_diffusion import StableDiffusionTask, is_xl
from ctrak_lightning.tasks.pipeline import Batch, text_width
from ctrak_lightning.tasks.registry import register_family
from ctrak_lightning.tasks.text import Given


@register_family
class StableDiffusionXLTask(StableDiffusionTask):
    """``StableDiffusionXLPipeline``: two text encoders, the second one's pooled embedding, and the
    time ids (original size, crop, target size). Arguments:
    :class:`~ctrak_lightning.tasks.text.PromptTask`.

    A batch may have ``original_size`` [B, 2] and ``crop_top_left`` [B, 2] in pixels, height or top
    first; without them an image counts as not cropped, of the size it has. Concepts and the
    unconditional side are asked at ``resolution``.
    """

    pipelines: ClassVar[tuple[str | type, ...]] = ("StableDiffusionXLPipeline",)
    frozen_parts: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "text_encoder_2")
    embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")
    fields: ClassVar[tuple[str, ...]] = (
        *StableDiffusionTask.fields,
        "tokens_2",
        "pooled_prompt_embeds",
        "original_size",
        "crop_top_left",
    )

    @classmethod
    def pipeline_for(cls, denoiser: Any, parts: Collection[str]) -> str | type | None:
        return cls.pipelines[0] if is_xl(denoiser, parts) else None

    def expected_config(self, pipeline: Any) -> Mapping[str, Collection[Any]]:
        config = pipeline.unet.config
        expected = dict(super().expected_config(pipeline))
        expected["addition_embed_type"] = ("text_time",)
        expected["cross_attention_dim"] = text_width(pipeline, "text_encoder", "text_encoder_2")
        pooled = getattr(getattr(pipeline.text_encoder_2, "config", None), "projection_dim", None)
        if pooled is not None:
            # Six numbers: the original size, the corner of the crop, the target size.
            given = 6 * config.get("addition_time_embed_dim") + pooled
            expected["projection_class_embeddings_input_dim"] = (given,)
        return expected

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

    def embed(self, prompts: list[str]) -> Given:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, do_classifier_free_guidance=False
        )
        return embeddings, pooled

    def conditioned(self, *embeddings: Tensor) -> Condition:
        states, pooled = embeddings
        height, width = self.resolution
        ids = torch.tensor(
            [[height, width, 0, 0, height, width]], device=self.device, dtype=pooled.dtype
        )
        return {
            "encoder_hidden_states": states,
            "text_embeds": pooled,
            "time_ids": ids.expand(len(states), -1),
        }

    def encode_null(self) -> Condition:
        null = super().encode_null()
        if self.negative_prompt is None and self.pipeline.config.force_zeros_for_empty_prompt:
            return null | {
                name: torch.zeros_like(null[name])
                for name in ("encoder_hidden_states", "text_embeds")
            }
        return null

    def batch_condition(self, batch: Batch) -> Condition:
        condition = super().batch_condition(batch)
        target = torch.tensor([self.image_size(batch)] * len(condition["time_ids"]))
        original, corner = target, torch.zeros_like(target)
        if self.has_column(batch, "original_size"):
            original = self.column(batch, "original_size")
        if self.has_column(batch, "crop_top_left"):
            corner = self.column(batch, "crop_top_left")
        ids = torch.cat([torch.as_tensor(part).cpu() for part in (original, corner, target)], dim=1)
        return condition | {"time_ids": ids.to(condition["time_ids"])}
