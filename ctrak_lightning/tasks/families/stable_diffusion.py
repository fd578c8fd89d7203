"""Stable Diffusion 1.x and 2.x."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from torch import Tensor

from ctrak_lightning.tasks.base import Condition
from ctrak_lightning.tasks.pipeline import UNET_EXPECTED, text_width
from ctrak_lightning.tasks.registry import register_family
from ctrak_lightning.tasks.text import Given, PromptTask


@register_family
class StableDiffusionTask(PromptTask):
    """``StableDiffusionPipeline``: noise or v prediction, as the scheduler says. Arguments:
    :class:`PromptTask`.

    Raises:
        TaskError: the network takes other inputs than the text: it is an inpainting, editing,
            image-conditioned or distilled one.
    """

    pipelines: ClassVar[tuple[str | type, ...]] = ("StableDiffusionPipeline",)
    denoisers: ClassVar[tuple[str, ...]] = ("UNet2DConditionModel",)
    denoiser_part: ClassVar[str] = "unet"
    frozen_parts: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")

    @classmethod
    def pipeline_for(cls, denoiser: Any, parts: Collection[str]) -> str | type | None:
        return None if is_xl(denoiser, parts) else cls.pipelines[0]

    def expected_config(self, pipeline: Any) -> Mapping[str, Collection[Any]]:
        width = {"cross_attention_dim": text_width(pipeline, "text_encoder")}
        # A projection of the text, if there is one, takes the encoder's width.
        width = {} if pipeline.unet.config.get("encoder_hid_dim_type") else width
        return {**super().expected_config(pipeline), **UNET_EXPECTED, **width}

    def embed(self, prompts: list[str]) -> Given:
        embeddings, _ = self.pipeline.encode_prompt(
            prompts, self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return (embeddings,)

    def conditioned(self, *embeddings: Tensor) -> Condition:
        return {"encoder_hidden_states": embeddings[0]}


def is_xl(unet: Any, parts: Collection[str]) -> bool:
    """Whether a UNet2DConditionModel, with these other parts, is Stable Diffusion XL's."""
    return "text_encoder_2" in parts or unet.config.get("addition_embed_type") == "text_time"
