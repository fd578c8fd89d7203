"""UNet2DModel, without a condition or with classes."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ctrak_lightning.errors import ConceptError
from ctrak_lightning.tasks.base import Condition, Spec
from ctrak_lightning.tasks.classes import ClassTask
from ctrak_lightning.tasks.pipeline import Batch, PipelineTask
from ctrak_lightning.tasks.registry import register_family


@register_family
class UnconditionalTask(PipelineTask):
    """``DDPMPipeline`` or ``DDIMPipeline`` of a ``UNet2DModel`` in pixel space. Arguments:
    :class:`PipelineTask`.

    Such a model knows no concepts: ask it with a method that looks at the whole image
    (``methods.d_trak()``), for ``Concept("image", present={}, absent="")``.
    """

    pipelines: ClassVar[tuple[str | type, ...]] = ("DDPMPipeline", "DDIMPipeline")
    denoisers: ClassVar[tuple[str, ...]] = ("UNet2DModel",)
    denoiser_part: ClassVar[str] = "unet"
    frozen_parts: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def variant(cls, denoiser: Any) -> type[PipelineTask]:
        return ClassUNetTask if denoiser.config.num_class_embeds else cls

    def expected_config(self, pipeline: Any) -> Mapping[str, Collection[Any]]:
        return {**super().expected_config(pipeline), "class_embed_type": (None,)}

    def batch_condition(self, batch: Batch) -> Condition:
        return {}

    def condition(self, spec: Spec, n: int) -> Condition:
        """Nothing.

        Raises:
            ConceptError: the spec names something.
        """
        if spec:
            raise ConceptError(
                f"{type(self).__name__}.condition({spec!r}): this model has no condition. HINT: "
                "ask for the whole image with methods.d_trak() and Concept('image', present={}, "
                "absent='')."
            )
        return {}

    def latents(self, images: Tensor) -> Tensor:
        """The images themselves."""
        return images.to(self.device, self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1]; a single channel is shown as grey."""
        images = (latents / 2 + 0.5).clamp(0, 1)
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


class ClassUNetTask(ClassTask, UnconditionalTask):
    """``DDPMPipeline`` or ``DDIMPipeline`` of a ``UNet2DModel`` with ``num_class_embeds``. (The
    pipelines themselves cannot give it a class; our sampler does.) Arguments:
    :class:`ClassTask`."""

    def label_count(self) -> int:
        return int(self.denoiser.config.num_class_embeds)
