"""PixArt."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ctrak_lightning.errors import TaskError
from ctrak_lightning.tasks.base import Condition
from ctrak_lightning.tasks.pipeline import FIELDS, text_width
from ctrak_lightning.tasks.registry import register_family
from ctrak_lightning.tasks.text import Given, PromptTask


@register_family
class PixArtTask(PromptTask):
    """``PixArtAlphaPipeline`` and ``PixArtSigmaPipeline``: T5 with its attention mask; of the
    largest Alpha also the image's size and aspect ratio, which are those of ``resolution``. Of a
    network that predicts variances too, only the noise is taken. Captions are not cleaned
    (``clean_caption=False``). Arguments: :class:`PromptTask`."""

    pipelines: ClassVar[tuple[str | type, ...]] = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    denoisers: ClassVar[tuple[str, ...]] = ("PixArtTransformer2DModel",)
    frozen_parts: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    may_predict_variances: ClassVar[bool] = True
    embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_attention_mask")
    fields: ClassVar[tuple[str, ...]] = (*FIELDS, "caption", "tokens", *embeddings)

    @classmethod
    def pipeline_for(cls, denoiser: Any, parts: Collection[str]) -> str | type | None:
        raise TaskError(
            f"DiffusersTask: the denoiser is {type(denoiser).__name__}: Alpha and Sigma cannot be "
            "told apart. HINT: pipeline='PixArtSigmaPipeline', say, names the family."
        )

    def expected_config(self, pipeline: Any) -> Mapping[str, Collection[Any]]:
        return {
            **super().expected_config(pipeline),
            "caption_channels": text_width(pipeline, "text_encoder"),
            "norm_type": ("ada_norm_single",),
        }

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output: Tensor = self.denoiser(
            x_t,
            timestep=t,
            encoder_hidden_states=condition["encoder_hidden_states"],
            encoder_attention_mask=condition["encoder_attention_mask"],
            added_cond_kwargs={
                name: condition.get(name) for name in ("resolution", "aspect_ratio")
            },
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]

    def embed(self, prompts: list[str]) -> Given:
        embeddings, mask, _, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device, **self._length
        )
        return embeddings, mask

    def conditioned(self, *embeddings: Tensor) -> Condition:
        states, mask = embeddings
        condition = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        if self.denoiser.use_additional_conditions:
            height, width = self.resolution
            sizes = torch.tensor([[float(height), float(width)]] * len(states), device=self.device)
            condition |= {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}
        return condition
